#!/bin/sh
# Runs bin/NAME (or ompi/bin/NAME) of the bundle that this file, called NAME, stands in. Every path follows the file itself.
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd) || exit 1
name=${0##*/}
# For the CUDA back end: cuBLASLt of CUDA 13, wherever a host has it.
cuda=${TANDEM_CUDA_LIBRARIES:-}
if [ -z "$cuda" ] && [ -f "$here/bin/backend_cuda.so" ]; then
    for d in /usr/local/cuda/lib64 /usr/local/cuda-13*/lib64 /usr/lib/x86_64-linux-gnu /usr/lib/*/nvidia/*/lib \
        /usr/local/lib/python3*/*-packages/nvidia/cu13/lib /opt/*/lib/python3*/site-packages/nvidia/cu13/lib \
        /opt/*/.venv/lib/python3*/site-packages/nvidia/cu13/lib; do
        if [ -e "$d/libcublasLt.so.13" ]; then
            cuda=$d
            break
        fi
    done
fi
# /usr/lib itself is searched anyway; in front of ours it would hide what is in ours
[ "$cuda" != /usr/lib/x86_64-linux-gnu ] || cuda=
# For several GPUs: NCCL. Without it ranks of one host are joined by their GPUs' memory alone.
nccl=
if [ -f "$here/bin/backend_cuda.so" ]; then
    for d in /usr/local/cuda/lib64 /usr/local/lib/python3*/*-packages/nvidia/nccl/lib /opt/*/lib/python3*/site-packages/nvidia/nccl/lib \
        /opt/*/.venv/lib/python3*/site-packages/nvidia/nccl/lib; do
        if [ -e "$d/libnccl.so.2" ]; then
            nccl=$d
            break
        fi
    done
fi
export LD_LIBRARY_PATH="$here/lib${cuda:+:$cuda}${nccl:+:$nccl}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PATH="$here/ompi/bin:${PATH:-/usr/bin:/bin}"
export OPAL_PREFIX="$here/ompi" OPAL_LIBDIR="$here/lib" OPAL_PKGLIBDIR="$here/ompi/mca" OPAL_SYSCONFDIR="$here/ompi/etc"
export OPAL_DATADIR="$here/ompi/share" OPAL_PKGDATADIR="$here/ompi/share/openmpi"
export OMPI_MCA_mca_base_component_path="$here/ompi/mca"
export PMIX_PREFIX="$here/pmix" PMIX_INSTALL_PREFIX="$here/pmix" PMIX_LIBDIR="$here/lib" PMIX_PKGLIBDIR="$here/pmix/lib"
if ! command -v ssh >/dev/null 2>&1; then
    export OMPI_MCA_plm="${OMPI_MCA_plm:-isolated}" # mpirun wants ssh, even for ranks beside itself
fi
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
[ "$name" = mpirun ] && exec "$here/ompi/bin/mpirun" "$@"
exec "$here/bin/$name" "$@"
