#!/usr/bin/env bash
# Trains through the door of another framework, in an environment of its own: whole, resumed, and on two ranks.
#
#   bash launch/doors/run.sh llamafactory             # or axolotl, or trl: minutes and up to 6 GB for the environment
#   PYTHON=python3.12 bash launch/doors/run.sh axolotl   # the interpreter to make the environment with (default: python3)
#   FOLDER=DIR bash launch/doors/run.sh trl           # default: runs/doors/NAME
#   PACKAGES="axolotl==0.19.0" bash launch/doors/run.sh axolotl   # other versions
#
# A tiny random model on generated rows of three data sets, on the CPU: 4 steps of 8 out of 16 with a checkpoint after 2, the
# last 2 again from that checkpoint (the same weights), and the 4 steps on two ranks (the same up to round-off; not with
# axolotl, which wants a GPU for each of several ranks).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
name="${1:-}"
case "$name" in
    llamafactory) packages="llamafactory==0.9.5 torchvision torchaudio" ;;
    axolotl) packages="axolotl==0.21.0" ;;
    trl) packages="trl==1.16.0 peft" ;;
    *) echo "doors: NAME ${name:-is missing}: write llamafactory, axolotl or trl" >&2; exit 2 ;;
esac
folder="${FOLDER:-$root/runs/doors/$name}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd -P)"
python="$folder/environment/bin/python"
wanted="${PACKAGES:-$packages}" stamp="$folder/environment/colm_ds_packages"     # written last
if [[ ! -x "$python" || ! -f "$stamp" || "$(< "$stamp")" != "$wanted" ]]; then
    rm -f "$stamp"
    [[ -x "$python" ]] || "${PYTHON:-python3}" -m venv "$folder/environment"
    # Their own bounds decide about transformers. Ours are for the recipes, so colm_ds itself is not installed.
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet torch==2.13.0 "deepspeed>=0.18.6" scipy rich $wanted
    echo "$wanted" > "$stamp"
fi

export PYTHONPATH="$root" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
export HF_HOME="$folder/cache" TOKENIZERS_PARALLELISM=false AXOLOTL_DO_NOT_TRACK=1
cd "$folder"
rm -rf whole rest two prepared
"$python" "$root/launch/doors/door.py" write "$name"

# train CONFIG RANKS
train() {
    local ranks=("$python" -m)
    [[ "$2" == 1 ]] || ranks=("$python" -m torch.distributed.run --nproc_per_node "$2" --master_port "${MASTER_PORT:-29541}" -m)
    case "$name" in
        llamafactory) "${ranks[@]}" colm_ds.integrations.llamafactory train "$1.yaml" ;;
        axolotl) "${ranks[@]}" axolotl.cli.train "$1.yaml" ;;
        trl) "${ranks[@]}" colm_ds.integrations.trl sft --config "$1.yaml" ;;
    esac > "$1.log" 2>&1 || { tail -n 30 "$1.log" >&2; echo "doors: $name failed, see $folder/$1.log" >&2; exit 1; }
}

train whole 1
train rest 1
[[ "$name" == axolotl ]] || train two 2
"$python" "$root/launch/doors/door.py" compare "$name"
