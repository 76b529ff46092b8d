#!/usr/bin/env bash
# sbom.sh VARIANT ROOTFS CUDA_LIB_DIR: what packages the files of ROOTFS came from, asked of dpkg: into ROOTFS/usr/share/doc
# sbom.spdx.json (SPDX 2.3), LICENSES.txt (a line a package) and the copyright file of each. Called by rootfs.sh.
set -euo pipefail
variant=$1 root=$2 cuda=$3
doc=$root/usr/share/doc
mkdir -p "$doc"
version_of_tandem=$("$root/usr/bin/tandem" --version | sed 's/.* //')
created=$(date -u -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}" +%Y-%m-%dT%H:%M:%SZ)

# "PACKAGE TAB FILE" of each file, "nobody" where dpkg knows none. Libraries stand flat in the image, and packages record
# some of theirs as /lib, others as /usr/lib: a library is known by its own name, which is asked for only once.
owners() {
    (cd "$root" && find usr etc -type f ! -path 'usr/share/doc/*') | while read -r f; do
        case $f in
        usr/bin/tandem* | usr/bin/backend_cuda.so | etc/openmpi/*) continue ;;
        usr/bin/mpirun) f=usr/bin/orterun ;;
        esac
        real=/$f
        if [ ! -e "$real" ]; then
            real=$(ldconfig -p | awk -v so="${f##*/}" '$1 == so && !n++ {print $NF}')
            [ -n "$real" ] || real=$cuda/${f##*/}
        fi
        printf '%s\n' "$real"
    done | xargs readlink -f | sed 's/^\/usr//' | sort -u >"$doc/files"
    awk -v OFS='\t' 'NR == FNR {want[$0] = 1; next}
         {f = $0; sub(/^\/usr/, "", f)}
         f in want {p = FILENAME; sub(/.*\//, "", p); sub(/\.list$/, "", p); print p, f; delete want[f]}
         END {for (f in want) print "nobody", f}' "$doc/files" /var/lib/dpkg/info/*.list
    rm "$doc/files"
}

found=$(owners)
strays=$(printf '%s\n' "$found" | awk -F'\t' '$1 == "nobody" {print $2}')
names=$(printf '%s\n' "$found" | awk -F'\t' '$1 != "nobody" {print $1}' | sed 's/, /\n/g' | sort -u)

licences_of() { # of a machine-readable copyright file; else: see the file
    local file=/usr/share/doc/$1/copyright names
    names=$(sed -n 's/^License: *//p' "$file" 2>/dev/null | sed 's/ *$//; /^$/d' | sort -u | paste -sd ';' | sed 's/;/; /g')
    printf '%s' "${names:-see copyright file}"
}

json_string() {
    local s=${1//\\/\\\\}
    printf '%s' "${s//\"/\\\"}"
}

package() { # package NAME VERSION SOURCE LICENCES
    printf '  {"SPDXID": "SPDXRef-%s", "name": "%s", "versionInfo": "%s", "sourceInfo": "%s", "downloadLocation": "NOASSERTION",\n' \
        "$(printf '%s' "$1" | tr -c 'A-Za-z0-9.-' '-')" "$(json_string "$1")" "$(json_string "$2")" "$(json_string "$3")"
    printf '   "filesAnalyzed": false, "licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION", "licenseComments": "%s", "copyrightText": "NOASSERTION"}' \
        "$(json_string "$4")"
}

: >"$doc/LICENSES.txt"
{
    printf '{"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": "tandem-%s",\n' "$variant"
    printf ' "documentNamespace": "urn:tandem:image:%s:%s",\n' "$variant" "$created"
    printf ' "creationInfo": {"created": "%s", "creators": ["Tool: k8s/image/sbom.sh"]},\n "packages": [\n' "$created"
    package tandem "$version_of_tandem" "this project" "Apache-2.0"
    echo "tandem: Apache-2.0" >>"$doc/LICENSES.txt"
    if [ "$variant" = host ]; then
        licence=${TANDEM_DEMO_MODEL:+that of the folder $TANDEM_DEMO_MODEL}
        printf ',\n'
        package tandem-demo-model "$version_of_tandem" "/models/demo" "${licence:=MIT}"
        echo "tandem-demo-model: $licence" >>"$doc/LICENSES.txt"
    fi
    # shellcheck disable=SC2016 # dpkg-query's own fields
    printf '%s\n' "$names" | xargs dpkg-query -W -f '${Package} ${Version} ${source:Package} ${source:Version}\n' | sort -u |
        while read -r p version source; do
            licences=$(licences_of "$p")
            printf ',\n'
            package "$p" "$version" "$source" "$licences"
            echo "$p $version: $licences" >>"$doc/LICENSES.txt"
            mkdir -p "$doc/$p"
            cp -L "/usr/share/doc/$p/copyright" "$doc/$p/" || echo "no copyright file in the package" >"$doc/$p/copyright"
        done
    for f in $strays; do
        case ${f##*/} in
        libcublas*) wheel=nvidia_cublas licence="NVIDIA CUDA Toolkit EULA" ;;
        libnccl*) wheel=nvidia_nccl licence="BSD-3-Clause or Apache-2.0, by version: see copyright file" ;;
        *) echo "sbom: $f: of no package" >&2; exit 1 ;;
        esac
        name=${f##*/} text=$cuda/../EULA.txt
        version=${name#*.so.} name=${name%%.so*}
        # NVIDIA's packages for pip, where the toolkit is made of those: their version says more than the library's name.
        for info in "$cuda"/../dist-info/"$wheel"*.dist-info; do
            [ -d "$info" ] || continue
            version=${info%.dist-info} text=$info/licenses/License.txt
            version=${version##*-}
        done
        printf ',\n'
        package "$name" "$version" "CUDA Toolkit, $f" "$licence"
        echo "$name $version: $licence" >>"$doc/LICENSES.txt"
        mkdir -p "$doc/$name"
        [ -e "$text" ] || { echo "sbom: $f: no licence text: expected $text" >&2; exit 1; }
        cp -L "$text" "$doc/$name/copyright"
    done
    printf '\n ],\n "relationships": [{"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": "SPDXRef-tandem"}]\n}\n'
} >"$doc/sbom.spdx.json"
