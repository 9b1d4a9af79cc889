"""Folders as runs leave them: recorded ones, and further arms and seeds made from these by other numbers.

`recorded/` holds what two real runs on two sources and four small ones left, rounded: `colm` and `plain`, 16 steps.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("recorded")

SOURCES = {"sums": 4000, "sorting": 2600, "words": 1900, "dates": 420, "units": 260, "logic": 120}
SMALL = ("dates", "units", "logic")
VARIANCE = {"coreset": 0.02, "random": 0.04, "kappa": 0.5, "worth": 85.3}

# How an arm trains, and by how much its losses, times and memory differ from plain training on b.
ARMS: dict[str, dict[str, Any]] = {
    "plain-128": {"selector": "full", "coreset_size": 128, "gain": 0.06, "small_gain": 0.08, "train_s": 2.0},
    "plain-64": {"selector": "random", "gain": 0.0, "small_gain": 0.0},
    "keep-random": {"selector": "keep_random", "gain": 0.01, "small_gain": 0.11},
    "colm-spsa": {
        "selector": "colm",
        "gain": 0.012,
        "small_gain": 0.12,
        "probe": {"estimator": "spsa", "num_probes": 1},
    },
    "colm-sketch": {
        "selector": "colm",
        "gain": 0.03,
        "small_gain": 0.13,
        "weights": "matched",
        "probe": {"estimator": "sketch", "num_probes": 256},
    },
}


def recorded_steps(name: str) -> list[dict[str, Any]]:
    """Entries of the metrics.jsonl of a recorded run."""
    return [json.loads(line) for line in (RECORDED / name / "metrics.jsonl").read_text().splitlines()]


def recorded_file(name: str, file: str) -> dict[str, Any]:
    """Another file of a recorded run."""
    found: dict[str, Any] = json.loads((RECORDED / name / file).read_text())
    return found


_STEPS = {name: [step for step in recorded_steps(name) if step["step"] > 0] for name in ("colm", "plain")}


def write_run(
    folder: Path,
    name: str = "plain-64",
    *,
    arm: str | None = None,
    seed: int = 0,
    num_steps: int = 120,
    finished: bool = True,
    every: int = 20,
    config: Mapping[str, Any] | None = None,
    sources: Mapping[str, int] = SOURCES,
    small: Sequence[str] = SMALL,
) -> Path:
    """Write a whole run.

    Args:
        folder: where to; made.
        name: name in the configuration.
        arm: key of `ARMS`; default: the name.
        seed: seed of the run and of the invented noise.
        num_steps: steps logged.
        finished: whether there is a summary.
        every: steps between evaluations.
        config: entries that replace those of the configuration.
        sources: examples by source.
        small: the small sources.
    """
    settings = ARMS[arm or name]
    noise = random.Random(f"{arm or name}-{seed}")
    written = make_config(name, arm or name, seed, sources, small) | dict(config or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    selecting = settings["selector"] in ("colm", "keep_random")
    lines: list[dict[str, Any]] = [{"step": 0, "heldout": heldout(settings, 0, sources, small, noise)}]
    for step in range(1, num_steps + 1):
        lines.append(step_stats(settings, step, sources, small, noise, selecting))
        lines[-1]["memory_kind"] = "resident" if written["machine"]["device"] == "cpu" else "allocated"
        if step % every == 0 or step == num_steps:
            lines[-1]["heldout"] = heldout(settings, step, sources, small, noise)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = make_summary(lines[1:], sources, noise)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    return folder


def make_config(name: str, arm: str, seed: int, sources: Mapping[str, int], small: Sequence[str]) -> dict[str, Any]:
    """The configuration of a run."""
    settings = ARMS[arm]
    return recorded_file("colm", "config.json") | {
        "name": name,
        "command": f"colm-ds demo --arm {name} --seed {seed}",
        "date": "2025-01-02T03:04:05Z",
        "seed": seed,
        "world_size": 1,
        "versions": {"colm_ds": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.5"},
        "machine": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "memory_gib": 23.4},
        "git_revision": "0123abc",
        "num_parameters": 1048576,
        "num_trainable": 1048576,
        "sources": dict(sources),
        "small_sources": list(small),
        "recipe": {"model": "tiny-llama", "num_steps": 120, "seed": seed},
        "deepspeed": {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 1}},
        "colm": {
            "large_batch_size": 128,
            "coreset_size": settings.get("coreset_size", 64),
            "selector": settings["selector"],
            "small_sources": "auto",
            "per_source": True,
            "metric": "l1",
            "weights": settings.get("weights", "uniform"),
            "probe": settings.get("probe", {"estimator": "spsa", "num_probes": "auto"}),
            "seed": seed,
        },
    }


def heldout(
    settings: Mapping[str, Any], step: int, sources: Mapping[str, int], small: Sequence[str], noise: random.Random
) -> dict[str, Any]:
    """Held-out losses that fall along training."""
    per_source = {}
    for place, name in enumerate(sources):
        base = 0.9 + 0.12 * place + (4.5 - 0.1 * place) * math.exp(-step / 25)
        gain = settings["small_gain"] if name in small else settings["gain"]
        per_source[name] = base * (1 - gain * min(1.0, step / 60)) + noise.gauss(0, 0.004)
    total = sum(sources.values())
    overall = sum(per_source[name] * count / total for name, count in sources.items())
    macro = sum(per_source.values()) / len(per_source) if per_source else 0.0
    return {"overall": overall, "macro": macro, "per_source": per_source}


def step_stats(
    settings: Mapping[str, Any],
    step: int,
    sources: Mapping[str, int],
    small: Sequence[str],
    noise: random.Random,
    selecting: bool,
) -> dict[str, Any]:
    """A recorded step with the numbers of an arm."""
    size = settings.get("coreset_size", 64)
    total = sum(sources.values())
    kept = {name: round(128 * count / total) for name, count in sources.items() if name in small and selecting}
    big = {name: count for name, count in sources.items() if name not in kept}
    left, weight = size - sum(kept.values()), sum(big.values())
    per_source = kept | {name: round(left * count / weight) for name, count in big.items()}
    probing = settings["selector"] == "colm"
    train_s = settings.get("train_s", 1.0) * noise.uniform(0.95, 1.1)
    time_s = {"select": 0.01, "train": train_s, "step": 0.05}
    if probing:
        time_s = {"probe": 0.4 * noise.uniform(0.95, 1.1), "exchange": 0.002} | time_s
    time_s["total"] = sum(time_s.values()) + 0.02
    base = copy.deepcopy(_STEPS["colm" if probing else "plain"][step % 16])
    base.pop("heldout", None)
    base["coreset"].pop("gradient_variance", None)
    changed: dict[str, Any] = {
        "step": step,
        "loss": 1.05 + 4.2 * math.exp(-step / 25) - settings["gain"] + noise.gauss(0, 0.06),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 40 * size,
        "samples": size * step,
        "examples_probed": 110 if probing else 0,
        "examples_trained": size,
        "padding_fraction": 0.08 + noise.uniform(0, 0.02),
        "exchange_bytes": {"signals": 2048 if probing else 0, "selection": 512, "tokens": 0},
        "selected": True,
        "time_s": time_s,
        "memory_gib": {"probe": 0.9, "train": 1.2 * settings.get("train_s", 1.0) ** 0.3, "peak": 1.3},
        "coreset": {
            "kept_small": sum(kept.values()),
            "dropped_small": 0,
            "nonfinite": 0,
            "per_source": per_source,
            "seen": {name: round(128 * count / total) for name, count in sources.items()},
            "loss": {name: 2.0 - 0.1 * place + noise.gauss(0, 0.01) for place, name in enumerate(sources)},
            "label_tokens": {"coreset": 40.0 if probing else 32.0, "large_batch": 32.0},
            **({"gradient_variance": VARIANCE} if probing and step % 10 == 0 else {}),
            "coherence": {
                name: 0.5 - 0.3 * min(1, step / 90) + noise.gauss(0, 0.03) for name in sources if name not in small
            }
            if probing
            else {},
        },
        "counted_gib": None,
    }
    return base | changed | {"coreset": base["coreset"] | changed["coreset"]}


def make_summary(
    steps: Sequence[Mapping[str, Any]], sources: Mapping[str, int], noise: random.Random
) -> dict[str, Any]:
    """The summary of a finished run."""
    totals = sorted(step["time_s"]["total"] for step in steps)
    phases = [name for name in steps[-1]["time_s"] if name != "total"]
    middle = len(steps) // 2
    right = {name: noise.uniform(0.2, 0.6) for name in sources}
    return {
        "status": "finished",
        "steps": steps[-1]["step"],
        "heldout": steps[-1]["heldout"],
        "exact_match": {"overall": sum(right.values()) / len(right), "per_source": right, "num_questions": 360},
        "step_s": {"median": totals[middle], "p10": totals[len(steps) // 10], "p90": totals[-1 - len(steps) // 10]},
        "phase_s": {name: sorted(step["time_s"][name] for step in steps)[middle] for name in phases},
        "peak_memory_gib": {key: max(step["memory_gib"][key] for step in steps) for key in ("probe", "train", "peak")},
        "examples_trained": sum(step["examples_trained"] for step in steps),
        "examples_probed": sum(step["examples_probed"] for step in steps),
        "tokens_trained": sum(step["tokens"] for step in steps),
        "wall_s": sum(totals) * 1.1,
    }


PARTS = {"weights": 0.2, "gradients": 0.1, "optimizer": 0.4, "activations": 0.3, "replay": 0.05, "probe": 0.0}
PARTS |= {"selection": 0.01, "rest": 0.5}

# large, coreset, micro-batch, and the peak that was counted
PROTOCOL_ARMS = {
    "plain 16": (16, 16, 2, 1.0),
    "CoLM 16 of 32": (32, 16, 2, 1.1),
    "plain 32 (micro-batch 4)": (32, 32, 4, 1.6),
    "plain 32 (micro-batch 2)": (32, 32, 2, 1.05),
}
SIZED_ARMS = {"CoLM 32 of 64": (64, 32, 4, 1.7), "plain 64": (64, 64, 8, 2.9)}


def measured_run(
    folder: Path,
    name: str,
    large: int,
    coreset: int,
    micro: int,
    peak: float,
    *,
    counted: bool = True,
    selector: str = "colm",
) -> Path:
    """Write a run on two ranks whose memory was measured, and counted in its second step."""
    plain = large == coreset
    colm = {"large_batch_size": large, "coreset_size": coreset, "selector": "full" if plain else selector}
    changes: dict[str, Any] = {
        "world_size": 2,
        "colm": colm | ({} if plain else {"probe": {"estimator": "spsa", "num_probes": "auto"}}),
        "deepspeed": {"train_micro_batch_size_per_gpu": micro},
    }
    write_run(folder, name, arm="plain-64" if plain else "colm-spsa", num_steps=6, config=changes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peaks = {"probe": 0.9, "exchange": 0.9, "select": 0.8, "train": peak + 0.4, "forward": peak + 0.3}
    peaks |= {"backward": peak + 0.4, "step": 0.7, "save": 0.0, "peak": peak + 0.4}
    for place, line in enumerate(lines[1:], start=1):
        line["micro_batches"] = {"count": 4, "largest_tokens": 100 * micro if place == 2 else 128 * micro}
        line |= {"memory_gib": peaks, "memory_kind": "resident", "memory_parts_gib": PARTS, "counted_gib": None}
        times = line["time_s"]
        times |= {"forward": 0.3 * times["train"], "backward": 0.6 * times["train"], "save": 5.0}
    if counted:
        lines[2]["counted_gib"] = {"probe": 0.4, "train": peak, "forward": peak - 0.2, "backward": peak, "total": peak}
        lines[2]["time_s"]["total"] = 1000.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").unlink()
    return folder


def measured_runs(folder: Path, arms: Mapping[str, tuple[int, int, int, float]], **options: Any) -> list[Path]:
    """Write such runs, each into a folder of its own."""
    return [
        measured_run(folder / f"run_{place}_{name}", name, *arm, **options)
        for place, (name, arm) in enumerate(arms.items())
    ]
