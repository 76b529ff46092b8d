#!/usr/bin/env bash
# bundle.sh BIN_DIR DEST [SHARE_DIR]: a folder that runs where nothing can be installed; README.md says what is in it. BIN_DIR
# holds the built programs. `cmake --build DIR --target bundle` calls this.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 2 ] || { echo "usage: bundle.sh BIN_DIR DEST [SHARE_DIR]" >&2; exit 2; }
bin=$1 dest=$2 share=${3:-}
lib_dir=/usr/lib/$(gcc -print-multiarch)
mca=$lib_dir/openmpi/lib/openmpi3
[ -d "$mca" ] || { echo "bundle: $mca is not there: install libopenmpi-dev and openmpi-bin" >&2; exit 1; }

rm -rf "$dest"
mkdir -p "$dest"/{bin,lib,share} "$dest/ompi"/{bin,etc,mca,share} "$dest/pmix"/{lib,share}
cp "$bin"/tandem "$bin"/tandem-coordinator "$bin"/tandem-worker "$dest/bin/"
[ ! -f "$bin/backend_cuda.so" ] || cp "$bin/backend_cuda.so" "$dest/bin/"
[ -z "$share" ] || cp -r "$share/." "$dest/share/"

# Open MPI: its launcher and, of its parts, those for processes of one machine or of several joined by TCP.
cp -L /usr/bin/orterun "$dest/ompi/bin/mpirun"
cp -L /usr/bin/orted "$dest/ompi/bin/orted"
for part in "$mca"/mca_*.so; do
    case ${part##*/} in
    *ofi* | *psm* | *ucx* | *openib* | *usnic* | *flux* | *jsm* | *slurm* | *romio* | *monitoring* | *spml* | *sshmem* | *memheap* | \
        *scoll* | *atomic* | mca_btl_sm.so) ;;
    *) cp -L "$part" "$dest/ompi/mca/" ;;
    esac
done
cp -rL /usr/share/openmpi "$dest/ompi/share/"
printf '%s\n' 'btl = self,vader,tcp' 'pml = ob1' 'mtl = ^ofi' 'osc = ^ucx' >"$dest/ompi/etc/openmpi-mca-params.conf"
cp -L "$lib_dir"/pmix2/lib/pmix/*zlib.so "$lib_dir"/pmix2/lib/pmix/*default.so "$dest/pmix/lib/"
[ ! -d "$lib_dir/pmix2/share/pmix" ] || cp -rL "$lib_dir/pmix2/share/pmix" "$dest/pmix/share/"

# What they need, all but the C library (a host's own must not be older) and what comes with CUDA.
find "$dest" -type f \( -name '*.so' -o -path '*/bin/*' \) -print0 | xargs -0 -n 1 ldd 2>/dev/null |
    awk '/=> \//{print $3}' | sort -u |
    { grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|libutil|libcublas[A-Za-z]*|libcuda|ld-linux[^/]*)\.so' || true; } |
    while read -r so; do cp -L "$so" "$dest/lib/"; done
find "$dest" -type f -name '*.so*' -exec strip --strip-unneeded {} +
strip "$dest"/bin/tandem* "$dest"/ompi/bin/*

for name in tandem tandem-coordinator tandem-worker mpirun; do
    cp "$here/start.sh" "$dest/$name"
done
cp "$here/check.sh" "$dest/check"
chmod 755 "$dest"/tandem* "$dest/mpirun" "$dest/check"
cp "$here/README.md" "$here/../../LICENSE" "$dest/"
echo "bundle: $(du -sh "$dest" | cut -f1) in $dest; C library needed: $(
    find "$dest" -type f -name '*.so*' -exec objdump -T {} + 2>/dev/null | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -n 1)"
