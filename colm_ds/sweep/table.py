"""The table of a sweep: arms by measures, means with their spread and paired differences, as Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from colm_ds.evaluation.results import AVERAGES
from colm_ds.report.page_style import CSS
from colm_ds.run_folder.contents import CONFIG, EVALUATION, RESULTS, SUMMARY
from colm_ds.run_folder.files import read_object
from colm_ds.run_folder.read import is_finished

Row = dict[str, Any]


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


MAIN_MEASURES = ("accuracy, %", "perplexity", "held-out loss")
"""What an arm is judged by: the first of these that its runs have."""


def source_measures(folders: Iterable[Path]) -> Measures:
    """One measure for every source that any of the runs has: its held-out perplexity, or loss where there is none."""

    def reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda found: _by_source(_heldout(found)).get(name)

    names: dict[str, None] = {}
    for folder in folders:
        names |= dict.fromkeys(_by_source(read_object(folder / SUMMARY).get("heldout") or {}))
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
            "summary": read_object(folder / SUMMARY),
            "config": _with_small_sources(read_object(folder / CONFIG)),
            "evaluation": read_object(folder / EVALUATION / RESULTS),
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


def difference_rows(
    arms: Iterable[str], controls: Iterable[str], folders: Mapping[tuple[str, int], Path]
) -> tuple[str, list[Row]]:
    """Paired differences of the main measure to several controls.

    Args:
        arms: their names, in order.
        controls: some of them.
        folders: as `table_rows` takes them.

    Returns:
        The measure, "" if nothing is finished; one row per arm with a cell per control: mean, standard error, seeds.
    """
    arms = list(arms)
    to_each = {control: table_rows(arms, control, folders) for control in controls}
    found = {key for rows in to_each.values() for row in rows for key in row}
    measure = next((name for name in MAIN_MEASURES if name in found), "")
    rows = []
    for place, arm in enumerate(arms):
        cells = {control: rows[place].get(measure, {}).get("difference") for control, rows in to_each.items()}
        rows.append({"arm": arm, **{control: cell for control, cell in cells.items() if cell is not None}})
    return measure, rows


Table = tuple[str, list[str], list[list[str]]]
"""A caption, the names of the columns, and the lines, whose first cell names the arm."""


def tables_of(result: Mapping[str, Any], baseline: str, bold: str, emphasis: str) -> list[Table]:
    """All tables of a sweep as text.

    Args:
        result: `rows` from `table_rows`; where there are any, `sources`, rows with the sources as measures, and
            `differences` and their `measure` from `difference_rows`.
        baseline: what the differences in brackets are to.
        bold: a format for what stands out.
        emphasis: a format for names in captions.
    """
    rows, sources = result["rows"], result.get("sources") or []
    tables = [(_note(emphasis.format(baseline)), *_shown_cells(rows, bold))]
    if any(row["num_seeds"] for row in sources):
        tables.append(("Held out, by source (perplexity in pretraining, else loss).", *_shown_cells(sources, bold)))
    measure, differences = result.get("measure", ""), result.get("differences") or []
    if measure:
        controls = list(dict.fromkeys(key for row in differences for key in row if key != "arm"))
        lines = [[row["arm"], *(_difference_text(row.get(name), bold) for name in controls)] for row in differences]
        note = f"Paired differences of {emphasis.format(measure)} to several arms, with their standard errors"
        note += "; those beyond twice it stand out."
        tables.append((note, ["arm", *(f"to {control}" for control in controls)], lines))
    return tables


def format_markdown(result: Mapping[str, Any], baseline: str) -> str:
    """The tables as Markdown: mean and standard deviation, the best mean in bold, differences in brackets.

    Args:
        result: as `tables_of` takes it.
        baseline: what the differences in brackets are to.
    """
    parts = []
    for caption, head, lines in tables_of(result, baseline, "**{}**", "*{}*"):
        table = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
        parts.append("\n".join([caption, "", table[0], "|---" * len(head) + "|", *table[1:]]))
    return "\n\n".join(parts)


def format_html(result: Mapping[str, Any], baseline: str, title: str) -> str:
    """The same as a page that opens from disk, beside the curves that `run_sweep` draws."""
    tables = tables_of(_escaped(result), escape(baseline), "<strong>{}</strong>", "<em>{}</em>")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head>",
            f"<body><header><h1>{escape(title)}</h1></header><main>",
            *(f"<p>{caption}</p>{_html_table(head, lines)}" for caption, head, lines in tables),
            '<p>Held-out curves: <a href="curves.svg">curves.svg</a>. '
            'Every run, times and memory: <a href="report.html">report.html</a>.</p>',
            "</main></body></html>\n",
        ]
    )


def _escaped(value: Any) -> Any:
    """The same with the names of arms, sources and controls safe in HTML."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return {_escaped(key): _escaped(item) for key, item in value.items()} if isinstance(value, dict) else value


def _html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        for name, *cells in lines
    )
    return f'<div style="overflow-x: auto"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _note(baseline: str) -> str:
    return (
        "Mean and standard deviation over seeds; losses in nats per token. In brackets: paired difference to "
        f"{baseline}, with its standard error. Bold: the best mean."
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
    """Columns for the measures that any arm has, and every arm's line."""
    shown = list(dict.fromkeys(key for row in rows for key in row if key not in ("arm", "num_seeds")))
    shown.sort(key=lambda measure: list(MEASURES).index(measure) if measure in MEASURES else len(MEASURES))
    best = {measure: _best(rows, measure) for measure in shown}
    lines = []
    for row in rows:
        cells = [_text(row.get(measure), bold if row["arm"] in best[measure] else "{}") for measure in shown]
        lines.append([row["arm"], str(row["num_seeds"]), *cells])
    return ["arm", "seeds", *shown], lines


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
    return text if difference is None else f"{text} ({_difference_text(difference, '{}')})"


def _difference_text(difference: dict[str, Any] | None, bold: str) -> str:
    if difference is None:
        return ""
    mean, error = difference["mean"], difference["standard_error"]
    text = f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
    return bold.format(text) if error is not None and abs(mean) > 2 * error else text
