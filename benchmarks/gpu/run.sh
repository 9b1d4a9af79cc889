#!/usr/bin/env bash
# Runs parts of the GPU measurements, each under two minutes on one H100; what is measured already is not measured again.
#
#   bash benchmarks/gpu/run.sh tests step           # on a machine with a GPU, with or without an environment of ours
#   bash benchmarks/gpu/run.sh --dry all            # every part, tiny, on the CPU
#   bash benchmarks/gpu/run.sh train --seconds 200  # options after the parts go to each of them
#   bash benchmarks/gpu/run.sh tests memory --together    # at the same time: parts that measure no times
#
# Parts: tests, step, profile, memory, train, pretrain, all. Results go to $OUT (default runs/gpu), one JSON file a part.
# What pack.sh gathered is used where it is: wheels of packages that are missing here, the halves of SmolLM2's weights.
# PYTHON names the interpreter (default python3), PACK the folder of pack.sh (default .gpu_pack).
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root" || exit 1
python="${PYTHON:-python3}"
pack="${PACK:-.gpu_pack}"
work="runs/gpu_work"
export OUT="${OUT:-$root/runs/gpu}"
all=(tests step profile memory pretrain train)
started=$SECONDS

say() { echo "gpu: $*"; }
fail() { echo "gpu: $*" >&2; exit 2; }

parts=() options=() together=
while (($#)); do
    case "$1" in
        all) parts+=("${all[@]}") ;;
        tests | step | profile | memory | pretrain | train) parts+=("$1") ;;
        --together) together=1 ;;
        --*) options+=("$1") ;;
        *) ((${#options[@]})) || fail "$1: no such part. Choose of ${all[*]}, all."; options+=("$1") ;;
    esac
    shift
done
((${#parts[@]})) || fail "no part named. Choose of ${all[*]}, all."

mkdir -p "$work" "$OUT"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1
export TORCHINDUCTOR_COMPILE_THREADS=1    # else a worker a core imports torch beside what is measured
export TORCHINDUCTOR_CACHE_DIR="$root/$work/inductor" TRITON_CACHE_DIR="$root/$work/triton"
[[ " ${options[*]-} " == *" --dry "* ]] && export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu

# Wheels that were carried, where something is missing; into a folder of their own, once as long as the machine is kept.
shopt -s nullglob
add_wheels() {  # add_wheels FOLDER
    local wheels=("$pack/$1"/*.whl) site
    ((${#wheels[@]})) || return 0
    site="$root/$work/site-$1-$(cat "${wheels[@]}" | cksum | cut -d' ' -f1)"
    if [[ ! -d "$site" ]]; then
        rm -rf "$site.part"
        "$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-index --no-deps \
            --no-compile --no-cache-dir --target "$site.part" "${wheels[@]}" || fail "the wheels cannot be installed"
        mv "$site.part" "$site"
        say "$1: ${#wheels[@]} installed after $((SECONDS - started)) s"
    fi
    export PYTHONPATH="$site:$PYTHONPATH"
}
if ! "$python" -m benchmarks.gpu.requirements > /dev/null 2>&1; then
    add_wheels wheels
    "$python" -m benchmarks.gpu.requirements || say "continuing all the same"
fi
"$python" -c 'import importlib.util as util, sys; sys.exit(util.find_spec("datasets") is None)' || add_wheels wheels_hub

# SmolLM2's weights, where both halves are here.
halves=("$pack"/smollm2_?/weights.part?)
if ((${#halves[@]})) && [[ ! -d "$work/smollm2" ]]; then
    begun=$SECONDS
    rm -rf "$work/packed" && mkdir -p "$work/packed"
    cat "${halves[@]}" > "$work/packed/weights.safetensors"
    if [[ "$(sha256sum < "$work/packed/weights.safetensors")" == "$(cat "$pack/data/weights.sha256" 2>/dev/null)" ]]; then
        tar xzf "$pack/data/smollm2.tar.gz" -C "$work/packed"
        "$python" -m benchmarks.gpu.weights unpack "$work/packed" "$work/smollm2" &&
            say "weights unpacked in $((SECONDS - begun)) s"
    else
        say "weights: ${#halves[@]} of 2 halves here, or data/ is missing; carry the other one to this machine too"
    fi
    rm -rf "$work/packed"
fi

run_part() {    # run_part PART
    local part="$1" module="$1" begun=$SECONDS extra=() code
    [[ "$part" == profile ]] && module=step extra=(--profile)
    timeout -k 5 "${LIMIT:-170}" "$python" -W ignore -m "benchmarks.gpu.$module" "${extra[@]}" "${options[@]}"
    code=$?
    say "$part: $((SECONDS - begun)) s, exit code $code"
    return $code
}
status=0
running=()
for part in "${parts[@]}"; do
    if [[ "$together" ]]; then
        run_part "$part" &
        running+=($!)
    else
        run_part "$part" || status=1
    fi
done
for process in "${running[@]}"; do
    wait "$process" || status=1
done
say "$((SECONDS - started)) s in all, results in $OUT"
exit $status
