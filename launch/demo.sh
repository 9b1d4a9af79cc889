#!/usr/bin/env bash
# The main job in minutes: CoLM against plain training under the deepspeed launcher, ending in a table and a report.
#
#   bash launch/demo.sh                      # about 7 minutes on 2 cores after the installation
#   bash launch/demo.sh steps=60             # changes to the recipe, as finetune/train.py takes them
#
# Six arms on a small mixture that the project makes itself. At the price of plain 32: plain training on b = 32, 32 of 128
# chosen by token embeddings, and plain training on 64 for half the steps. Dearer: small sources kept and the rest of 32
# at random (the control) beside the paper's CoLM on 32 of 64, and plain training on r = 64. Two ranks on a CPU machine,
# all GPUs where there are some. RANKS, MASTER_PORT and OUT (default runs/demo) may be set.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

out="${OUT:-runs/demo}"
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$gpus" == 0 ]]; then export DS_ACCELERATOR=cpu; fi
ranks="${RANKS:-$((gpus > 0 ? gpus : 2))}"
port="${MASTER_PORT:-29617}"

say() { echo "demo: $*"; }

say "writing the mixture to $out/data"
python -m colm_ds.data.generated "$out/data"

arm() {     # arm FOLDER NAME key=value ...
    local folder="$1" name="$2"
    shift 2
    say "$name, $ranks ranks"
    deepspeed -q --num_gpus "$ranks" --master_port "$port" finetune/train.py finetune/recipes/demo.yaml \
        "name=$name" "output_dir=$out/$folder" "tokenizer=$out/data/tokenizer" \
        "data.train=$out/data/train.jsonl" "data.heldout=$out/data/heldout.jsonl" "$@"
}

steps="$(printf '%s\n' "$(sed -n 's/^steps: //p' finetune/recipes/demo.yaml)" "$@" | sed -n 's/^\(steps=\)\?\([0-9][0-9]*\)$/\2/p' | tail -1)"
half=$(((steps + 1) / 2))

start=$SECONDS
arm plain_b "plain 32" colm.selector=full colm.large_batch_size=32 colm.coreset_size=32 "$@"
arm tokens "tokens 32 of 128" "colm={large_batch_size: 128, coreset_size: 32, probe: {estimator: tokens}}" "$@"
arm plain_half "plain 64, half the steps" colm.selector=full colm.large_batch_size=64 colm.coreset_size=64 "$@" \
    "steps=$half"
arm keep "keep small + random" colm.selector=keep_random "$@"
arm colm "CoLM 32 of 64" "$@"
arm plain_r "plain 64" colm.selector=full colm.large_batch_size=64 colm.coreset_size=64 "$@"

say "comparing"
colm-ds report "$out"/{plain_b,tokens,plain_half,keep,colm,plain_r} --out "$out"
say "done in $((SECONDS - start)) s; open $out/report.html"
