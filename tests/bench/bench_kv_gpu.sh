#!/usr/bin/env bash
# Builds the CUDA benchmarks of the KV memory with nvcc alone and runs them all; for a machine that has a GPU and little
# else. The tables go to standard output and, each tool's apart, to the folder given.
#
#     tests/bench/bench_kv_gpu.sh [folder, default /tmp/bench_kv] [seconds for all layouts, default 300]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
out=${1:-/tmp/bench_kv}
seconds=${2:-300}
mkdir -p "$out"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT

for name in bench_vmm bench_kv_tlb bench_kv_layout; do
    nvcc -std=c++17 -O2 -lineinfo -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
        -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wshadow -o "$bin/$name" "$name.cu"
done
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv | tee "$out/device.txt"
nvcc --version | tail -n 2 | tee -a "$out/device.txt"

rc=0
run() { # <log> <command...>
    local log=$out/$1
    shift
    local begin=$SECONDS
    timeout 240 "$@" >"$log" 2>&1 || { rc=1; echo "FAILED: $*" >>"$log"; }
    echo "($((SECONDS - begin)) s)" >>"$log"
    cat "$log"
}
run vmm.txt "$bin/bench_vmm"
run tlb.txt "$bin/bench_kv_tlb"
for heads in 1 2 4 8; do
    share=$((heads == 8 || heads == 1 ? seconds / 3 : seconds / 6))
    run "layout_hk$heads.txt" "$bin/bench_kv_layout" "$heads" 88 "$share" "$out/layout.csv"
done
exit $rc
