"""Compare runs and write what came out as a page, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from colm_ds.errors import DataError
from colm_ds.report.arms import Arm, describe, make_arms
from colm_ds.report.charts import smooth
from colm_ds.report.costs import costs_section
from colm_ds.report.facts import NUMBERS, Facts
from colm_ds.report.page import markdown_table, render_markdown, render_page
from colm_ds.report.quality import differences_table, quality_columns, quality_section, sources_section
from colm_ds.report.section import (
    MAX_ARMS,
    SEEDS,
    ReportSection,
    View,
    columns_of,
    drawn_arms,
    shown_name,
    source_table,
)
from colm_ds.report.selected import selected_section
from colm_ds.report.setup import compared_section, problems_of, repeat_section
from colm_ds.report.summary import caveats, three_sentences
from colm_ds.report.tables import SEEDS_NOTE, Column, Table, clean, format_terminal, listed, plain, quoted
from colm_ds.run_folder.contents import REPORT_MARKDOWN, REPORT_NUMBERS, REPORT_PAGE
from colm_ds.run_folder.read import Run, lookup
from colm_ds.untrusted.printable import escaped

_LONGEST_TITLE = 90


@dataclass(frozen=True)
class Comparison:
    """Compared runs.

    Attributes:
        title: what was compared.
        about: one line on date and devices.
        date: when the report was made.
        summary: sentences that say what came out.
        caveats: what a reader must know before trusting it.
        arms: runs gathered by method; runs that differ in their seed only are one arm.
        small_sources: names of the small sources.
        sections: pictures and tables.
        files: what was written, by kind: `html`, `markdown`, `json`.
    """

    title: str
    about: str
    date: str
    summary: str
    caveats: list[str]
    arms: list[Arm]
    small_sources: list[str]
    sections: list[ReportSection]
    files: dict[str, Path]

    @property
    def tables(self) -> dict[str, Table]:
        """Return every table of the page by its key."""
        return {table.key: table for section in self.sections for table in section.tables}

    def as_dict(self) -> dict[str, Any]:
        """Return what `report.json` holds: every number of the page, and the curves."""
        return {
            **{key: getattr(self, key) for key in ("title", "date", "summary", "caveats", "small_sources")},
            "arms": [_arm_dict(arm) for arm in self.arms],
            "tables": {key: table.as_dict() for key, table in self.tables.items()},
        }


def compare(
    runs: Sequence[Run] | Mapping[str, Sequence[Run]],
    out_folder: str | Path,
    *,
    sized: Sequence[Run] = (),
    against: Sequence[str] = (),
    max_arms: int = MAX_ARMS,
    summary: str | None = None,
    date: datetime | None = None,
) -> Comparison:
    """Compare runs; write `report.html`, `report.md` and `report.json`.

    Args:
        runs: from `load_run`, in the order in which they shall be shown, or by the name of their arm.
        out_folder: where to write; made if it is not there.
        sized: further runs, of other batch sizes, that join the pictures of memory against batch size only.
        against: names of the arms that all are held against; default: plain training and the control of each.
        max_arms: arms in a picture at most.
        summary: sentences that say what came out; default: three that are computed.
        date: when the report is made; default: now.

    Raises:
        DataError: if there is no run, or the folder cannot be written.
    """
    view = look(runs, sized=sized, against=against, max_arms=max_arms)
    when = (date or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M %Z").strip()
    sections = [
        compared_section(view),
        quality_section(view),
        costs_section(view),
        sources_section(view),
        selected_section(view),
        repeat_section(view),
    ]
    out = Path(out_folder)
    files = {"html": out / REPORT_PAGE, "markdown": out / REPORT_MARKDOWN, "json": out / REPORT_NUMBERS}
    warned = [*caveats(view.arms), *_left_out(view), *problems_of(view.arms)]
    title, arms = _title(view.arms), list(view.arms)
    comparison = Comparison(
        title,
        _about(arms, when),
        when,
        summary or three_sentences(view),
        warned,
        arms,
        list(view.small),
        sections,
        files,
    )
    words = (title, comparison.about, comparison.summary, warned, sections)
    numbers = escaped(json.dumps(_finite(comparison.as_dict()), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, text in (("html", render_page(*words)), ("markdown", render_markdown(*words)), ("json", numbers)):
            files[key].write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{out}: cannot write the report: {error.strerror or error}. Choose another folder.") from None
    return comparison


def look(
    runs: Sequence[Run] | Mapping[str, Sequence[Run]],
    *,
    sized: Sequence[Run] = (),
    against: Sequence[str] = (),
    max_arms: int = MAX_ARMS,
) -> View:
    """Gather what the sections of a report look at; arguments as in `compare`.

    Raises:
        DataError: if there is no run.
    """
    if not runs:
        raise DataError("compare: no runs. Give at least one folder of a run.")
    everyone = make_arms(runs if isinstance(runs, Mapping) else [*runs, *sized])
    places = [run.folder for run in sized]
    arms = [arm for arm in everyone if arm.runs[0].folder not in places]
    others = [arm for arm in everyone if arm.runs[0].folder in places]
    named = [arm for name in against for arm in arms if arm.name == name]
    drawn = drawn_arms(arms, max(1, max_arms), named)
    return View(arms, arms[0].facts[0].small, named, drawn, others)


def format_table(runs: Sequence[Run]) -> str:
    """Write quality, time, memory and examples of every arm for the terminal; runs of several seeds are one arm."""
    return format_terminal(_results(make_arms(runs)))


def result_tables(runs: Mapping[str, Sequence[Run]], against: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Return quality, cost, paired differences and quality by source of named arms, for JSON and as Markdown.

    `against` names the arms that the others are held against; without runs there are no tables.
    """
    if not runs:
        return [], "No run has finished.\n"
    view = look(runs, against=against)
    perplexity = any(arm.group("heldout.perplexity.per_source") for arm in view.arms)
    kind, title = ("heldout.perplexity", "perplexity") if perplexity else ("heldout", "loss")
    sources = source_table(view, "sources", f"Held-out {title} by source", f"{kind}.per_source")
    tables = [table for table in (_results(view.arms), differences_table(view), sources) if table and table.rows]
    return [table.as_dict() for table in tables], "\n\n".join(map(markdown_table, tables)) + "\n"


def run_records(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Return what each run of named arms measured, for JSON: enough to pair runs of several machines by seed later.

    Of each run `arm`, `seed`, `numbers` (those of the tables, and held-out losses by source) and `heldout`, the curves
    of its held-out losses: `steps`, `seconds`, `tokens` and `values`.
    """
    kept = (*NUMBERS, "heldout.per_source.", "heldout.perplexity.per_source.")
    return [
        {
            "arm": arm.name,
            "seed": facts.run.seed,
            "numbers": {key: plain(value) for key, value in facts.values.items() if key.startswith(kept)},
            "heldout": {
                name: {axis: list(map(plain, points)) for axis, points in asdict(curve).items() if points}
                for name, curve in facts.heldout().items()
                if not name.startswith("source.")
            },
        }
        for arm in make_arms(runs)
        for facts in arm.used
    ]


def _results(arms: Sequence[Arm]) -> Table:
    """Make the table of quality, time, memory and examples."""
    columns = [
        *quality_columns(arms),
        *columns_of("step_s.median", "peak_memory_gib.peak", "examples_trained", "examples_probed"),
    ]
    columns = [column for column in columns if column.key != "heldout.big"]
    known = [column for column in columns if any(column.key in arm.values for arm in arms)]
    lead = {Column("arm"): shown_name, **SEEDS}
    rows = [[*(read(arm) for read in lead.values()), *(arm.values.get(column.key) for column in known)] for arm in arms]
    note = f"Losses are nats per token. {SEEDS_NOTE} Bold: the best mean, whether or not the difference is measurable."
    return Table("results", "Results", [*lead, *known], rows, note)


def _title(arms: Sequence[Arm]) -> str:
    if len(arms) == 1:
        return f"Report of {clean(arms[0].name)}"
    named = listed([quoted(arm.name) if "," in arm.name else arm.name for arm in arms])
    return clean(f"Comparison of {named}" if len(named) <= _LONGEST_TITLE else f"Comparison of {len(arms)} arms")


def _about(arms: Sequence[Arm], when: str) -> str:
    devices = dict.fromkeys(str(lookup(arm.config, "machine", "device") or "") for arm in arms)
    return " · ".join([f"Written {when} by colm_ds", *(f"trained on {device}" for device in devices if device)])


def _left_out(view: View) -> list[str]:
    if len(view.drawn) == len(view.arms):
        return []
    named = listed([quoted(arm.name) for arm in view.drawn])
    return [
        f"Pictures show {len(view.drawn)} of {len(view.arms)} arms, {named}; tables have all (--max-arms draws more)."
    ]


def _arm_dict(arm: Arm) -> dict[str, Any]:
    curves = {"loss": smooth(arm.step_curve("loss"))}
    for prefix, read in (("heldout", Facts.heldout), ("perplexity", Facts.perplexity)):
        curves |= {f"{prefix}.{name}": curve for name, curve in arm.curves(read).items()}
    return {
        **{key: getattr(arm, key) for key in ("name", "selector", "large_batch_size", "coreset_size", "num_steps")},
        "selection": describe(arm),
        "is_finished": arm.is_finished,
        "seeds": [facts.run.seed for facts in arm.used],
        "numbers": {
            key: {"mean": measure.mean, "standard_error": measure.standard_error, "num_seeds": measure.num_seeds}
            for key, measure in arm.values.items()
        },
        "curves": {name: asdict(curve) for name, curve in curves.items()},
        "runs": [
            {
                "folder": facts.run.folder.resolve().name,
                **{key: getattr(facts.run, key) for key in ("name", "seed", "is_finished", "problems", "config")},
                "numbers": facts.values,
            }
            for facts in arm.facts
        ],
    }


def _finite(value: Any) -> Any:
    """Return the same value for JSON: numbers rounded to 6 digits, None for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return plain(value)
