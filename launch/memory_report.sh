#!/usr/bin/env bash
# Compares the memory, time and quality of plain b, CoLM b of r, tokens b of 4b and plain r, ending in a report.
#
#   bash launch/memory_report.sh RECIPE [key=value ...]              # changes to the recipe, for all arms
#   bash launch/memory_report.sh finetune/recipes/phi2_math.yaml data.train=MY_DATA.jsonl steps=20
#
# RECIPE is that of CoLM b of r. Equal accumulation steps: the micro-batch grows with the batch. Equal micro-batch: the
# number of accumulation steps grows. Plain r runs under both, then a few steps of further batch sizes for the picture of
# memory against batch size. Runs that are finished are skipped. Without a GPU two ranks train, and the allocations of
# steps 2 to 4 are counted one by one, which takes a while. May be set:
#
#   OUT          folder of runs and report (default: runs/memory_report/RECIPE's name)
#   RANKS        ranks of a run (default: one per GPU, two without any)
#   SIZES        large batch sizes of the picture, for example "64 128 256" (default: r/2, r and 2r; "" for none)
#   SIZE_STEPS   steps of the runs of further batch sizes (default: 6)
#   SCRIPT       what trains (default: finetune/train.py)
#   MASTER_PORT  default 29640
set -euo pipefail

fail() { echo "memory_report: $*" >&2; exit 2; }

if [[ "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ $# -ge 1 ]] || fail "give RECIPE [key=value ...]; --help says more"
[[ -f "$1" ]] || fail "$1: no such recipe"
for change in "${@:2}"; do
    [[ "$change" == *=* ]] || fail "'$change': changes to the recipe are written key=value"
done
recipe="$(realpath "$1")"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
recipe="${recipe#"$PWD"/}"     # as in the commands of the report
bash "$root/launch/setup.sh"
export PATH="$root/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
if [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 0 ]]; then export DS_ACCELERATOR=cpu; fi

options=(--port "${MASTER_PORT:-29640}" --size-steps "${SIZE_STEPS:-6}" --script "${SCRIPT:-$root/finetune/train.py}")
[[ -z "${OUT-}" ]] || options+=(--out "$OUT")
[[ -z "${RANKS-}" ]] || options+=(--num-gpus "$RANKS")
if [[ -n "${SIZES+set}" ]]; then
    read -rd '' -a sizes <<< "$SIZES" || true    # of several lines, too
    options+=(--sizes "${sizes[@]}")
fi
exec colm-ds memory-report "$recipe" "${@:2}" "${options[@]}"
