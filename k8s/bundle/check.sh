#!/bin/sh
# check [DIR]: whether every library that the bundle's files need is in the bundle or part of the C library, with the
# loader's path naming the bundle alone; cuBLASLt is told apart. Exits 1 and lists what is missing.
dir=${1:-$(cd "$(dirname "$0")" && pwd)}
if [ ! -d "$dir/bin" ] || [ ! -d "$dir/lib" ]; then
    echo "check: $dir is no bundle" >&2
    exit 2
fi
bad=$(find "$dir" -type f \( -name '*.so*' -o -path '*/bin/*' \) | while read -r file; do
    env -i PATH=/usr/bin:/bin LD_LIBRARY_PATH="$dir/lib" ldd "$file" 2>/dev/null | while read -r name arrow path _; do
        case $arrow$path in
        '=>not') echo "$file: $name is missing" ;;
        '=>'*) case $path in
            "$dir"/*) ;;
            *) case $name in
                libc.so* | libm.so* | libpthread.so* | libdl.so* | librt.so* | libresolv.so* | libutil.so*) ;;
                *) echo "$file: $name is taken from $path" ;;
                esac ;;
            esac ;;
        esac
    done
done | sort -u)
cublas=$(printf '%s\n' "$bad" | grep libcublas | head -n 1)
bad=$(printf '%s\n' "$bad" | grep -v libcublas)
[ -z "$cublas" ] || echo "not in the bundle, needed for --backend cuda: cuBLASLt of CUDA 13 (see README.md)"
if [ -n "$bad" ]; then
    printf '%s\n' "$bad"
    exit 1
fi
echo "complete: $(find "$dir/lib" -type f | wc -l) libraries beside the C library"
