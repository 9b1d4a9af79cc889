"""The table of a sweep: arms by measures, means with their spread and paired differences, as Markdown and HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from colm_ds.evaluation.results import AVERAGES
from colm_ds.report.page_style import CSS

Row = dict[str, Any]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of ours; empty if it is missing or broken."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a finished run."""
    return read_object(folder / "summary.json").get("status") == "finished"


def _heldout(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return found["summary"].get("heldout") or {}


def _heldout_of(small: bool) -> Callable[[Mapping[str, Any]], float | None]:
    """Mean held-out loss of the small or the big sources."""

    def read(found: Mapping[str, Any]) -> float | None:
        losses = _heldout(found).get("per_source") or {}
        named = found["config"].get("small_sources_of_data") or []
        mine = [loss for name, loss in losses.items() if (name in named) is small]
        return sum(mine) / len(mine) if mine and named else None

    return read


def _accuracy_of(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Accuracy on a classification task's held-out examples, in percent."""

    def read(found: Mapping[str, Any]) -> float | None:
        value = (found["summary"].get(key) or {}).get("accuracy")
        return 100 * value if isinstance(value, (int, float)) else None

    return read


def _percent(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """An average of the evaluation, in percent."""

    def read(found: Mapping[str, Any]) -> float | None:
        value = (found["evaluation"].get("averages") or {}).get(name)
        return 100 * value if isinstance(value, (int, float)) else None

    return read


Measures = Mapping[str, tuple[Callable[[Mapping[str, Any]], Any], bool]]

MEASURES: Measures = {
    "held-out loss": (lambda found: _heldout(found).get("overall"), False),
    "mean of sources": (lambda found: _heldout(found).get("macro"), False),
    "small sources": (_heldout_of(True), False),
    "big sources": (_heldout_of(False), False),
    "perplexity": (lambda found: _heldout(found).get("perplexity", {}).get("overall"), False),
    "accuracy, %": (_accuracy_of("heldout"), True),
    "before, %": (_accuracy_of("heldout_before"), True),
    "exact match": (lambda found: (found["summary"].get("exact_match") or {}).get("overall"), True),
    **{f"{name}, %": (_percent(name), True) for name in AVERAGES},
    "step s": (lambda found: (found["summary"].get("step_s") or {}).get("median"), False),
    "peak GiB": (lambda found: (found["summary"].get("peak_memory_gib") or {}).get("peak"), False),
}
"""What the table shows: where it is in a run's files, and whether more is better. Losses are in nats per token."""


def source_measures(folders: Iterable[Path]) -> Measures:
    """One measure for every source that any of the runs has: its held-out perplexity, or loss where there is none."""

    def reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda found: _by_source(_heldout(found)).get(name)

    names: dict[str, None] = {}
    for folder in folders:
        names |= dict.fromkeys(_by_source(read_object(folder / "summary.json").get("heldout") or {}))
    return {name: (reader(name), False) for name in names}


def _by_source(heldout: Mapping[str, Any]) -> Mapping[str, Any]:
    values: Mapping[str, Any] = heldout.get("perplexity", heldout).get("per_source") or {}
    return values


def table_rows(
    arms: Iterable[str], baseline: str, folders: Mapping[tuple[str, int], Path], measures: Measures = MEASURES
) -> list[Row]:
    """One row per arm: for every measure mean, standard deviation, and paired difference to the baseline's.

    The difference is the mean over the seeds that both have, with its standard error (None for one seed).

    Args:
        arms: their names, in order.
        baseline: one of them.
        folders: the run of each arm and seed; those that are not finished are left out.
        measures: what to read of each.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for (arm, seed), folder in folders.items():
        if not is_finished(folder):
            continue
        found = {
            "summary": read_object(folder / "summary.json"),
            "config": _with_small_sources(read_object(folder / "config.json")),
            "evaluation": read_object(folder / "evaluation" / "results.json"),
        }
        for measure, (read, _) in measures.items():
            value = read(found)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(arm, {}).setdefault(measure, {})[seed] = float(value)
    rows = []
    for arm in arms:
        cells = {}
        for measure in measures:
            mine = values.get(arm, {}).get(measure, {})
            theirs = values.get(baseline, {}).get(measure, {})
            if mine:
                cells[measure] = _cell(mine, {} if arm == baseline else theirs)
        rows.append({"arm": arm, "num_seeds": max((len(cell["seeds"]) for cell in cells.values()), default=0), **cells})
    return rows


def format_markdown(rows: Sequence[Row], baseline: str, sources: Sequence[Row] = ()) -> str:
    """The table as Markdown: mean and standard deviation, the best mean in bold, differences in brackets.

    Args:
        rows: from `table_rows`.
        baseline: what differences are to.
        sources: rows with the sources as measures, for a second table.
    """
    lines = _markdown_lines(rows)
    if any(row["num_seeds"] for row in sources):
        lines += ["", "Held out, by source (perplexity in pretraining, else loss):", "", *_markdown_lines(sources)]
    return "\n".join([*lines, "", _note(baseline, "*{}*")])


def _markdown_lines(rows: Sequence[Row]) -> list[str]:
    shown, cells = _shown_cells(rows, "**{}**")
    lines = ["| arm | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for row, mine in zip(rows, cells, strict=True):
        lines.append(f"| {row['arm']} | {row['num_seeds']} | " + " | ".join(mine) + " |")
    return lines


def format_html(rows: Sequence[Row], baseline: str, title: str, sources: Sequence[Row] = ()) -> str:
    """The same as a page that opens from disk, beside the curves that `run_sweep` draws."""
    tables = [_html_table(rows)]
    if any(row["num_seeds"] for row in sources):
        tables += ["<h2>Held out, by source</h2><p>Perplexity in pretraining, else loss.</p>", _html_table(sources)]
    note = _note(escape(baseline), "<em>{}</em>")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head>",
            f"<body><header><h1>{escape(title)}</h1></header><main>",
            *tables,
            f'<p>{note}</p><p>Held-out curves: <a href="curves.svg">curves.svg</a>. '
            'Every run, times and memory: <a href="report.html">report.html</a>.</p>',
            "</main></body></html>\n",
        ]
    )


def _html_table(rows: Sequence[Row]) -> str:
    shown, cells = _shown_cells(rows, "<strong>{}</strong>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("arm", "seeds", *shown))
    body = "".join(
        f'<tr><th scope="row">{escape(row["arm"])}</th><td>{row["num_seeds"]}</td>'
        + "".join(f"<td>{cell}</td>" for cell in mine)
        + "</tr>\n"
        for row, mine in zip(rows, cells, strict=True)
    )
    return f'<div style="overflow-x: auto"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _note(baseline: str, emphasis: str) -> str:
    return (
        "Mean and standard deviation over seeds; losses in nats per token. In brackets: paired difference to "
        f"{emphasis.format(baseline)}, with its standard error. Bold: the best mean."
    )


def _with_small_sources(config: dict[str, Any]) -> dict[str, Any]:
    """With the small sources of the data, by the |V|/c rule: runs that keep nothing by source list none."""
    from colm_ds.selection import split_sources

    counts = config.get("sources")
    if not isinstance(counts, dict) or not counts:
        return config
    return config | {"small_sources_of_data": list(split_sources(counts)[0])}


def _cell(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    values = np.array(list(mine.values()))
    cell: dict[str, Any] = {"mean": float(values.mean()), "seeds": sorted(mine)}
    cell["std"] = float(values.std(ddof=1)) if len(values) > 1 else None
    common = sorted(mine.keys() & theirs.keys())
    if common:
        differences = np.array([mine[seed] - theirs[seed] for seed in common])
        error = float(differences.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else None
        cell["difference"] = {"mean": float(differences.mean()), "standard_error": error, "seeds": common}
    return cell


def _shown_cells(rows: Sequence[Row], bold: str) -> tuple[list[str], list[list[str]]]:
    """Measures that any arm has, and every arm's cells."""
    shown = list(dict.fromkeys(key for row in rows for key in row if key not in ("arm", "num_seeds")))
    shown.sort(key=lambda measure: list(MEASURES).index(measure) if measure in MEASURES else len(MEASURES))
    best = {measure: _best(rows, measure) for measure in shown}
    cells = [
        [_text(row.get(measure), bold if row["arm"] in best[measure] else "{}") for measure in shown] for row in rows
    ]
    return shown, cells


def _best(rows: Sequence[Row], measure: str) -> set[str]:
    """Arms with the best mean."""
    more = measure in MEASURES and MEASURES[measure][1]
    means = {row["arm"]: row[measure]["mean"] for row in rows if measure in row}
    if len(means) < 2:
        return set()
    best = max(means.values()) if more else min(means.values())
    return {arm for arm, mean in means.items() if mean == best}


def _text(cell: dict[str, Any] | None, emphasis: str) -> str:
    if cell is None:
        return ""
    text = emphasis.format(f"{cell['mean']:.3f}" + ("" if cell["std"] is None else f" ± {cell['std']:.3f}"))
    difference = cell.get("difference")
    if difference is None:
        return text
    error = "" if difference["standard_error"] is None else f" ± {difference['standard_error']:.3f}"
    return f"{text} ({difference['mean']:+.3f}{error})"
