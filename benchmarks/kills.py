"""Kill -9 at random moments: what is lost, whether every checkpoint loads, and whether the end is the same.

    python benchmarks/kills.py                   # 100 kills of a 2-rank run that saves every 3 steps: about 10 minutes
    python benchmarks/kills.py --launcher        # the same with DeepSpeed's launcher, also killed: slower, fewer kills

A small LoRA run with dropout is started again and again in one folder; each start is killed at a random moment (rank 0,
rank 1 or both; with --launcher also the launcher's two processes) until a start reaches the end. Then the next run
begins in a new folder. After each kill: the newest checkpoint is whole, at most the steps since the last save are lost,
and no process stays behind. At the end of each run: weights and metrics are bitwise those of an uninterrupted run.
Without --launcher the ranks are forked from a process that has imported everything, which saves most of the start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 3
PATIENCE_S = 60.0
"""Maximum time for processes to end by themselves after a kill."""


def main() -> int:
    """Run from the command line; return 1 if any promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (100)")
    parser.add_argument("--steps", type=int, default=45, help="steps of a run (45)")
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="ZeRO stage (2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and victims (0)")
    parser.add_argument("--launcher", action="store_true", help="start with DeepSpeed's launcher, and kill it too")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/kills.json or kills_launcher.json)")
    options = parser.parse_args()
    name = "kills_launcher" if options.launcher else "kills"
    out = options.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        result = Trial(Path(scratch), options).run()
    from colm_ds.run_folder.environment import describe_environment

    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    record = {"benchmark": name, **describe_environment(), "date": date, "settings": settings, **result}
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 1 if result["broken_promises"] else 0


class Trial:
    """Runs, kills, and checks of what is left."""

    def __init__(self, scratch: Path, options: argparse.Namespace) -> None:
        self.scratch, self.options = scratch, options
        self.random = random.Random(options.seed)
        self.broken: list[str] = []
        self.victims: Counter[str] = Counter()
        self.lost: list[int] = []
        self.recipe = self._write_recipe()

    def run(self) -> dict[str, Any]:
        """Run until all kills are done."""
        if not self.options.launcher:
            preload()
        started = time.monotonic()
        whole_s = self._uninterrupted()
        kills = runs = 0
        while kills < self.options.kills:
            folder = self.scratch / f"run_{runs}"
            kills += self._until_finished(folder, self.options.kills - kills)
            runs += 1
            self._compare(folder)
            shutil.rmtree(folder)
            print(f"{kills} kills, {runs} runs, {len(self.broken)} broken promises", flush=True)
        return {
            "kills": kills,
            "runs": runs,
            "victims": dict(self.victims),
            "steps_lost": {"median": sorted(self.lost)[len(self.lost) // 2], "max": max(self.lost)},
            "broken_promises": self.broken,
            "uninterrupted_run_s": whole_s,
            "total_s": time.monotonic() - started,
        }

    def _break(self, what: str) -> None:
        """Record a broken promise."""
        print(f"BROKEN: {what}\n{self._log()}", flush=True)
        self.broken.append(what)

    def _write_recipe(self) -> Path:
        from colm_ds.data.generated.mixture import write_mixture

        write_mixture(self.scratch / "data", seed=1, scale=0.02)
        model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        recipe = {
            "output_dir": "set by an override",
            "steps": self.options.steps,
            "save_every": SAVE_EVERY,
            "micro_batch_size": 3,
            "model": {"config": model | {"num_attention_heads": 4, "num_key_value_heads": 2}},
            "tokenizer": str(self.scratch / "data" / "tokenizer"),
            "data": {"train": str(self.scratch / "data" / "train.jsonl"), "max_length": 96, "cache_dir": None},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "colm": {"large_batch_size": 16, "coreset_size": 8},
            "optimizer": {"lr": 1e-3},
            "deepspeed": str(ROOT / "ds_configs" / f"zero{self.options.stage}.json"),
        }
        path = self.scratch / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    def _uninterrupted(self) -> float:
        start = time.monotonic()
        processes = self._start(self.scratch / "whole")
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"the uninterrupted run ended with {codes}: {self._log()}")
        return time.monotonic() - start

    def _until_finished(self, folder: Path, most: int) -> int:
        """Start one run again and again; return the number of kills."""
        kills = 0
        while True:
            processes = self._start(folder)
            doomed = kills < most
            self._wait_for_a_moment(folder, processes if doomed else [])
            if doomed and any(process.poll() is None for process in processes):
                kills += 1
                self._kill(processes)
                self._wait_for_the_rest(processes)
                self._look(folder)
                if finished(folder):  # the kill came between the last file and the end of the process
                    return kills
                continue
            codes = [process.wait() for process in processes]
            if not any(codes):
                return kills
            self._break(f"a start that was not killed ended with {codes}: {self._log()}")
            if len(self.broken) > 5:
                raise SystemExit("\n".join(self.broken))

    def _wait_for_a_moment(self, folder: Path, processes: list[Any]) -> None:
        """Wait for the time of a kill: four of five within a later step or save, the others at the start."""
        begun = time.monotonic()

        def wait(until: Callable[[], bool]) -> None:
            while any(process.poll() is None for process in processes) and not until():
                time.sleep(0.002)

        if self.random.random() < 0.2:
            seconds = self.random.uniform(0.0, 5.0)
            wait(lambda: time.monotonic() - begun > seconds)
            return
        metrics = folder / "metrics.jsonl"
        first = num_lines(metrics)
        more = self.random.randint(1, 10)
        wait(lambda: num_lines(metrics) >= first + more)
        seconds, begun = self.random.uniform(0.0, 0.2), time.monotonic()
        wait(lambda: time.monotonic() - begun > seconds)

    def _start(self, folder: Path) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides = [f"output_dir={folder}"]
        log = self.scratch / "log.txt"
        if self.options.launcher:
            launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2"]
            command = [*launcher, "--master_port", str(port), "finetune/train.py", str(self.recipe), *overrides]
            with log.open("w") as output:
                return [subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)]
        log.unlink(missing_ok=True)
        return [Forked(self.recipe, overrides, rank, port, log) for rank in range(2)]

    def _kill(self, processes: list[Any]) -> None:
        if self.options.launcher:
            runner = psutil.Process(processes[0].pid)
            family = {"runner": [runner]}
            for child in runner.children():
                family["launcher"] = [child]
                ranks = child.children()
                family |= {f"rank {number}": [rank] for number, rank in enumerate(ranks)}
        else:
            family = {f"rank {number}": [process] for number, process in enumerate(processes)}
            family["both ranks"] = list(processes)
        name = self.random.choice(sorted(family))
        self.victims[name] += 1
        self._family = self._descendants(processes)
        for process in family[name]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def _descendants(self, processes: list[Any]) -> list[psutil.Process]:
        descendants = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                descendants += [parent, *parent.children(recursive=True)]
        return descendants

    def _wait_for_the_rest(self, processes: list[Any]) -> None:
        """Wait until no process is left; without the launcher, send SIGTERM to the remaining ranks as it would."""
        if not self.options.launcher:
            time.sleep(1.0)
            for process in processes:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        for process in processes:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        alive = self._family
        while alive and time.monotonic() < deadline:
            alive = [one for one in alive if is_alive(one)]
            time.sleep(0.01)
        if alive:
            self._break(f"still running {PATIENCE_S:g} s after a kill: {alive}")
            for one in alive:
                with suppress(psutil.NoSuchProcess):
                    one.kill()

    def _look(self, folder: Path) -> None:
        """Check that the newest checkpoint is whole and not older than the last save."""
        from colm_ds.checkpoints import atomic
        from colm_ds.errors import CheckpointError
        from colm_ds.run_folder.read import read_metrics

        logged = max((entry["step"] for entry in read_metrics(folder / "metrics.jsonl")), default=0)
        try:
            checkpoint = atomic.find(folder / "checkpoints")
        except CheckpointError as error:
            self._break(f"no checkpoint loads: {error}")
            return
        step = checkpoint.step if checkpoint else 0
        if checkpoint and checkpoint.passed_over:
            self._break(f"a checkpoint that is not whole: {checkpoint.passed_over}")
        if step < (logged - 1) // SAVE_EVERY * SAVE_EVERY:
            self._break(f"{logged} steps done, but the checkpoint has {step}")
        self.lost.append(max(0, logged - step))

    def _compare(self, folder: Path) -> None:
        weights = "adapter/adapter_model.safetensors"
        if (folder / weights).read_bytes() != (self.scratch / "whole" / weights).read_bytes():
            self._break(f"{weights} is not that of the uninterrupted run")
        for name in ("adapter/adapter_config.json", "adapter/README.md", "summary.json"):
            if not (folder / name).exists():
                self._break(f"{name} is missing at the end")
        if steps_of(folder) != steps_of(self.scratch / "whole"):
            self._break("metrics.jsonl is not that of the uninterrupted run")

    def _log(self) -> str:
        log = self.scratch / "log.txt"
        return log.read_text(errors="replace")[-1500:] if log.exists() else "no output"


class Forked:
    """A rank forked from this process."""

    def __init__(self, recipe: Path, overrides: list[str], rank: int, port: int, log: Path) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.chdir(ROOT)
        code = 1
        try:
            from colm_ds.training.run import run

            run(recipe, overrides)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            print(error.code, file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def preload() -> None:
    """Import what a rank needs; no thread may run here, as a fork would not have it."""
    import torch

    torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import colm_ds.training.run  # noqa: F401


def num_lines(path: Path) -> int:
    """Count the lines of a file; 0 if it is missing."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs and is not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def finished(folder: Path) -> bool:
    """Return whether the run's last file exists."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["status"] == "finished"


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without values that vary between runs."""
    from colm_ds.run_folder.read import read_metrics

    changing = ("time_s", "memory_gib", "memory_parts_gib")
    entries = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in changing} for entry in entries]


if __name__ == "__main__":
    sys.exit(main())
