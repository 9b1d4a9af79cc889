"""launch/multinode.sh: what it refuses, what reaches the ranks, and a run on two "hosts" that are both this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ports import worker_port

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "finetune" / "recipes" / "demo.yaml"
PORT = str(worker_port(18))

# Stands for ssh: every host is this machine, without the caller's variables. "gone" cannot be reached.
FAKE_SSH = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do case "$1" in -o | -p | -l) shift 2 ;; *) shift ;; esac; done
host="$1"
shift
[[ "$host" != gone ]] || exit 255
exec env -i HOME="$HOME" PATH=/usr/bin:/bin AT_HOST="$host" bash -c "$*"
"""

# Stands for pdsh as DeepSpeed calls it: -S -f 1024 -w HOST,HOST [launcher arguments] COMMAND.
FAKE_PDSH = """#!/usr/bin/env bash
IFS=, read -ra hosts <<< "$5"
shift 5
node=0
for host in "${hosts[@]}"; do
    ssh "$host" "${*//%n/$node}" | sed "s/^/$host: /" &
    node=$((node + 1))
done
wait
"""

FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@"
"""

# What a rank sees, on one line.
REPORT = """import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR AT_HOST DS_NOTE MINE NOT_MINE HF_TOKEN FILED".split()
print("rank: " + json.dumps({"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
"""


class Machines:
    """A folder with a hostfile and programs that stand for those of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.program("ssh", FAKE_SSH)
        self.hostfile("here slots=1\nthere slots=1\n")
        self.report = folder / "report.py"
        self.report.write_text(REPORT, encoding="utf-8")

    def program(self, name: str, text: str) -> None:
        """Put a program where it is found first."""
        path = self.programs / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def hostfile(self, text: str) -> None:
        """Write the hostfile."""
        (self.folder / "hostfile").write_text(text, encoding="utf-8")

    def launch(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script in the folder and return what it gave."""
        settings = {"PATH": f"{self.programs}:{os.environ['PATH']}", "MASTER_PORT": PORT, "DS_ACCELERATOR": "cpu"}
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "multinode.sh"), *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def refused(self, *arguments: str | Path, **environment: str) -> str:
        """Run the script on bad input and return its message."""
        done = self.launch(*arguments, **environment)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("multinode: ")
        return done.stderr.removeprefix("multinode: ").rstrip("\n")


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


@pytest.fixture
def environment_made() -> None:
    """Skips the test where the script would first have to install .venv."""
    if not (ROOT / ".venv" / "colm_ds_setup").exists():
        pytest.skip("no .venv made by launch/setup.sh")


# --- what it refuses ---


def test_help_is_the_header(machines: Machines) -> None:
    for option in ("-h", "--help"):
        done = machines.launch(option)
        assert done.returncode == 0
        assert done.stdout.startswith("Trains on several machines")
        for word in ("HOSTFILE", "slots=N", "LAUNCHER", "MASTER_ADDR", "EXPORT", ".deepspeed_env"):
            assert word in done.stdout
        assert "set -" not in done.stdout


@pytest.mark.parametrize("arguments", [(), ("hostfile",)])
def test_hostfile_and_recipe_are_needed(machines: Machines, arguments: tuple[str, ...]) -> None:
    assert machines.refused(*arguments) == "give HOSTFILE RECIPE [key=value ...]; --help says more"


WRITE = "write HOST slots=N, for example worker-1 slots=8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": no hosts. Write one line per machine: HOST slots=N"),
        ("# worker-1 slots=8\n\n", ": no hosts. Write one line per machine: HOST slots=N"),
        ("worker-1\n", f", line 1: 'worker-1': {WRITE}"),
        ("# two\nworker-1 slots=2\nworker-2 slots=\n", f", line 3: 'worker-2 slots=': {WRITE}"),
        ("worker-1 slots=2\n\nworker-2 slot=2", f", line 3: 'worker-2 slot=2': {WRITE}"),
        ("worker-1 slots=two\n", f", line 1: 'worker-1 slots=two': {WRITE}"),
        ("worker-1 slots=-2\n", f", line 1: 'worker-1 slots=-2': {WRITE}"),
        ("worker-1 slots=2 worker-2 slots=2\n", f", line 1: 'worker-1 slots=2 worker-2 slots=2': {WRITE}"),
        ("slots=2\n", f", line 1: 'slots=2': {WRITE}"),
        (
            "worker-1 slots=00\n",
            ", line 1: 'worker-1 slots=00': no slots. Write how many ranks the host takes, or remove the line",
        ),
        (
            "a slots=2\nb slots=2\na slots=4\n",
            ", line 3: 'a slots=4': a is on line 1 already. Give a host one line",
        ),
    ],
)
def test_bad_hostfile_names_its_line(machines: Machines, text: str, says: str) -> None:
    machines.hostfile(text)
    assert machines.refused("hostfile", RECIPE) == f"hostfile{says}"


def test_missing_hostfile_does_not_train_alone(machines: Machines) -> None:
    says = "hosts: no such hostfile. Write one line per machine: HOST slots=N"
    assert machines.refused("hosts", RECIPE) == says


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("no.yaml",), {}, "no.yaml: no such recipe"),
        ((RECIPE, "steps"), {}, "'steps': changes to the recipe are written key=value"),
        ((RECIPE,), {"SCRIPT": "no.py"}, "SCRIPT=no.py: no such file"),
        ((RECIPE,), {"LAUNCHER": "rsh"}, "LAUNCHER=rsh: unknown. Choose pdsh, openmpi or slurm"),
        ((RECIPE,), {"MASTER_PORT": "many"}, "MASTER_PORT=many: not a number"),
    ],
)
def test_bad_arguments(machines: Machines, arguments: tuple[str, ...], environment: dict[str, str], says: str) -> None:
    assert machines.refused("hostfile", *arguments, **environment) == says


def test_paths_that_pdsh_would_split(machines: Machines) -> None:
    machines.program("pdsh", FAKE_PDSH)
    (machines.folder / "show it.py").write_text(REPORT)
    says = ": pdsh starts ranks under paths without blanks and signs of the shell only. Rename it"
    assert machines.refused("hostfile", RECIPE, SCRIPT="show it.py") == f"'show it.py'{says}"
    (machines.folder / "my project").mkdir()
    shutil.copy(machines.folder / "hostfile", machines.folder / "my project")
    machines.folder = machines.folder / "my project"
    assert machines.refused("hostfile", RECIPE) == f"'{machines.folder}'{says}"


@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        ("pdsh", "pdsh is not installed. On Debian and Ubuntu: apt-get install pdsh"),
        ("openmpi", "ompi_info is not installed. On Debian and Ubuntu: apt-get install openmpi-bin"),
        ("slurm", "srun is not installed. Run this in an allocation of a Slurm cluster"),
    ],
)
def test_missing_launcher_is_named(machines: Machines, launcher: str, says: str) -> None:
    for name in ("bash", "dirname"):
        (machines.programs / name).symlink_to(str(shutil.which(name)))
    machines.hostfile("\n# ours\n  a slots=2  # two GPUs\r\nb\tslots=02")  # all of it is well written
    message = machines.refused("hostfile", RECIPE, LAUNCHER=launcher, PATH=str(machines.programs))
    assert message == f"LAUNCHER={launcher}: {says}"


def test_slurm_takes_equal_slots(machines: Machines) -> None:
    machines.hostfile("a slots=4\nb slots=4\nc slots=2\n")
    says = "hostfile, line 3: 'c slots=2': Slurm takes the same number of slots on every host"
    assert machines.refused("hostfile", RECIPE, LAUNCHER="slurm") == says


@pytest.mark.usefixtures("environment_made")
def test_hosts_that_are_not_ready_are_named_together(machines: Machines) -> None:
    machines.program("pdsh", FAKE_PDSH)
    machines.hostfile("gone slots=1\nhere slots=1\n# spare\ngone. slots=1\n")
    machines.program("ssh", FAKE_SSH.replace("exec env", '[[ "$host" != gone. ]] || exit 1\nexec env'))
    head, *lines = machines.refused("hostfile", RECIPE).split("\n")
    assert head == "hostfile: hosts that are not ready:"
    assert [line.strip() for line in lines] == [
        "gone (line 1): not reached by ssh without a password",
        f"gone. (line 4): not there: {ROOT}/.venv, {machines.folder}, {RECIPE} or {ROOT}/finetune/train.py",
    ]


@pytest.mark.usefixtures("environment_made")
@pytest.mark.parametrize(
    ("names", "says"),
    [("NOT_THERE", "EXPORT: NOT_THERE is not set"), ("A-B", "EXPORT: 'A-B' is not the name of a variable")],
)
def test_variables_to_pass_on_are_checked(machines: Machines, names: str, says: str) -> None:
    machines.program("pdsh", FAKE_PDSH)
    assert machines.refused("hostfile", RECIPE, EXPORT=names) == says


# --- what reaches the ranks ---

CHANGES = ("name=two hosts, $HOME and \"more\" `ls` \\ 'x'", "a=$HOME;'\"`x`\\*[1]{b,c}", "probe={estimator: exact}")


@pytest.mark.distributed
@pytest.mark.usefixtures("environment_made")
@pytest.mark.parametrize("which", ["pdsh", "stand-in for pdsh"])
def test_ranks_of_two_hosts(machines: Machines, which: str) -> None:
    if which != "pdsh":
        machines.program("pdsh", FAKE_PDSH)
    elif not shutil.which("pdsh"):
        pytest.skip("pdsh is not installed")
    (machines.folder / ".deepspeed_env").write_text("\n# ours\nFILED=yes\n", encoding="utf-8")
    given = {"DS_NOTE": "passed on", "MINE": "named", "NOT_MINE": "kept", "HF_TOKEN": "kept", "EXPORT": "MINE"}
    given |= {"SCRIPT": str(machines.report), "MASTER_ADDR": "127.0.0.1"}
    done = machines.launch("hostfile", RECIPE, *CHANGES, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "multinode: 2 ranks on here there, launched by pdsh\n" in done.stdout
    seen = [line.partition("rank: ")[2] for line in done.stdout.splitlines() if "rank: {" in line]
    ranks = sorted((json.loads(line) for line in seen), key=lambda rank: str(rank["RANK"]))
    assert [(rank["AT_HOST"], rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [
        ("here", "0", "0", "2"),
        ("there", "1", "0", "2"),
    ]
    for rank in ranks:
        assert rank["arguments"] == ["--local_rank=0", str(RECIPE), *CHANGES]
        assert (rank["MASTER_ADDR"], rank["DS_NOTE"], rank["MINE"]) == ("127.0.0.1", "passed on", "named")
        assert (rank["NOT_MINE"], rank["HF_TOKEN"], rank["FILED"]) == (None, None, "yes")


@pytest.mark.usefixtures("environment_made")
def test_slurm_gets_the_ranks_and_the_address(machines: Machines) -> None:
    for name in ("srun", "sinfo"):
        machines.program(name, FAKE_SRUN)
    machines.hostfile("here slots=4\nthere slots=4\n")
    given = {"LAUNCHER": "slurm", "LAUNCHER_ARGS": "--partition long", "SCRIPT": str(machines.report)}
    done = machines.launch("hostfile", RECIPE, *CHANGES, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    start = said.index("-n")
    assert said[start : start + 6] == ["-n", "8", "--partition", "long", "--nodes", "2"]
    exported = next(line for line in said if line.startswith("--export=ALL")).split(",")
    assert {"MASTER_ADDR=here", f"MASTER_PORT={PORT}", "DS_ACCELERATOR=cpu"} <= set(exported)
    assert said[-len(CHANGES) - 2 :] == [str(machines.report), str(RECIPE), *CHANGES]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("environment_made")
@pytest.mark.skipif(not shutil.which("pdsh"), reason="pdsh is not installed")
def test_two_hosts_train(machines: Machines) -> None:
    """The ranks find each other, both with LOCAL_RANK 0, and bad input comes back as exit code 2."""
    from colm_ds.data.generated.mixture import main as generate

    data = machines.folder / "data"
    generate([str(data)])
    changes = [f"output_dir={machines.folder / 'run'}", f"tokenizer={data / 'tokenizer'}", "name=on two hosts"]
    changes += [f"data.{part}={data / part}.jsonl" for part in ("train", "heldout")]
    changes += ["steps=2", "evaluation.exact_match=false", "colm.probe={estimator: exact}"]
    done = machines.launch("hostfile", RECIPE, *changes, MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((machines.folder / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["name"], config["world_size"]) == ("on two hosts", 2)
    summary = json.loads((machines.folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "finished"
    done = machines.launch("hostfile", RECIPE, *changes, "stepz=3", MASTER_ADDR="127.0.0.1")
    assert done.returncode == 2
    assert "stepz: unknown key. Did you mean 'steps'?" in done.stdout + done.stderr
