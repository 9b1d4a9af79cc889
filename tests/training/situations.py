"""Situations in which work was lost, or a run went wrong without a word, and what happens in them now, as a table.

    python -m tests.training.situations > table.md       # about 4 minutes; prints rows for docs/RELIABILITY.md

Each is rebuilt from scratch in a temporary folder: a tiny model, generated data, the real command line.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from safetensors.torch import load_file, save_file

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.selection.sources import carried_quotas, coreset_quotas
from tests.finetune.test_entry import ROOT, recipe_of
from tests.tiny_models import tiny_model

PROGRAM = "finetune/train.py"

_TELLING = ("Error: ", "evaluation failed: ", "rows were left out")


class Place:
    """A folder with data, a recipe in it, and runs of that recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_mixture(folder / "data", seed=1, scale=0.02)
        self.recipe: dict[str, Any] = recipe_of(folder, overwrite=False, save_every=2, steps=4)

    def command(self, *overrides: str, program: tuple[str, ...] = (PROGRAM,)) -> list[str]:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe), encoding="utf-8")
        return [sys.executable, *program, str(path), *overrides]

    def run(self, *overrides: str, program: tuple[str, ...] = (PROGRAM,)) -> str:
        """Run to the end; its exit code and the first line of what it said."""
        done = subprocess.run(
            self.command(*overrides, program=program), cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        return f"exit code {done.returncode}: {self.said(done.stderr)}"

    def said(self, text: str) -> str:
        kept = [line.strip() for line in text.split("\n") if line and "real_accelerator" not in line]
        first = next((n for n, line in enumerate(kept) if any(word in line for word in _TELLING)), 0)
        shown = " ".join(kept[first : first + 4]).replace(str(self.folder), "DIR").replace("|", "\\|")
        return shown[:300]

    def stopped(self) -> None:
        """Let the last run look as if it had been stopped after its last checkpoint."""
        (self.folder / "run" / "summary.json").write_text(json.dumps({"status": "stopped"}), encoding="utf-8")


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def killed_in_a_folder_of_the_users(place: Place) -> str:
    place.recipe |= {"output_dir": str(place.folder), "save_every": 0, "steps": 100000}
    (place.folder / "notes.txt").write_text("mine")
    for _ in range(2):
        process = subprocess.Popen(
            place.command(), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begun = time.monotonic()
        while time.monotonic() - begun < 120:
            metrics = place.folder / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size and metrics.stat().st_mtime > time.time() - 5:
                break
            time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return "there after the second start: " + ", ".join(sorted(path.name for path in place.folder.iterdir()))


def two_runs(place: Place) -> str:
    place.recipe["steps"] = 100000
    first = subprocess.Popen(
        place.command(), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (place.folder / "run" / "metrics.jsonl").exists():
        time.sleep(0.5)
    said = place.run()
    first.kill()
    first.wait()
    return said


def model_of(place: Place, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    """A model folder whose tensors were changed."""
    folder = place.folder / "model"
    tiny_model("llama", vocab_size=512).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for path in (place.folder / "data" / "tokenizer").iterdir():
        shutil.copy(path, folder)
    place.recipe["model"] = {"name_or_path": str(folder)}
    return str(folder)


def wrong_prefix(place: Place) -> str:
    model_of(place, lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()})
    return place.run()


def not_a_number(place: Place) -> str:
    model_of(place, lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"] * torch.nan})
    return place.run()


def an_adapter(place: Place, *overrides: str) -> str:
    folder = model_of(place, lambda weights: weights)
    adapted: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(place.folder / "adapter")
    place.recipe |= {"model": {"name_or_path": str(place.folder / "adapter")}, "tokenizer": folder}
    return place.run(*overrides)


def edited_data(place: Place) -> str:
    place.run()
    place.stopped()
    data = place.folder / "data" / "train.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    return place.run()


def metrics_gone(place: Place) -> str:
    place.run()
    (place.folder / "run" / "metrics.jsonl").unlink()
    return place.run("optimizer.lr=0.5")


def config_gone(place: Place) -> str:
    place.run()
    place.stopped()
    (place.folder / "run" / "config.json").unlink()
    return place.run("optimizer.lr=0.5")


def other_clipping(place: Place) -> str:
    own = json.loads((ROOT / "ds_configs" / "zero0.json").read_text(encoding="utf-8"))
    place.recipe["deepspeed"] = own
    place.run()
    place.stopped()
    place.recipe["deepspeed"] = own | {"gradient_clipping": 0.125}
    return place.run()


def evaluation_dies(place: Place) -> str:
    place.recipe["data"]["heldout"] = str(place.folder / "data" / "heldout.jsonl")
    said = place.run(program=("tests/training/ending_badly.py", "evaluation", "0"))
    return f"{said} (written: {', '.join(sorted(path.name for path in (place.folder / 'run').iterdir()))})"


def nothing_learned(place: Place) -> str:
    return place.run(program=("tests/training/ending_badly.py", "gradients", "0"))


def long_data(place: Place) -> str:
    rows = [{"source": "whole", "instruction": f"Add {n} and 1.", "output": str(n + 1)} for n in range(20)]
    rows += [{"source": "cut", "instruction": "Count.", "output": "1 2 3 4 5 6 7 8 9 " * 20} for _ in range(10)]
    rows += [{"source": "gone", "instruction": "What is this? " * 90, "output": "a"} for _ in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place.folder / "data" / "train.jsonl").write_text(text, encoding="utf-8")
    return place.run()


def drifting_quotas(place: Place) -> str:
    """Shares of a mixture, 8 of 16, 200 steps: what sources of 8.5% and 7.9% are trained at."""
    shares = torch.tensor([0.085, 0.079, 0.3, 0.25, 0.286], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    carry: dict[int, float] = {}
    carried, alone = torch.zeros(5), torch.zeros(5)
    for _ in range(200):
        drawn = torch.multinomial(shares, 16, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=5).tolist()
        quotas, carry = carried_quotas(dict(enumerate(counts)), 8, carry)
        carried += torch.tensor([quotas.get(source, 0) for source in range(5)])
        alone += torch.tensor(coreset_quotas(counts, 8))
    now, before = carried[:2] / 16, alone[:2] / 16
    return (
        f"trained at {now[0]:.1f}% and {now[1]:.1f}% of the picks ({before[0]:.1f}% and {before[1]:.1f}% with `quotas: "
        "independent`)"
    )


SITUATIONS: dict[str, Callable[[Place], str]] = {
    "output_dir holds the user's own files; a run killed before its first checkpoint is started again": (
        killed_in_a_folder_of_the_users
    ),
    "weights whose keys have a prefix": wrong_prefix,
    "the model is an adapter trained before, with `lora:`": lambda place: an_adapter(place, "lora={rank: 2}"),
    "the same without `lora:`": an_adapter,
    "data reordered between stop and resume": edited_data,
    "the final evaluation dies": evaluation_dies,
    "most data longer than max_length": long_data,
    "a weight that is not a number": not_a_number,
    "`optimizer.lr=inf`": lambda place: place.run("optimizer.lr=.inf"),
    "every step skipped, fewer than `max_skipped_steps`": nothing_learned,
    "metrics.jsonl removed beside old checkpoints, another learning rate": metrics_gone,
    "config.json removed, another learning rate": config_gone,
    "another `gradient_clipping` in the DeepSpeed file at a resume": other_clipping,
    "two runs started in one output_dir": two_runs,
    "big sources of 8.5% and 7.9% at 8 of 16": drifting_quotas,
}


def table() -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| situation | what happens |"
    yield "|---|---|"
    for name, happens in SITUATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield f"| {name} | {happens(Place(Path(folder)))} |"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for row in table():
        print(row, flush=True)
