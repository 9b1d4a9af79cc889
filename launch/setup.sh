#!/usr/bin/env bash
# Makes the Python environment .venv in the repository root and installs colm_ds with its test tools into it.
#
#   bash launch/setup.sh                     # from any directory: minutes the first time, at once when all is there
#   PYTHON=python3.12 bash launch/setup.sh   # the interpreter to make .venv with (default: python3)
#   TORCH_INDEX=URL bash launch/setup.sh     # take torch from another package index, for a build for your CUDA version
#
# No C++ compiler and no CUDA toolkit is needed: DeepSpeed builds its extensions when they are first used, colm_ds
# switches off the one that would be built at start-up (shm_comm), and "torch_adam": true avoids the fused Adam.
set -euo pipefail

torch_pin="torch==2.13.0"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/colm_ds_setup"     # written last: what the environment was made from, and where

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

checksum="$(cat "$root/pyproject.toml" "$root/launch/setup.sh" | cksum)"
made_from="" made_in=""
if [[ -f "$stamp" ]]; then { read -r made_from && read -r made_in; } < "$stamp" || true; fi
if [[ -x "$python" && "$made_from" == "$checksum" && "$made_in" == "$root" ]]; then
    say ".venv is up to date"
    exit 0
fi

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$1 is $("$1" --version 2>&1), but colm_ds needs 3.11 or newer. $2"
}

# A moved environment (its scripts name the old path) or one without a working pip is recreated; behind a link it may be
# another clone's, and stays as it is.
if [[ -n "$made_in" && "$made_in" != "$root" ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
    [[ ! -L "$venv" ]] || fail ".venv is a link to $(readlink "$venv"), which holds no environment of this folder. Remove the
       link and run it again to make one here, or start programs with that environment's own python."
    base="${PYTHON:-python3}"
    command -v "$base" >/dev/null || fail "$base is not installed. colm_ds needs Python 3.11 or newer."
    check_version "$base" "Name another one: PYTHON=python3.12 bash launch/setup.sh"
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        fail "$base cannot make environments with pip. On Debian and Ubuntu: apt-get install python$version-venv"
    fi
    say "making .venv with $("$base" --version)"
    "$base" -m venv --clear "$venv"
else
    check_version "$python" "Delete .venv, then: PYTHON=python3.12 bash launch/setup.sh"
fi
rm -f "$stamp"

# Bytecode is made when a module is first imported: to compile all that is installed would take a third of the time, and most
# of it is never imported.
unset PYTHONDONTWRITEBYTECODE
install() { "$python" -m pip install -qq --no-input --disable-pip-version-check --no-compile "$@"; }
retry="Run it again once the cause is gone; what is installed already stays."

# torch goes first and stays: a later package must not bring another build of it (CUDA over CPU, say).
say "installing $torch_pin (a large download the first time)"
install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch_pin" || fail "installing $torch_pin failed. $retry"
if nvidia-smi -L >/dev/null 2>&1; then
    # On Linux the default build is the one for CUDA, but an index, or an earlier installation, may bring the CPU's.
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        fail "this machine has an NVIDIA GPU, and torch was installed without CUDA. Delete .venv, and name an index with
       CUDA builds of torch: TORCH_INDEX=URL bash launch/setup.sh"
fi
constraint="$venv/torch_constraint.txt"
echo "$torch_pin" > "$constraint"
say "installing colm_ds, editable, with its test tools"
(cd "$root" && install --constraint "$constraint" --editable ".[test]") || fail "installing colm_ds failed. $retry"

# Also for those whose programs may not write bytecode (PYTHONDONTWRITEBYTECODE): what a training run imports is compiled here.
say "checking that the main packages import"
quiet="import logging; logging.disable(logging.WARNING)"    # advice of bitsandbytes and DeepSpeed at import
modules="torch, torch._dynamo, transformers.models.llama.modeling_llama, peft, datasets, deepspeed, matplotlib.pyplot, pytest"
ours="colm_ds.training.run, colm_ds.report, colm_ds.check, colm_ds.planner.plan"
(cd "$root" && "$python" -W ignore -c "$quiet; import $modules; import $ours") >/dev/null ||
    fail "a package does not import. Delete .venv and run it again."
"$python" -c "import deepspeed.runtime.zero.muon.muon_optimizer" >/dev/null 2>&1 || true    # DeepSpeed's, with every optimizer

printf '%s\n%s\n' "$checksum" "$root" > "$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
