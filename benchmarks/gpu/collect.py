"""Merge results of calls into results/gpu and write the GPU tables of benchmarks/README.md and docs/MEMORY.md.

    python -m benchmarks.gpu.collect FOLDER ...    # folders that run.sh wrote; none: only the tables
    python -m benchmarks.gpu.collect --show FOLDER [--dry]    # the tables of one folder, on the terminal

A row is identified by its key and its device; of two the newer one is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import memory, pretrain, step
from benchmarks.gpu.arms import relative
from benchmarks.gpu.rows import GIB, KEPT, ROOT, read_rows, write_json

PARTS = ("tests", "step", "memory", "pretrain", "train")
CALL = ("date", "command", "device", "versions", "machine", "git_revision", "wall_s", "failed", "left", "notes")
BEGIN, END = "<!-- gpu: written by python -m benchmarks.gpu.collect -->", "<!-- gpu ends -->"
NONE = "not run on a GPU"
LOSSES = ("overall", "macro")


@dataclass(frozen=True)
class Results:
    """Rows of all parts of one device.

    Attributes:
        rows: by part, by key.
        device: the device; empty without rows.
        dry: whether they are of a dry run.
    """

    rows: dict[str, dict[str, dict[str, Any]]]
    device: str
    dry: bool = False

    @classmethod
    def read(cls, folder: Path, dry: bool = False) -> Results:
        """Read a folder; of several devices the one with the most rows."""
        prefix = "dry_" if dry else ""
        parts = {part: read_rows(folder / f"{prefix}{part}.json") for part in PARTS}
        devices = [row["device"] for rows in parts.values() for row in rows]
        device = statistics.mode(devices) if devices else ""
        rows = {part: {one["key"]: one for one in rows if one["device"] == device} for part, rows in parts.items()}
        return cls(rows, device, dry)

    def of(self, part: str, key: str) -> dict[str, Any] | None:
        """Return a row, if it exists."""
        return self.rows[part].get(key)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of results")
    parser.add_argument("--show", action="store_true", help="print the tables of the first folder and change nothing")
    parser.add_argument("--dry", action="store_true", help="with --show: of a dry run")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--root", type=Path, default=ROOT, help="whose documents are written")
    options = parser.parse_args(arguments)
    if options.show:
        results = Results.read(options.folders[0], options.dry)
        print(f"{step_text(results)}\n\n{memory_text(results)}")
        return 0
    for folder in options.folders:
        for part in PARTS:
            merge(folder / f"{part}.json", options.kept / f"{part}.json")
        for file in folder.glob("profile*.png"):
            options.kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, options.kept / file.name)
    results = Results.read(options.kept)
    rewrite(options.root / "benchmarks" / "README.md", step_text(results))
    rewrite(options.root / "docs" / "MEMORY.md", memory_text(results))
    return 0


def merge(new: Path, kept: Path) -> None:
    """Put the rows of a call into the kept file; nothing happens if the call has none."""
    if not new.is_file():
        return
    call = json.loads(new.read_text(encoding="utf-8"))
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"calls": [], "rows": []}
    rows = {(row["key"], row["device"]): row for row in before["rows"]}
    for row in call["rows"]:
        old = rows.get((row["key"], row["device"]))
        if old is None or row["date"] >= old["date"]:
            rows[row["key"], row["device"]] = row
    facts = {name: call[name] for name in CALL}
    calls = [one for one in before["calls"] if one["date"] != facts["date"]]
    calls = sorted([*calls, facts], key=lambda one: one["date"])
    write_json(
        kept, {"part": call["part"], "peak_flops": call["peak_flops"], "calls": calls, "rows": list(rows.values())}
    )


def step_text(results: Results) -> str:
    """Return the section on steps and training, CPU and GPU side by side."""
    where = f"On {results.device}" if results.device else "Not run on a GPU"
    if results.dry:
        where = f"Dry run on a CPU; {NONE}"
    tests = list(results.rows["tests"].values())
    counts = {name: sum(row["outcome"] == name for row in tests) for name in ("passed", "failed", "skipped")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items()) if tests else NONE
    return "\n\n".join(
        [
            f"{where}. Tests that need a GPU (`tests/gpu`): {said}.",
            steps_table(results),
            pretraining_table(results),
            training_table(results),
        ]
    )


def steps_table(results: Results) -> str:
    """Return whole steps of both shapes beside the CPU's."""
    large, coreset = (8, 4) if results.dry else (128, 64)
    cpu = {} if results.dry else cpu_rows("step.json")
    head = ["arm", "CPU: to plain r", "over ideal"]
    for shape in step.SHAPES:
        head += [f"{shape}: s", "to plain r", "over ideal", "tokens/s", "share of peak", "exchange, selection", "GiB"]
    lines = [table_line(head), table_line(["---", *["---:"] * (len(head) - 1)])]
    rows = list(results.rows["step"].values())
    main_arms, switches = step.arms_of(large, coreset), step.switches_of(large, coreset)
    wanted = {shape: {arm.name for arm in main_arms} for shape in step.SHAPES}
    wanted[next(iter(step.SHAPES))] |= {arm.name for arm in switches}
    for arm in [*main_arms, *switches]:
        cells = [arm.name, *cpu_cells(cpu, cpu_name(arm.name, large, coreset))]
        for shape in step.SHAPES:
            row = results.of("step", f"{shape}: {arm.name}")
            cells += step_cells(row, rows) if arm.name in wanted[shape] else [""] * 7
        lines.append(table_line(cells))
    return "\n".join(lines)


def pretraining_table(results: Results) -> str:
    """Return steps of Llama-60M beside the CPU's."""
    large, coreset = (8, 4) if results.dry else (256, 128)
    cpu = {} if results.dry else cpu_rows("step_pretraining.json")
    names = {"spsa": "spsa, tail in float32"}
    head = ["arm", "CPU: to plain r", "over ideal", "Llama-60M: s", "to plain r", "over ideal", "tokens/s"]
    head += ["share of peak", "exchange, selection", "GiB"]
    lines = [table_line(head), table_line(["---", *["---:"] * (len(head) - 1)])]
    rows = list(results.rows["pretrain"].values())
    for arm in pretrain.arms_of(large, coreset):
        short = arm.name.replace(f"CoLM {coreset} of {large}, ", "")
        name = {f"plain {large}": "plain 16", f"plain {coreset}": "plain 8"}.get(arm.name)
        name = name or f"CoLM {names.get(short, short)}"
        cells = [arm.name, *cpu_cells(cpu, name), *step_cells(results.of("pretrain", f"Llama-60M: {arm.name}"), rows)]
        lines.append(table_line(cells))
    return "\n".join(lines)


def training_table(results: Results) -> str:
    """Return held-out losses of the training runs, as differences to plain training on b with the same seed."""
    rows = list(results.rows["train"].values())
    lines = [table_line(["SmolLM2-135M", "seeds", "held-out loss, to plain b", "mean of sources, to plain b"])]
    lines.append(table_line(["---", "---:", "---:", "---:"]))
    arms = list(dict.fromkeys(row["key"].rpartition(", seed ")[0] for row in rows if row.get("heldout")))
    plain = [arm for arm in arms if re.fullmatch(r"[^:]+: plain \d+", arm)]
    for arm in sorted(arms, key=lambda arm: (arm.partition(":")[0], arm not in plain)):
        setting = arm.partition(":")[0]
        base = min(
            (one for one in plain if one.startswith(f"{setting}:")), key=lambda one: int(one.split()[-1]), default=arm
        )
        mine, theirs = (
            {row["seed"]: row["heldout"] for row in rows if row["key"].rpartition(", seed ")[0] == name}
            for name in (arm, base)
        )
        cells = [
            shown(
                [mine[seed][loss] - (0.0 if arm == base else theirs[seed][loss]) for seed in mine if seed in theirs],
                "" if arm == base else "+",
            )
            for loss in LOSSES
        ]
        lines.append(table_line([arm, str(len(mine.keys() & theirs.keys())), *cells]))
    return "\n".join(lines if arms else [*lines, table_line([NONE, "", "", ""])])


def shown(values: Sequence[float], sign: str) -> str:
    """Return the mean of values with its standard error, where there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else mean


def memory_text(results: Results) -> str:
    """Return the plan against the allocator."""
    head = ["configuration", "measured, GiB", "planned, GiB", "error", "probe", "forward", "backward", "step"]
    lines = [table_line(head), table_line(["---", *["---:"] * (len(head) - 1)])]
    errors = []
    for configuration in memory.DRY if results.dry else memory.CONFIGURATIONS:
        row = results.of("memory", configuration.name)
        if row is None:
            lines.append(table_line([configuration.name, NONE, *[""] * 6]))
            continue
        errors.append(abs(row["error"]["total"]))
        totals = [f"{row[name]['total'] / GIB:.2f}" for name in ("measured_bytes", "planned_bytes")]
        phases = [f"{row['error'][name]:+.1%}" if name in row["error"] else "" for name in head[4:]]
        lines.append(table_line([configuration.name, *totals, f"**{row['error']['total']:+.1%}**", *phases]))
    end = f"Largest error of a peak {max(errors):.1%}; {results.device}." if errors else f"{NONE[0].upper()}{NONE[1:]}."
    return "\n".join([*lines, "", end])


def step_cells(row: dict[str, Any] | None, rows: list[dict[str, Any]]) -> list[str]:
    """Return time, ratios, speed, share of the peak, share of exchange and selection, memory."""
    if row is None:
        return [NONE, *[""] * 6]
    more = relative(row, rows)
    ratios = ["" if more[name] is None else f"{more[name]:.3f}" for name in ("to_plain_large", "over_ideal")]
    shares = [f"{row['share_of_peak']:.1%}", f"{row['exchange_and_selection_share']:.2%}"]
    return [
        f"{row['median_s']:.3f}",
        *ratios,
        f"{row['tokens_per_s']:.0f}",
        *shares,
        f"{row['memory_gib']['peak']:.1f}",
    ]


def cpu_name(arm: str, large: int, coreset: int) -> str:
    """Return what benchmarks/step.py calls an arm."""
    return arm.replace(f"CoLM {coreset} of {large}, ", "CoLM ") if arm.startswith("CoLM") else arm


def cpu_rows(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a CPU's result file by arm."""
    file = ROOT / "benchmarks" / "results" / name
    return {row["arm"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]} if file.is_file() else {}


def cpu_cells(rows: dict[str, dict[str, Any]], name: str) -> list[str]:
    """Return the CPU's ratio to plain r and over the ideal; empty where it has none."""
    row = rows.get(name)
    return [f"{row['to_plain_large']:.3f}", f"{row['over_ideal']:.2f}"] if row else ["", ""]


def table_line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rewrite(document: Path, text: str) -> None:
    """Put a text between the marks of a document.

    Raises:
        SystemExit: if the document has no such marks.
    """
    old = document.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        sys.exit(f"{document}: no {BEGIN} ... {END}")
    before, rest = old.split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
