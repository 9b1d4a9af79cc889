#!/usr/bin/env bash
# The main job in minutes: CoLM against plain training under the deepspeed launcher, ending in a table and a report.
#
#   bash launch/demo.sh                      # about 8 minutes on 2 cores after the installation
#   bash launch/demo.sh steps=60             # changes to the recipe, as colm-ds train takes them
#   bash launch/demo.sh overwrite=true       # train all runs again; else finished ones are skipped
#
# Six arms on a small mixture that the project makes itself: colm-ds demo. At the price of plain 32: plain training on
# b = 32, 32 of 128 chosen by token embeddings, and plain training on 64 for half the steps. Dearer: small sources kept and
# the rest of 32 at random (the control) beside the paper's CoLM on 32 of 64, and plain training on r = 64. Two ranks on a
# CPU machine, all GPUs where there are some. RANKS, MASTER_PORT and OUT (default runs/demo) may be set.
set -euo pipefail

out="${OUT-}"
[[ -z "$out" || "$out" == /* ]] || out="$PWD/$out"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 0 ]]; then export DS_ACCELERATOR=cpu; fi

options=(--out "${out:-runs/demo}" --port "${MASTER_PORT:-29617}")
[[ -z "${RANKS-}" ]] || options+=(--num-gpus "$RANKS")
exec colm-ds demo "$@" "${options[@]}"
