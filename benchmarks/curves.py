"""Draw the held-out loss along runs from a file of results that holds their curves.

    python benchmarks/curves.py docs/results/smollm2_h100.json --baseline "plain 8" --out docs/results/smollm2_h100.svg

Left the loss over all tokens, right the mean of the sources, both less the baseline's at the same step, paired by seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from colm_ds.report.svg import COLORS

MEASURES = {"overall": "all tokens", "macro": "mean of sources"}
DASHES = ("-", "--", ":")


def differences(runs: list[dict[str, Any]], baseline: str, measure: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and mean difference to the baseline's loss for every other arm, over the seeds of both."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for run in runs:
        curve = run["heldout"][measure]
        curves.setdefault(run["arm"], {})[run["seed"]] = dict(zip(curve["steps"], curve["values"], strict=True))
    base, found = curves.pop(baseline), {}
    for arm, seeds in curves.items():
        both = sorted(set(seeds) & set(base))
        steps = sorted(set.intersection(*(set(seeds[seed]) & set(base[seed]) for seed in both))) if both else []
        means = [sum(seeds[seed][step] - base[seed][step] for seed in both) / len(both) for step in steps]
        if steps:
            found[arm] = steps, means
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON with the runs and their curves")
    parser.add_argument("--baseline", default="plain 8", help="arm to subtract (plain 8)")
    parser.add_argument("--highest", type=float, default=0.1, help="maximum difference to show, in nats (0.1)")
    parser.add_argument("--out", type=Path, required=True, help="SVG")
    options = parser.parse_args()
    runs = json.loads(options.results.read_text(encoding="utf-8"))["runs"]
    matplotlib.rcParams.update({"svg.hashsalt": "colm_ds", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(12.0, 6.0), layout="constrained")
    for place, (measure, title) in enumerate(MEASURES.items()):
        arms = differences(runs, options.baseline, measure)
        for arm in sorted(arms, key=lambda arm: arms[arm][1][-1]):
            steps, values = arms[arm]
            style = sorted(arms).index(arm)
            dashes, color = DASHES[style // len(COLORS)], COLORS[style % len(COLORS)]
            axes[place].plot(steps, values, dashes, color=color, label=arm)
        axes[place].axhline(0.0, color="black", linewidth=0.8)
        lowest = min(min(values) for _, values in arms.values())
        axes[place].set_ylim(1.1 * lowest, options.highest)
        axes[place].set_title(f"Held-out loss, {title}, less that of {options.baseline} (nats)", fontsize=11)
        axes[place].set_xlabel("optimizer steps")
        axes[place].grid(linewidth=0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(options.out, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
