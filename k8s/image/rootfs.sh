#!/usr/bin/env bash
# rootfs.sh VARIANT BIN_DIR DEST: the file system of an image, complete (FROM scratch), every file at the path where the
# build machine's packages have it. The Dockerfile calls this; so do the tests, without any container engine.
#
#   coordinator  tandem, tandem-coordinator, tandem-agent, mpirun: no GPU, no ranks
#   worker       all programs, orted, the CUDA back end, the CUDA libraries that it is linked with, NCCL, which it opens, and
#                what NCCL opens for RDMA
#   host         all programs, orted, no CUDA; with the demo model in /models/demo (TANDEM_DEMO_MODEL: its folder)
#
# The driver's libcuda comes from the node. No shell is in any of them, and nothing of them is written to at run time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# = 3 ] || { echo "usage: rootfs.sh coordinator|worker|host BIN_DIR DEST" >&2; exit 2; }
variant=$1 bin=$2 dest=$3
arch=$(gcc -print-multiarch)
lib=/usr/lib/$arch mca=/usr/lib/$arch/openmpi/lib/openmpi3
model=${TANDEM_DEMO_MODEL:-$here/../../tests/data/demo-model}

case $variant in
coordinator) programs=(tandem tandem-coordinator tandem-agent) ;;
worker | host) programs=(tandem tandem-coordinator tandem-agent tandem-worker) ;;
*) echo "rootfs: $variant: expected coordinator, worker or host" >&2; exit 2 ;;
esac
for f in "${programs[@]/#/$bin/}" "$mca" /usr/bin/orterun /usr/bin/orted; do
    [ -e "$f" ] || { echo "rootfs: $f is not there: build the programs, install openmpi-bin and libopenmpi-dev" >&2; exit 1; }
done
if [ "$variant" = worker ] && [ ! -e "$bin/backend_cuda.so" ]; then
    echo "rootfs: $bin/backend_cuda.so is not there: build with --preset cuda" >&2
    exit 1
fi

rm -rf "$dest"
mkdir -p "$dest"/{usr/bin,usr/share,etc/openmpi,etc/tandem,dev,proc,sys,run,tmp,models,"$lib"}
chmod 1777 "$dest/tmp"
# As on a system with one /usr: the loader and paths of packages name both.
ln -s usr/lib "$dest/lib"
ln -s usr/lib64 "$dest/lib64"
mkdir "$dest/usr/lib64"

place() { # place FILE ...: each at its own path
    local f
    for f; do
        mkdir -p "$dest${f%/*}"
        cp -L "$f" "$dest$f"
    done
}

install -m 755 "${programs[@]/#/$bin/}" "$dest/usr/bin/"
[ "$variant" != worker ] || install -m 644 "$bin/backend_cuda.so" "$dest/usr/bin/"
place /usr/bin/orterun
mv "$dest/usr/bin/orterun" "$dest/usr/bin/mpirun"
[ "$variant" = coordinator ] || place /usr/bin/orted

# Of Open MPI's parts those for processes of one host or of several joined by TCP.
for part in "$mca"/mca_*.so; do
    case ${part##*/} in
    *ofi* | *psm* | *ucx* | *openib* | *usnic* | *flux* | *jsm* | *slurm* | *romio* | *monitoring* | *spml* | *sshmem* | *memheap* | \
        *scoll* | *atomic* | mca_btl_sm.so) ;;
    *) place "$part" ;;
    esac
done
place /usr/share/openmpi/*.txt
for part in "$lib"/pmix2/lib/pmix/*.so; do
    [ ! -e "$part" ] || place "$part" # none where all are built in
done
[ ! -d "$lib/pmix2/share/pmix" ] || place "$lib"/pmix2/share/pmix/*
cp "$here/openmpi-mca-params.conf" "$dest/etc/openmpi/"

cuda=${CUDA_HOME:-/usr/local/cuda}/lib64
if [ "$variant" = worker ]; then
    nccl=$(ldconfig -p | awk '$1 == "libnccl.so.2" && !n++ {print $NF}') # reads all: a pipe cut short is an error
    [ -n "$nccl" ] || nccl=$cuda/libnccl.so.2
    [ -e "$nccl" ] || { echo "rootfs: libnccl.so.2 is not there: install libnccl2" >&2; exit 1; }
    cp -L "$nccl" "$dest$lib/"
    # NCCL opens these by itself where a pod has an RDMA device. The links stay links: a second copy of a provider in one
    # process knows nothing of the devices of the first.
    [ -e "$lib/libibverbs" ] || { echo "rootfs: $lib/libibverbs is not there: install ibverbs-providers" >&2; exit 1; }
    cp -a "$lib/libibverbs" "$lib"/libmlx5.so.1 "$dest$lib/"
    for provider in "$lib"/libibverbs/*.so; do
        [ ! -L "$provider" ] || cp "$(readlink -f "$provider")" "$dest$lib/"
    done
    cp -a /etc/libibverbs.d "$dest/etc/"
fi

# What all of these need, with the C library and its loader; cuBLASLt is found in the toolkit's folder.
find "$dest" -type f \( -name '*.so' -o -name 'libnccl*' -o -path '*/bin/*' \) -print0 |
    LD_LIBRARY_PATH=$cuda xargs -0 ldd 2>/dev/null >"$dest/closure" || true
if grep 'not found' "$dest/closure" | grep -v 'libcuda\.so' >&2; then
    echo "rootfs: libraries are missing, see above" >&2
    exit 1
fi
awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\/.*ld-/ {print $1}' "$dest/closure" | sort -u | while read -r so; do
    case $so in
    */libcuda.so*) ;;
    */ld-linux*) place "$so" ;;
    *) cp -L "$so" "$dest$lib/" ;; # where the loader looks without a cache
    esac
done
rm "$dest/closure"

# Where the packages' files came from: before strip changes them.
"$here/sbom.sh" "$variant" "$dest" "$cuda"

find "$dest" -type f \( -name '*.so*' -o -path '*/bin/*' \) ! -name 'libcublas*' ! -name 'libnccl*' -exec strip --strip-unneeded {} + 2>/dev/null
cp "$here/../../LICENSE" "$dest/usr/share/doc/tandem-license"
printf '%s\n' 'root:x:0:0::/:/sbin/nologin' 'tandem:x:65532:65532::/tmp:/sbin/nologin' >"$dest/etc/passwd"
printf '%s\n' 'root:x:0:' 'tandem:x:65532:' >"$dest/etc/group"
echo 'hosts: files dns' >"$dest/etc/nsswitch.conf"
cp /etc/debian_version "$dest/etc/" # NVIDIA's runtime looks at it to find the folder of libraries
if [ "$variant" = host ]; then
    mkdir "$dest/models/demo"
    cp "$model"/{config,tokenizer,tokenizer_config,generation_config}.json "$model/model.safetensors" "$dest/models/demo/"
fi
find "$dest" -type d -exec chmod a+rx {} +
find "$dest" -type f -exec chmod a+r {} +
echo "rootfs: $variant: $(du -sm "$dest" | cut -f1) MB in $dest"
