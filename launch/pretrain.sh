#!/usr/bin/env bash
# Pretraining in one go: prepares the token store, trains, evaluates and writes a report with perplexity by source.
#
#   bash launch/pretrain.sh                                     # the demo: about 3 minutes on 2 cores, no data needed
#   bash launch/pretrain.sh [RECIPE] [key=value ...]            # another recipe; changes to it, in any order
#   DATA="PILE_FOLDER more.jsonl.zst" bash launch/pretrain.sh pretrain/recipes/cpu_pile5.yaml steps=100
#
# The same command a second time skips what is finished and resumes what is not. The run's folder (output_dir) then
# holds report.html and evaluation/results.md. May be set:
#
#   DATA         files and folders in the Pile's format; not needed for generated sources or once the store is made
#   QUESTIONS    folder with WiC, COPA and SQuAD, as docs/EVALUATION.md lays it out (default: perplexity only)
#   RANKS        ranks (default: one per GPU, two without any)
#   MEGABYTES    of generated text (default: 4)
#   MASTER_PORT  default 29650
set -euo pipefail

fail() { echo "pretrain: $*" >&2; exit 2; }

if [[ "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
recipe="$root/pretrain/recipes/demo.yaml"
given=() changes=()
for word in "$@"; do
    if [[ "$word" == *=* && ! -f "$word" ]]; then changes+=("$word"); else given+=("$word"); fi
done
(( ${#given[@]} <= 1 )) || fail "'${given[1]}': one recipe at a time; changes to it are written key=value"
if (( ${#given[@]} )); then
    [[ -f "${given[0]}" ]] || fail "${given[0]}: no such recipe; changes to one are written key=value"
    recipe="$(realpath "${given[0]}")"
fi

options=(--port "${MASTER_PORT:-29650}" --megabytes "${MEGABYTES:-4}")
[[ -z "${RANKS-}" ]] || options+=(--num-gpus "$RANKS")
[[ -z "${QUESTIONS-}" ]] || options+=(--questions "$QUESTIONS")
if [[ -n "${DATA-}" ]]; then
    read -rd '' -a given <<< "$DATA" || true    # of several lines, too
    for place in "${given[@]}"; do
        [[ -e "$place" ]] || fail "DATA: $place: no such file or folder"
    done
    options+=(--data "${given[@]}")
fi

recipe="${recipe#"$PWD"/}"     # as in the commands of the report
bash "$root/launch/setup.sh"
export PATH="$root/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
if [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 0 ]]; then export DS_ACCELERATOR=cpu; fi
exec colm-ds pretrain "$recipe" ${changes[@]+"${changes[@]}"} "${options[@]}"
