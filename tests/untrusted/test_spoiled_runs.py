"""A run whose folder was changed while it was stopped: it ends as if nothing had happened, or one message says why not.

Slow. `python -m tests.untrusted.test_spoiled_runs SEED NUMBER` prints what every input ended in.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import colm_ds.training.run  # noqa: F401 (forks of this process need not import it again)
from colm_ds import cli
from colm_ds.data.generated.mixture import write_mixture
from colm_ds.process.exit_codes import ExitCode
from tests.finetune.test_entry import recipe_of
from tests.untrusted.forked import Ended, forked
from tests.untrusted.mutations import changed_bytes, changed_text

LIMIT_S = 240.0
Right = tuple[bytes, list[tuple[int, float]]]
"""Weights of the undisturbed run, and its losses after the stop."""

WEIGHTS = Path("model") / "model.safetensors"


def train(recipe: Path) -> Ended:
    """Run `colm-ds train` in a fork of this process."""
    return forked(lambda: cli.main(["train", str(recipe)]), recipe.with_suffix(".log"), LIMIT_S)


def make_stopped_run(folder: Path) -> Right:
    """Train to the end, then take the end away; the weights and the losses of the undisturbed run."""
    write_mixture(folder / "data", seed=1, scale=0.02)
    recipe = recipe_of(
        folder, overwrite=False, save_every=2, keep_last=3, steps=6, colm={"large_batch_size": 8, "coreset_size": 4}
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    ended = train(folder / "recipe.yaml")
    assert ended.code == 0, ended.said
    run = folder / "run"
    right = (run / WEIGHTS).read_bytes(), after_the_stop(run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_6")
    (run / "checkpoints" / "latest").write_text("step_4")
    (run / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 4}))
    return right


def after_the_stop(run: Path) -> list[tuple[int, float]]:
    """Steps that the resumed run took, and their losses; broken lines of earlier steps are not its own."""
    entries: list[Any] = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    entries = [entry for entry in entries if isinstance(entry, dict) and {"step", "loss"} <= {*entry}]
    return [(entry["step"], entry["loss"]) for entry in entries if entry["step"] in (5, 6)]


def inputs(seed: int, number: int, run: Path) -> Iterator[tuple[str, bytes]]:
    """Yield so many changed files of a run, each as its path and content."""
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != "run.lock")
    kinds = {".json": "json", ".jsonl": "jsonl"}
    for index in range(number):
        draw = random.Random(f"run {seed} {index}")
        name = draw.choice(files)
        content = (run / name).read_bytes()
        kind = kinds.get(Path(name).suffix, "bytes")
        yield name, changed_text(content, draw, kind) if content else changed_bytes(b"x", draw)


def fault(folder: Path, name: str, content: bytes, right: Right, scratch: Path) -> tuple[str, str]:
    """Resume a copy of the run with one changed file; what is wrong (nothing: empty), and how it ended."""
    run = folder / "run"
    kept = scratch / "kept"
    shutil.copytree(run, kept)
    try:
        (run / name).write_bytes(content)
        ended = train(folder / "recipe.yaml")
        last = " ".join(ended.said.strip().splitlines()[-3:])[-600:]
        if ended.code is None:
            return f"hung: {last}", "hung"
        if "Traceback" in ended.said or ended.code not in (0, ExitCode.BAD_INPUT):
            return f"exit code {ended.code}: {ended.said[-2000:]}", "broke"
        if ended.code:
            return ("" if "Error: " in ended.said else f"no message: {last}"), "said"
        if (run / WEIGHTS).read_bytes() != right[0]:
            return "ended with other weights than the undisturbed run", "differs"
        if after_the_stop(run) != right[1]:
            return "ended with other losses than the undisturbed run", "differs"
        return "", "worked, a checkpoint unused" if "not used: " in ended.said else "worked"
    finally:
        shutil.rmtree(run)
        kept.rename(run)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_changed_run_ends_as_the_undisturbed_one_or_says_why_not(tmp_path: Path) -> None:
    right = make_stopped_run(tmp_path)
    assert fault(tmp_path, "checkpoints/latest", b"step_4", right, tmp_path) == ("", "worked")
    found = [
        (name, fault(tmp_path, name, content, right, tmp_path)) for name, content in inputs(1, 60, tmp_path / "run")
    ]
    assert [(name, wrong) for name, (wrong, _) in found if wrong] == []
    assert len({end for _, (_, end) in found}) > 1, "changes that change nothing would show nothing"


def main(seed: int, number: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        right = make_stopped_run(folder)
        ends: Counter[str] = Counter()
        for name, content in inputs(seed, number, folder / "run"):
            wrong, end = fault(folder, name, content, right, folder)
            ends[end] += 1
            print(f"{name}: {wrong or end}", flush=True)
        print(dict(ends))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
