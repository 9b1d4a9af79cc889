"""Summarise an evaluation: accuracy with its interval, averages as in the paper's tables, Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z_95 = 1.959963984540054
"""A normal variable is within this many standard deviations with probability 95%."""

IN_DOMAIN = ("gsm8k", "math", "numglue")
OUT_OF_DOMAIN = ("svamp", "mathematics", "simuleq")

AVERAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "math, in-domain": tuple((name, "accuracy") for name in IN_DOMAIN),
    "math, out-of-domain": tuple((name, "accuracy") for name in OUT_OF_DOMAIN),
    "math, all six (Table 1)": tuple((name, "accuracy") for name in IN_DOMAIN + OUT_OF_DOMAIN),
    "SST-2, CB, MultiRC (Table 7)": tuple((name, "accuracy") for name in ("sst2", "cb", "multirc")),
    "SQuAD F1, WiC, COPA (Table 9)": (("squad", "f1"), ("wic", "accuracy"), ("copa", "accuracy")),
}
"""Unweighted means over sets: (set, number) by name."""


def wilson_interval(num_correct: int, num_asked: int) -> tuple[float, float]:
    """Return the 95% interval of a share by Wilson's score, which holds for few questions and near 0 and 1.

    Args:
        num_correct: k.
        num_asked: n; if 0, the interval is 0 to 1.

    Returns:
        Minimum and maximum share, between 0 and 1.
    """
    if num_asked == 0:
        return 0.0, 1.0
    share, z2 = num_correct / num_asked, Z_95**2
    middle = share + z2 / (2 * num_asked)
    half = Z_95 * math.sqrt(share * (1 - share) / num_asked + z2 / (4 * num_asked**2))
    scale = 1 + z2 / num_asked
    lowest = 0.0 if num_correct == 0 else (middle - half) / scale
    highest = 1.0 if num_correct == num_asked else (middle + half) / scale
    return lowest, highest


def accuracy_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of questions, the share of correct ones and its interval, from rows with `correct`."""
    num_correct = sum(bool(row["correct"]) for row in rows)
    return {
        "n": len(rows),
        "num_correct": num_correct,
        "accuracy": num_correct / len(rows) if rows else None,
        "interval": list(wilson_interval(num_correct, len(rows))),
    }


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the means of `AVERAGES` for which every set has its number.

    Args:
        tasks: numbers of each set by its name.
    """
    means = {}
    for name, parts in AVERAGES.items():
        values = [tasks.get(task, {}).get(key) for task, key in parts]
        numbers = [value for value in values if isinstance(value, (int, float))]
        if len(numbers) == len(parts):
            means[name] = sum(numbers) / len(numbers)
    return means


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of an evaluation: sets, averages, perplexity.

    Args:
        results: content of `results.json`: `title`, `tasks` and `averages`.
    """
    tasks: Mapping[str, Mapping[str, Any]] = results["tasks"]
    parts = [f"# {results['title']}"]
    answered = {name: numbers for name, numbers in tasks.items() if "accuracy" in numbers}
    if answered:
        lines = [["set", "n", "accuracy %", "95% interval", "F1 %", "by program", "seconds"], ["---", *["---:"] * 6]]
        for name, numbers in answered.items():
            low, high = numbers["interval"]
            programs = numbers.get("answered_by_program")
            cells = [
                name,
                str(numbers["n"]),
                percent(numbers["accuracy"]),
                f"{percent(low)} to {percent(high)}",
                percent(numbers["f1"]) if numbers.get("f1") is not None else "",
                "" if programs is None else str(programs),
                f"{numbers.get('seconds', 0.0):.0f}",
            ]
            lines.append(cells)
        parts.append(_table(lines))
    if results["averages"]:
        lines = [["average", "%"], ["---", "---:"]]
        parts.append(_table(lines + [[name, percent(value)] for name, value in results["averages"].items()]))
    for numbers in tasks.values():
        if "per_source" in numbers:
            lines = [["source", "chunks", "tokens", "nats per token", "perplexity"], ["---", *["---:"] * 4]]
            for source, row in [*numbers["per_source"].items(), ("all, by tokens", numbers)]:
                counts = [str(row["n"]), str(row["num_tokens"])]
                lines.append([source, *counts, f"{row['loss']:.4f}", f"{row['perplexity']:.3f}"])
            parts.append(_table(lines))
    if results.get("left_out"):
        parts.append(f"No data for {', '.join(results['left_out'])}: left out.")
    return "\n\n".join(parts) + "\n"


def percent(share: float | None) -> str:
    """Format a share between 0 and 1 in percent, with one decimal."""
    return "" if share is None else f"{100 * share:.1f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
