#!/usr/bin/env bash
# Trains on several machines with DeepSpeed's launcher: one recipe, the hosts of a hostfile, every slot one rank.
#
#   bash launch/multinode.sh HOSTFILE RECIPE [key=value ...]    # changes to the recipe, as finetune/train.py takes them
#   bash launch/multinode.sh hostfile finetune/recipes/demo.yaml steps=100 output_dir=runs/first
#
# A hostfile has one line per machine, "HOST slots=N": N ranks on HOST, one per GPU; # starts a comment.
# Every machine needs this repository with its .venv, the data and the model under the same paths, and a folder
# output_dir that all of them share. With pdsh, ssh must reach every host without a password. May be set:
#
#   SCRIPT         what to run with RECIPE and its changes (default: finetune/train.py)
#   LAUNCHER       pdsh (default), openmpi or slurm
#   LAUNCHER_ARGS  further arguments of pdsh, mpirun or srun, for example "-k": pdsh then ends all hosts when one fails
#   MASTER_ADDR    address of the first host as the others see it (default: pdsh asks it, else its name)
#   MASTER_PORT    default 29500
#   SSH_PORT       where ssh listens, if not at 22 (pdsh)
#   EXPORT         names of further variables to pass on, for example "HF_DATASETS_CACHE MY_VARIABLE"
#
# Passed on to every rank where set here: DS_*, HF_*, TOKENIZERS_*, TRANSFORMERS_*, OMP_*, NCCL_*, GLOO_*, TORCH_*,
# CUDA_HOME, CUDA_DEVICE_MAX_CONNECTIONS (not tokens and keys: they would show in the list of processes), and the lines
# NAME=VALUE of .deepspeed_env here and in the home folder.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
script="${SCRIPT:-$root/finetune/train.py}"
launcher="${LAUNCHER:-pdsh}"
port="${MASTER_PORT:-29500}"

say() { echo "multinode: $*"; }
fail() { echo "multinode: $*" >&2; exit 2; }
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

if [[ "${1-}" == "-h" || "${1-}" == "--help" ]]; then usage; exit 0; fi
[[ $# -ge 2 ]] || fail "give HOSTFILE RECIPE [key=value ...]; --help says more"
hostfile="$1" recipe="$2"
shift 2

# DeepSpeed itself would train on this machine alone if the hostfile were missing, and accept zero slots.
[[ -f "$hostfile" ]] || fail "$hostfile: no such hostfile. Write one line per machine: HOST slots=N"
declare -A line_of=()
hosts=() ranks=0 number=0
while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    line="${line%$'\r'}"
    [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]] && continue
    where="$hostfile, line $number: '$line'"
    [[ "$line" =~ ^[[:space:]]*([^[:space:]#]+)[[:space:]]+slots=([0-9]+)[[:space:]]*(#.*)?$ ]] ||
        fail "$where: write HOST slots=N, for example worker-1 slots=8"
    host="${BASH_REMATCH[1]}" slots="$((10#${BASH_REMATCH[2]}))"
    [[ "$slots" -ge 1 ]] || fail "$where: no slots. Write how many ranks the host takes, or remove the line"
    [[ -z "${line_of[$host]-}" ]] || fail "$where: $host is on line ${line_of[$host]} already. Give a host one line"
    line_of[$host]="$number"
    [[ "$launcher" != slurm || $((slots * ${#hosts[@]})) -eq "$ranks" ]] ||
        fail "$where: Slurm takes the same number of slots on every host"
    hosts+=("$host")
    ranks=$((ranks + slots))
done < "$hostfile"
[[ ${#hosts[@]} -ge 1 ]] || fail "$hostfile: no hosts. Write one line per machine: HOST slots=N"

[[ -f "$recipe" ]] || fail "$recipe: no such recipe"
[[ -f "$script" ]] || fail "SCRIPT=$script: no such file"
for change in "$@"; do
    [[ "$change" == *=* ]] || fail "'$change': changes to the recipe are written key=value"
done
[[ "$port" =~ ^[0-9]+$ ]] || fail "MASTER_PORT=$port: not a number"
needed() { command -v "$1" > /dev/null || fail "LAUNCHER=$launcher: $1 is not installed. $2"; }
case "$launcher" in
    pdsh) needed pdsh "On Debian and Ubuntu: apt-get install pdsh" ;;
    openmpi) needed ompi_info "On Debian and Ubuntu: apt-get install openmpi-bin" ;;
    slurm)
        needed srun "Run this in an allocation of a Slurm cluster"
        needed sinfo "DeepSpeed looks for it; run this where Slurm's commands are installed"
        ;;
    *) fail "LAUNCHER=$launcher: unknown. Choose pdsh, openmpi or slurm" ;;
esac

# The remote shell reads these words once more, and would split them.
if [[ "$launcher" == pdsh ]]; then
    for place in "$PWD" "$root" "$script"; do
        [[ "$(printf '%q' "$place")" == "$place" ]] ||
            fail "'$place': pdsh starts ranks under paths without blanks and signs of the shell only. Rename it"
    done
fi

bash "$root/launch/setup.sh"

# Every host is asked before the first rank starts: one that is missing would leave the others waiting for it.
if [[ "$launcher" == pdsh ]]; then
    wanted="$root/.venv, $PWD, $recipe or $script"
    printf -v look 'cd %q && test -x %q && test -f %q && test -f %q' "$PWD" "$root/.venv/bin/python" "$recipe" "$script"
    unready=""
    for host in "${hosts[@]}"; do
        status=0
        ssh -n -o BatchMode=yes -o ConnectTimeout=15 ${SSH_PORT:+-p "$SSH_PORT"} "$host" "$look" || status=$?
        case "$status" in
            0) ;;
            255) unready+=$'\n'"  $host (line ${line_of[$host]}): not reached by ssh without a password" ;;
            *) unready+=$'\n'"  $host (line ${line_of[$host]}): not there: $wanted" ;;
        esac
    done
    [[ -z "$unready" ]] || fail "$hostfile: hosts that are not ready:$unready"
fi
export PATH="$root/.venv/bin:$PATH" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"

# Ranks on other machines see only what the launcher passes on: the lines of this file.
passed_on="$(mktemp)"
trap 'rm -f "$passed_on"' EXIT
for file in ~/.deepspeed_env .deepspeed_env; do
    if [[ -f "$file" ]]; then grep -E '^[[:space:]]*[A-Za-z_][A-Za-z_0-9]*=' "$file" >> "$passed_on" || true; fi
done
while IFS= read -r name; do
    case "$name" in *TOKEN | *KEY | *SECRET | *PASSWORD | DS_ENV_FILE) continue ;; esac
    echo "$name=${!name}" >> "$passed_on"
done < <(compgen -e | grep -E \
    '^((DS|HF|TOKENIZERS|TRANSFORMERS|OMP|NCCL|GLOO|TORCH)_.*|CUDA_HOME|CUDA_DEVICE_MAX_CONNECTIONS)$' || true)
for name in ${EXPORT-}; do
    [[ "$name" =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] || fail "EXPORT: '$name' is not the name of a variable"
    [[ -n "${!name+set}" ]] || fail "EXPORT: $name is not set"
    echo "$name=${!name}" >> "$passed_on"
done

options=(-q --hostfile "$hostfile" --force_multi --no_ssh_check --launcher "$launcher" --master_port "$port")
options+=("--launcher_args=${LAUNCHER_ARGS-}")
arguments=("$recipe" "$@")
if [[ "$launcher" == pdsh ]]; then
    if [[ -n "${MASTER_ADDR-}" ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
    if [[ -n "${SSH_PORT-}" ]]; then options+=(--ssh_port "$SSH_PORT"); fi
    # The remote shell reads the command once more. DeepSpeed quotes arguments with a blank, and nothing else.
    for index in "${!arguments[@]}"; do
        argument="${arguments[index]}"
        if [[ "$argument" == *" "* ]]; then
            argument="${argument//\\/\\\\}" argument="${argument//\$/\\\$}" argument="${argument//\`/\\\`}"
        else
            argument="$(printf '%q' "$argument")"
        fi
        arguments[index]="$argument"
    done
else
    # These start the ranks themselves: colm_ds reads rank and number of ranks from their variables.
    address="${MASTER_ADDR-${hosts[0]}}"
    printf 'MASTER_ADDR=%s\nMASTER_PORT=%s\n' "$address" "$port" >> "$passed_on"
    export MASTER_ADDR="$address" MASTER_PORT="$port"
    options+=(--master_addr "$address")
    if [[ "$launcher" == slurm ]]; then options+=(--num_nodes "${#hosts[@]}"); fi
fi

say "$ranks ranks on ${hosts[*]}, launched by $launcher"
DS_ENV_FILE="$passed_on" deepspeed "${options[@]}" "$script" "${arguments[@]}"
