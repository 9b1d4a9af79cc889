"""Report a check's result as a table for the terminal, as JSON, and as a picture."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from colm_ds.check.measure import CheckResult
from colm_ds.check.verdict import MeasuredWay
from colm_ds.check.ways_to_choose import RECIPE
from colm_ds.errors import ConfigError
from colm_ds.report.svg import COLORS
from colm_ds.run_folder.environment import describe_environment

_HEAD = ("way to choose", "kappa", "worth", "bias", "price", "break-even", "gain", "pays")

_HIGHEST = 3.0
"""Maximum kappa at the right edge of the picture; larger ones are drawn there."""


def format_check(result: CheckResult) -> str:
    """Return the table, sorted by kappa, with the recommendation and the notes."""
    rows = [_row(way, result) for way in result.ways]
    random = (
        _marked("random (plain training)", result.recipe_is_random),
        "1",
        str(result.size),
        "0",
        "1.00",
        "",
        "1.00",
        "",
    )
    place = sum(way.error.kappa < 1.0 for way in result.ways)
    rows.insert(place, random)
    widths = [max(len(row[column]) for row in [_HEAD, *rows]) for column in range(len(_HEAD))]

    def joined(row: tuple[str, ...]) -> str:
        first, *others = (
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    head = joined(_HEAD)
    return "\n".join(
        [
            f"{result.name}: {result.size} of {result.large}, {result.num_batches} large batches of "
            f"{result.num_examples} examples, {result.num_modules} trained matrices, weights {result.weights}",
            "",
            head,
            "─" * len(head),
            *map(joined, rows),
            "",
            result.recommendation,
            *(f"Note: {note}" for note in result.notes),
        ]
    )


def _marked(name: str, is_recipe: bool) -> str:
    """Return the name of a row, marked if the recipe chooses so."""
    return f"{name} <- {RECIPE}" if is_recipe and name != RECIPE else name


def _row(way: MeasuredWay, result: CheckResult) -> tuple[str, ...]:
    error = way.error
    return (
        _marked(way.way.name, way.way.is_recipe),
        f"{error.kappa:.2f} ± {error.kappa_se:.2f}",
        f"{error.worth:.0f}",
        f"{error.bias:.3f}" + ("" if error.bias_se is None else f" ± {error.bias_se:.3f}"),
        f"{way.price:.2f}",
        f"{way.break_even:.2f}" if way.break_even > 0 else "never",
        f"{way.gain:.2f}",
        "yes" if way.pays else "no",
    )


def as_json(result: CheckResult) -> dict[str, Any]:
    """Return everything for `check.json`; numbers are not rounded, and null if not finite."""
    values: dict[str, Any] = {
        key: getattr(result, key)
        for key in ("name", "weights", "size", "large", "steps", "num_examples", "num_batches", "side", "num_modules")
    }
    values |= {"variance_of_random": result.variance, "recommendation": result.recommendation}
    values |= {"notes": list(result.notes), "ways": [_way_as_json(way) for way in result.ways]}
    return values | {"environment": describe_environment()}


def _way_as_json(way: MeasuredWay) -> dict[str, Any]:
    error = way.error
    numbers = {
        "kappa": error.kappa,
        "kappa_se": error.kappa_se,
        "worth": error.worth,
        "bias": error.bias,
        "bias_se": error.bias_se,
        "bias_within_sample": error.bias_within_sample,
        "price": way.price,
        "break_even_kappa": way.break_even,
        "gain": way.gain,
        "least_gain": way.least_gain,
    }
    finite = {key: value if value is None or math.isfinite(value) else None for key, value in numbers.items()}
    return {
        "name": way.way.name,
        "is_recipe": way.way.is_recipe,
        "keys": list(way.way.keys),
        **finite,
        "kappa_by_part": dict(error.kappa_by_part),
        "pays": way.pays,
    }


def as_svg(result: CheckResult) -> str:
    """Return the picture: kappa of every way with two standard errors, and a mark where it breaks even."""
    ways = result.ways
    with rc_context({"svg.hashsalt": "colm_ds", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.0, 1.4 + 0.27 * len(ways)), layout="constrained", facecolor="white")
        axes = figure.subplots()
        places = list(range(len(ways)))
        kappas = [min(way.error.kappa, _HIGHEST) for way in ways]
        for paying, color, label in ((True, COLORS[2], "kappa, pays"), (False, COLORS[0], "kappa, does not pay")):
            mine = [place for place in places if ways[place].pays is paying]
            if mine:
                axes.errorbar(
                    [kappas[place] for place in mine],
                    mine,
                    xerr=[2.0 * ways[place].error.kappa_se for place in mine],
                    fmt="o",
                    color=color,
                    markersize=4,
                    linewidth=1.4,
                    label=f"{label} (± 2 standard errors)",
                )
        marks = [(way.break_even, place) for place, way in enumerate(ways) if way.break_even > 0]
        axes.plot(
            [x for x, _ in marks],
            [y for _, y in marks],
            linestyle="none",
            marker="|",
            markersize=12,
            color=COLORS[1],
            label="break-even without bias: left of it worth exceeds price",
        )
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":", label="random examples")
        axes.set_yticks(places, [_marked(way.way.name, way.way.is_recipe) for way in ways])
        axes.set_ylim(len(ways) - 0.5, -0.5)
        ends = [kappa + 2.0 * way.error.kappa_se for kappa, way in zip(kappas, ways, strict=True)]
        axes.set_xlim(0.0, min(_HIGHEST, max([1.0, *ends])) + 0.1)
        axes.set_xlabel("kappa: squared error over that of random examples")
        axes.set_title(f"{result.name}: {result.size} of {result.large}", fontsize=11)
        axes.grid(axis="x", linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def write_check(result: CheckResult, folder: Path) -> None:
    """Write `check.json` and `check.svg`.

    Args:
        result: result of the check.
        folder: folder, created if missing; files of an earlier check are replaced.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(as_json(result), indent=2) + "\n", encoding="utf-8")
        (folder / "check.svg").write_text(as_svg(result), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}. Give another folder.") from None
