"""Draw the held-out curves of a sweep: the mean of each arm's seeds with their spread."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from colm_ds.report.svg import COLORS
from colm_ds.run_folder.read import Run, lookup, number

LINE_STYLES = ("-", "--", ":", "-.")
MAX_ARMS_AT_ONCE = len(COLORS) * len(LINE_STYLES)


def heldout_points(run: Run) -> dict[str, list[float]]:
    """Return a run's held-out measurements.

    Returns:
        Lists of equal length: `step`; `tokens` trained on and `seconds` of training until then; `loss` in nats per
        token; and for pretraining `perplexity`, else empty.
    """
    steps = sorted(int(row["step"]) for row in run.steps)
    by_step = {int(row["step"]): row for row in run.steps}
    tokens = np.cumsum([number(by_step[step].get("tokens")) or 0.0 for step in steps])
    seconds = np.cumsum([number(lookup(by_step[step], "time_s", "total")) or 0.0 for step in steps])
    points: dict[str, list[float]] = {"step": [], "tokens": [], "seconds": [], "loss": [], "perplexity": []}
    for step, heldout in sorted(run.heldout.items()):
        loss, perplexity = number(heldout.get("overall")), number(lookup(heldout, "perplexity", "overall"))
        if loss is None:
            continue
        done = int(np.searchsorted(steps, step, side="right"))
        points["step"].append(step)
        points["tokens"].append(float(tokens[done - 1]) if done else 0.0)
        points["seconds"].append(float(seconds[done - 1]) if done else 0.0)
        points["loss"].append(loss)
        if perplexity is not None:
            points["perplexity"].append(perplexity)
    return points


def curves_svg(arms: Mapping[str, Sequence[Run]]) -> str:
    """Draw held-out perplexity (or loss) against steps, tokens and seconds, as SVG text.

    The start, which is the same for all, does not affect the scale. A band is one standard deviation over the seeds.

    Args:
        arms: the finished runs of every arm, by name; only the first 28 are drawn.
    """
    curves = {arm: [heldout_points(run) for run in runs] for arm, runs in list(arms.items())[:MAX_ARMS_AT_ONCE] if runs}
    is_perplexity = bool(curves) and all(points["perplexity"] for runs in curves.values() for points in runs)
    quantity = "perplexity" if is_perplexity else "loss"
    with rc_context({"svg.hashsalt": "colm_ds", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13.5, 4.2 + 0.12 * len(curves)), layout="constrained", facecolor="white")
        panels: Sequence[Any] = figure.subplots(1, 3, sharey=True)
        names = {"step": "step", "tokens": "trained tokens, millions", "seconds": "training, minutes"}
        for axes, (key, label) in zip(panels, names.items(), strict=True):
            _draw(axes, curves, key, quantity)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y", linewidth=0.5)
        unit = "" if is_perplexity else ", nats per token"
        panels[0].set_ylabel(f"held-out {quantity}{unit}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _draw(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], key: str, quantity: str) -> None:
    scale = {"step": 1.0, "tokens": 1e6, "seconds": 60.0}[key]
    for index, (arm, runs) in enumerate(curves.items()):
        count = min(len(points["step"]) for points in runs)
        if not count:
            continue
        start = 1 if count > 1 else 0
        x = np.mean([points[key][start:count] for points in runs], axis=0) / scale
        y = np.array([points[quantity][start:count] for points in runs])
        middle, spread = y.mean(axis=0), y.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(y.shape[1])
        color, style = COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS)]
        axes.plot(x, middle, style, color=color, marker="o", markersize=3, linewidth=1.6, label=arm)
        axes.fill_between(x, middle - spread, middle + spread, color=color, alpha=0.15, linewidth=0)
