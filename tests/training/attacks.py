"""What others may send, from the table of attacks, and what happens now, as a table.

    python -m tests.training.attacks [WORD ...] > table.md   # about 5 minutes; rows for docs/RELIABILITY.md

With words only the attacks that are named with one of them. Each is rebuilt from scratch in a temporary folder, on a
tiny model and the real command line.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from colm_ds.errors import ConfigError
from colm_ds.evaluation.sandbox import sandbox
from tests.checkpoints.test_untrusted import Payload
from tests.evaluation.sandbox.test_sandbox import ENDED, LOOKS_AROUND
from tests.training.situations import ROOT, Place, environment, model_of

COLM_DS = ("-m", "colm_ds.cli")


def programs(sources: list[str], level: str = "landlock") -> str:
    """Run programs one after another, then one that prints 42; how each ended, and what is left of their folder."""
    found = sandbox.detect()
    isolation = found if level == "namespaces" else dataclasses.replace(found, namespaces="not wanted")
    limits = sandbox.Limits(wall_s=20.0, cpu_s=20)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        tempfile.tempdir = folder
        try:
            results = sandbox.run_isolated([*sources, "print(42)"], limits, 1, isolation)
        finally:
            tempfile.tempdir = None
        ends = [f"{result.status} ({result.printed.strip()})" for result in results]
        return f"{', '.join(ends)}; left in the temporary folder: {', '.join(os.listdir(folder)) or 'nothing'}"


NESTED = "import sys\nos = sys.modules['os']\nfor _ in range(1500):\n  os.mkdir('d')\n  os.chdir('d')\nprint('made')"
SHUT = "import sys\nos = sys.modules['os']\nos.mkdir('big', 0o300)\nopen('big/f', 'w').close()\nprint('made')"


def ended_by_signals(place: Place) -> str:
    told = []
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        folder = place.folder / f"scratch{number}"
        folder.mkdir()
        folder.chmod(0o755)
        command = [sys.executable, "-c", ENDED, str(folder), str(int(number))]
        subprocess.run(command, env=environment(), capture_output=True, check=False)
        for _ in range(100):
            if not os.listdir(folder):
                break
            subprocess.run(["sleep", "0.05"], check=True)
        told.append(f"{number.name}: {', '.join(os.listdir(folder)) or 'nothing'} left")
    return "; ".join(told)


def removed_level(place: Place) -> str:
    try:
        sandbox.run_programs(["print(1)"], minimum="rlimits")
    except ConfigError as error:
        return f"refused: {error}"
    return "accepted"


def next_program(place: Place) -> str:
    says = "text = 'LEAK_source'\nprint('LEAK_' + 'tnirp'[::-1] + 'x')"
    return "; ".join(f"{level}: {programs([says, LOOKS_AROUND], level)}" for level in ("namespaces", "landlock"))


def shared_run(place: Place) -> str:
    """A run that somebody sent, with a payload in its newest checkpoint and a manifest that fits."""
    place.run()
    place.stopped()
    (place.folder / "run" / "model").rename(place.folder / "away")
    path = place.folder / "run" / "checkpoints" / "step_4"
    for name in ("colm.pt", "mp_rank_00_model_states.pt"):
        content = torch.load(path / name, weights_only=False)
        torch.save({**content, "more": Payload(place.folder / "was_run")}, path / name)
    manifest = json.loads((path / "manifest_00000.json").read_text())
    del manifest["checksum"]
    manifest["files"] = {n: [(path / n).stat().st_size, zlib.crc32((path / n).read_bytes())] for n in manifest["files"]}
    (path / "manifest_00000.json").write_text(json.dumps(manifest))
    export = run(place, *COLM_DS, "export", str(place.folder / "run"))
    resumed = run(place, *place.command()[1:])
    was = "was run" if (place.folder / "was_run").exists() else "was not run"
    return f"the payload {was}; export: {export}; resume: {resumed}"


def run(place: Place, *command: str, **changes: str) -> str:
    """Run Python to its end; its exit code and what it said of the run."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment() | changes, capture_output=True, text=True
    )
    telling = [
        line for line in done.stderr.splitlines() if "Error: " in line or "not used: " in line or "passed over" in line
    ]
    said = " ".join(telling[:1]).replace(str(place.folder), "DIR").replace("|", "\\|")
    trace = " TRACEBACK" if "Traceback" in done.stderr else ""
    return f"exit code {done.returncode}{trace}: {said[:200]}"


def spoiled_manifests(place: Place) -> str:
    place.run()
    place.stopped()
    path = place.folder / "run" / "checkpoints" / "step_4" / "manifest_00000.json"
    whole = path.read_bytes()
    told = []
    for name, content in (
        ("world_size 0", whole.replace(b'"world_size": 1', b'"world_size": 0')),
        ("world_size -1", whole.replace(b'"world_size": 1', b'"world_size": -1')),
        ("a flipped bit", whole.replace(b'"step": 4', b'"step": 5')),
        ("10,000 brackets", b"[" * 10_000),
    ):
        path.write_bytes(content)
        (place.folder / "run" / "summary.json").write_text('{"status": "stopped"}')
        told.append(f"{name}: {run(place, *place.command()[1:])}")
        path.parent.mkdir(exist_ok=True)
        place.stopped()
    return "; ".join(told)


def turned_name(place: Place) -> str:
    data = place.folder / "data" / "train.jsonl"
    first, *rest = data.read_text(encoding="utf-8").splitlines()
    name = json.loads(first)["source"]
    data.write_text(
        "\n".join([first, *rest, ""]).replace(json.dumps(name)[1:-1], "a\\u202eb\\u001b[2J"), encoding="utf-8"
    )
    trained = subprocess.run(place.command(), cwd=ROOT, env=environment(), capture_output=True, text=True)
    folder = str(place.folder / "run")
    shown = [trained.stderr + trained.stdout]
    for command in (("watch", "--once", folder), ("report", folder, "--out", str(place.folder)), ("export", folder)):
        done = subprocess.run(
            [sys.executable, *COLM_DS, *command], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        shown.append(done.stdout + done.stderr)
    shown += [path.read_text(encoding="utf-8") for path in place.folder.rglob("*.md")]
    shown += [path.read_text(encoding="utf-8") for path in place.folder.glob("report.*")]
    reached = sum("\u202e" in text or "\x1b[2J" in text for text in shown)
    return f"exit code {trained.returncode}; reaches {reached} of {len(shown)}: log, watch, report, model cards, pages"


def pickled_weights(place: Place) -> str:
    folder = Path(model_of(place, lambda weights: weights))
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Payload(place.folder / "was_run"), file)
    was = "was run" if (place.folder / "was_run").exists() else "was not run"
    return f"{run(place, *place.command()[1:])}; the payload {was}"


def rank_alone(place: Place) -> str:
    return run(place, *place.command()[1:], RANK="0")


def port_in_use(place: Place) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        return run(place, *place.command()[1:], RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **where)


def full_disk(place: Place) -> str:
    """No file may grow beyond 100 KB, which the weights do."""
    place.recipe |= {"save_every": 0}
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *place.command()],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("rank 0")]
    trace = " TRACEBACK" if "Traceback" in done.stderr else ""
    there = ", ".join(sorted(path.name for path in (place.folder / "run").iterdir()))
    return f"exit code {done.returncode}{trace}: {' '.join(said)[:200]} (written: {there})".replace(
        str(place.folder), "DIR"
    )


def nested_json(place: Place) -> str:
    told = []
    deep = "[" * 10_000 + "]" * 10_000
    for name in ("config.json", "tokenizer.json"):
        folder = Path(model_of(place, lambda weights: weights))
        (folder / name).write_text(deep)
        told.append(f"{name}: {run(place, *place.command('tokenizer=null')[1:])}")
    return "; ".join(told)


def nested_yaml(place: Place) -> str:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    told = []
    for name, text in (("billion laughs", laughs), ("10,000 brackets", "a: " + "[" * 10_000)):
        (place.folder / "other.yaml").write_text(text)
        told.append(f"{name}: {run(place, 'finetune/train.py', str(place.folder / 'other.yaml'))}")
    return "; ".join(told)


def compressed_zeros(place: Place) -> str:
    path = place.folder / "zeros.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1500):
            file.write(bytes(1 << 20))
    program = (
        "import sys\nfrom colm_ds.data import read_records\n"
        "try: list(read_records(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__, error)\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment(), capture_output=True, text=True)
    *said, peak = done.stdout.strip().splitlines()
    return f"{' '.join(said)} At most {int(peak) / 1000:.0f} MB.".replace(str(place.folder), "DIR")


ATTACKS: dict[str, Callable[[Place], str]] = {
    "sandbox, landlock: 1,500 nested folders": lambda place: programs([NESTED]),
    "sandbox, landlock: a folder of mode 0o300 with a file in it": lambda place: programs([SHUT]),
    "sandbox, landlock: a signal to the evaluation while a program runs": ended_by_signals,
    "sandbox: the level rlimits": removed_level,
    "sandbox: a program looks for the one before in its memory": next_program,
    "a shared run folder with a pickle payload and a manifest that fits": shared_run,
    "a manifest that was changed": spoiled_manifests,
    "U+202E and ESC in a source name": turned_name,
    "a pickled pytorch_model.bin": pickled_weights,
    "`RANK=0` alone": rank_alone,
    "the port is in use": port_in_use,
    "NUL in data.cache_dir": lambda place: run(place, *place.command('data.cache_dir="a\\0b"')[1:]),
    "disk full while the final weights are written": full_disk,
    "deeply nested JSON in a model folder": nested_json,
    "nested and multiplying YAML": nested_yaml,
    "a .gz whose single line is 1.5 GB of zeros": compressed_zeros,
}


def table(words: list[str]) -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| attack | what happens |"
    yield "|---|---|"
    for name, happens in ATTACKS.items():
        if words and not any(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield f"| {name} | {' '.join(happens(Place(Path(folder))).split())} |"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for row in table(sys.argv[1:]):
        print(row, flush=True)
