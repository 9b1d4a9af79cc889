#!/usr/bin/env bash
# Runs every check: set-up of .venv, ruff (lint and format), mypy, the documentation's links, pytest. Fails if one fails, but runs them all.
#
#   bash launch/test.sh                      # what continuous integration runs
#   bash launch/test.sh -k quotas            # further arguments go to pytest; paths count from the repository root
#   bash launch/test.sh -m "slow or not slow"   # also the slow tests
#   WORKERS=0 bash launch/test.sh            # in one process; default: a worker per core, 4 at most
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root" || exit 1
bash launch/setup.sh || exit 1

export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # many small operations: more threads only wait for each other
export TOKENIZERS_PARALLELISM=false              # the tests fork; a forked thread pool can hang
export HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE                    # hundreds of processes import the same modules

# DeepSpeed leaves 66 MiB shared-memory files behind. Remove those that appear from here on, even if pytest is killed.
list_buffers() { find /dev/shm -maxdepth 1 -name 'deepspeed_allreduce_buffer_*' -user "$(id -u)" 2>/dev/null | sort; }
buffers_before="$(list_buffers)"
remove_new_buffers() { comm -13 <(echo "$buffers_before") <(list_buffers) | while read -r file; do rm -f "$file"; done; }
trap remove_new_buffers EXIT

failed=()
check() {
    local name="$1"
    shift
    echo "test: $name"
    "$@" || failed+=("$name")
}

check "ruff check" python -m ruff check .
check "ruff format --check" python -m ruff format --check .

typed_folders=()
for folder in colm_ds finetune pretrain; do
    [[ -d "$folder" && -n "$(find "$folder" -name '*.py' -print -quit)" ]] && typed_folders+=("$folder")
done

check "mkdocs build --strict" env NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet --strict --site-dir "$(mktemp -d)"

# mypy takes more than a minute of one core: it runs beside pytest.
types="$(mktemp -d)"
(
    code=0
    [[ ${#typed_folders[@]} -eq 0 ]] || python -m mypy "${typed_folders[@]}" > "$types/said" 2>&1 || code=$?
    echo "$code" > "$types/part" && mv "$types/part" "$types/code"
) &
export COLM_DS_TYPES="$types"

# Last, so that its summary line closes the output; tests/conftest.py names the failed checks just above that line, for
# which it waits for mypy.
echo "test: pytest $*"
export COLM_DS_FAILED_CHECKS
COLM_DS_FAILED_CHECKS="$(IFS=,; echo "${failed[*]-}")"
cores="$(env -u OMP_NUM_THREADS nproc)"   # which would be taken for the number of cores
workers="${WORKERS:-$((cores < 4 ? cores : 4))}"   # each with process pools of its own: 4 GiB
python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations=10 --durations-min=5 "$@"
status=$?
wait
[[ "$(cat "$types/code")" == 0 ]] || failed+=("mypy")
[[ $status -eq 0 && ${#failed[@]} -gt 0 ]] && status=1
exit "$status"
