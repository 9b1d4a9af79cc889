"""launch/multinode.sh over ssh: two nodes, both at addresses of this machine, with two ranks each, under ZeRO-3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import worker_port

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "finetune" / "recipes" / "demo.yaml"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
HOSTFILE = "127.0.0.1 slots=2\n127.0.0.2 slots=2\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (Path(SSHD).exists() and shutil.which("pdsh") and shutil.which("ssh-keygen")),
        reason="needs sshd, ssh-keygen and pdsh",
    ),
    pytest.mark.skipif(not (ROOT / ".venv" / "colm_ds_setup").exists(), reason="no .venv made by launch/setup.sh"),
]

ZERO3 = (
    "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}, gradient_clipping: 1.0, "
    "data_types: {grad_accum_dtype: fp32}, steps_per_print: 1000000000}"
)
PROBES = {
    "exact": ("colm.probe={estimator: exact}",),
    "tokens": ("colm={large_batch_size: 64, coreset_size: 16, probe: {estimator: tokens}}",),
}


class Nodes:
    """A server of ssh at a port of its own, generated data, and runs over it or in one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "programs"
        programs.mkdir()
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        self.port = str(worker_port(23))
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder / 'host'}\n"
            f"AuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\nPidFile {folder / 'sshd.pid'}\n"
            "PermitRootLogin prohibit-password\nMaxStartups 50\n",
            encoding="utf-8",
        )
        client = folder / "ssh_config"
        client.write_text(
            f"Host *\n  IdentityFile {folder / 'user'}\n  StrictHostKeyChecking no\n  LogLevel ERROR\n"
            f"  UserKnownHostsFile {folder / 'known'}\n",
            encoding="utf-8",
        )
        wrapper = programs / "ssh"
        wrapper.write_text(f'#!/usr/bin/env bash\nexec {shutil.which("ssh")} -F {client} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where its processes without rights live
        log = folder / "sshd.log"
        self.server = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
        (folder / "hostfile").write_text(HOSTFILE, encoding="utf-8")
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SSH_PORT": self.port,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(worker_port(24)),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "EXPORT": "PYTHONPATH",
            "PYTHONPATH": str(ROOT),
        }
        self.data = folder / "data"
        subprocess.run(
            [str(ROOT / ".venv/bin/python"), "-m", "colm_ds.data.generated", str(self.data), "--scale", "0.1"],
            env=self.environment,
            cwd=folder,
            check=True,
        )

    def changes(self, name: str, probe: str, *more: str) -> list[str]:
        """Return the changes to the recipe that name its folder, its data and what is probed."""
        data = [f"tokenizer={self.data / 'tokenizer'}", f"data.train={self.data / 'train.jsonl'}"]
        data += [f"data.heldout={self.data / 'heldout.jsonl'}", f"output_dir={self.folder / name}"]
        small = ["colm.large_batch_size=32", "colm.coreset_size=16", "micro_batch_size=4", "steps=6", "save_every=2"]
        return [*data, *small, ZERO3, "evaluation.exact_match=false", *PROBES[probe], *more]

    def start(self, name: str, probe: str, *more: str) -> subprocess.Popen[str]:
        """Start a run on both nodes."""
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "multinode.sh"), "hostfile", str(RECIPE), *self.changes(name, probe, *more)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def alone(self, name: str, probe: str) -> None:
        """Run in one process on one rank."""
        command = [str(ROOT / ".venv/bin/python"), str(ROOT / "finetune" / "train.py"), str(RECIPE)]
        done = subprocess.run(
            [*command, *self.changes(name, probe)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def ranks(self) -> list[int]:
        """Return the processes of ranks that run in this folder."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "--local_rank" in " ".join(words) and any(str(self.folder) in word for word in words):
                found.append(int(place.name))
        return found

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Return the numbers of each step of a run."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        return [row for line in lines if line.endswith("}") and "loss" in (row := json.loads(line))]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights that a run ended with."""
        from safetensors.torch import load_file

        (path,) = (self.folder / name / "model").glob("*.safetensors")
        return load_file(path)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes; what still runs of them at the end is ended."""
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    for rank in nodes.ranks():
        os.kill(rank, signal.SIGKILL)
    nodes.server.terminate()
    nodes.server.wait(timeout=30)


def _agree(nodes: Nodes, one: str, other: str) -> None:
    """Check that two runs trained on the same examples with the same losses and ended with the same weights."""
    first, second = nodes.steps(one), nodes.steps(other)
    assert [step["step"] for step in first] == [step["step"] for step in second] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(first, second, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    ours, theirs = nodes.weights(one), nodes.weights(other)
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("probe", list(PROBES))
def test_two_nodes_train_what_one_process_trains(nodes: Nodes, probe: str) -> None:
    run = nodes.start(f"two_{probe}", probe)
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said[-3000:]
    config = json.loads((nodes.folder / f"two_{probe}" / "config.json").read_text(encoding="utf-8"))
    assert config["world_size"] == 4
    nodes.alone(f"one_{probe}", probe)
    _agree(nodes, f"two_{probe}", f"one_{probe}")


def test_a_killed_run_goes_on_where_it_was(nodes: Nodes) -> None:
    """Every rank of both nodes is killed after the checkpoint of step 2; the same command then ends the run."""
    run = nodes.start("killed", "exact")
    deadline = time.monotonic() + 600
    while len(nodes.steps("killed")) < 3:
        assert run.poll() is None, nodes.steps("killed")
        assert time.monotonic() < deadline, nodes.steps("killed")
        time.sleep(0.05)
    for rank in nodes.ranks():
        os.kill(rank, signal.SIGKILL)
    run.communicate(timeout=300)
    assert run.returncode != 0
    before = len(nodes.steps("killed"))
    assert before < 6
    again = nodes.start("killed", "exact")
    said, _ = again.communicate(timeout=900)
    assert again.returncode == 0, said[-3000:]
    assert "resum" in said.lower()
    nodes.alone("never_killed", "exact")
    _agree(nodes, "killed", "never_killed")
