"""Compare runs and write what came out as a page, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from colm_ds.errors import DataError
from colm_ds.report.arms import Arm, Measure, make_arms
from colm_ds.report.cost import coherence_section, shares_section, time_section, traffic_section
from colm_ds.report.curves import MAX_POINTS, smooth, thin
from colm_ds.report.differences import difference, ratio, references
from colm_ds.report.facts import Curve
from colm_ds.report.markdown import render_markdown
from colm_ds.report.memory import memory_section
from colm_ds.report.page import render_page
from colm_ds.report.perplexity import perplexity_section
from colm_ds.report.protocols import protocols_section
from colm_ds.report.quality import (
    against_table,
    arms_table,
    describe,
    heldout_section,
    sources_section,
    training_section,
)
from colm_ds.report.section import ReportSection
from colm_ds.report.setup import problems_of, setup_section
from colm_ds.report.signals import signals_section
from colm_ds.report.summary import caveats, listed, summary
from colm_ds.report.tables import plain, quoted
from colm_ds.report.tradeoff import tradeoff_section
from colm_ds.run_folder.read import Run, lookup

_LONGEST_TITLE = 90


@dataclass(frozen=True)
class Comparison:
    """Compared runs.

    Attributes:
        title: what was compared.
        date: when the report was made.
        summary: one paragraph that says what came out.
        caveats: what a reader must know before trusting it.
        arms: runs gathered by method; runs that differ in their seed only are one arm.
        small_sources: names of the small sources.
        sections: pictures and tables.
        files: what was written, by kind: `html`, `markdown`, `json`.
    """

    title: str
    date: str
    summary: str
    caveats: list[str]
    arms: list[Arm]
    small_sources: list[str]
    sections: list[ReportSection]
    files: dict[str, Path]

    def as_dict(self) -> dict[str, Any]:
        """What `report.json` holds: every number of the page, and the curves."""
        return {
            "title": self.title,
            "date": self.date,
            "summary": self.summary,
            "caveats": self.caveats,
            "small_sources": self.small_sources,
            "arms": [_arm_dict(arm, self.arms) for arm in self.arms],
            "tables": {table.key: table.as_dict() for section in self.sections for table in section.tables},
        }


def compare(
    runs: Sequence[Run], out_folder: str | Path, *, sized: Sequence[Run] = (), date: datetime | None = None
) -> Comparison:
    """Compare runs; write `report.html`, `report.md` and `report.json`.

    Args:
        runs: from `load_run`, in the order in which they shall be shown.
        out_folder: where to write; made if it is not there.
        sized: further runs, of other batch sizes, that join the pictures of memory against batch size only.
        date: when the report is made; default: now.

    Raises:
        DataError: if there is no run, or the folder can not be written.
    """
    if not runs:
        raise DataError("compare: no runs. Give at least one folder of a run.")
    everyone, small = make_arms([*runs, *sized])
    places = [run.folder for run in sized]
    arms = [arm for arm in everyone if arm.runs[0].folder not in places]
    others = [arm for arm in everyone if arm.runs[0].folder in places]
    when = (date or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M %Z").strip()
    against = against_table(arms)
    sections = [
        ReportSection("arms", "Arms", tables=[arms_table(arms), *([against] if against else [])]),
        tradeoff_section(arms),
        protocols_section(arms, others),
        sources_section(arms, small),
        *([perplexity_section(arms, small)] if any(arm.perplexity() for arm in arms) else []),
        heldout_section(arms),
        training_section(arms),
        time_section(arms),
        memory_section(arms),
        shares_section(arms, small),
        coherence_section(arms),
        signals_section(arms, small),
        traffic_section(arms),
        setup_section(arms, others),
    ]
    out = Path(out_folder)
    files = {"html": out / "report.html", "markdown": out / "report.md", "json": out / "report.json"}
    warned = [*caveats(arms), *problems_of(arms)]
    found = Comparison(_title(arms), when, summary(arms, small), warned, arms, small, sections, files)
    words = (found.title, _about(found), found.summary, found.caveats, sections)
    numbers = json.dumps(_finite(found.as_dict()), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, text in (
            ("html", render_page(*words)),
            ("markdown", render_markdown(*words)),
            ("json", numbers + "\n"),
        ):
            files[key].write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{out}: can not write the report: {error.strerror or error}. Choose another folder.") from None
    return found


def _title(arms: Sequence[Arm]) -> str:
    if len(arms) == 1:
        return f"Report of {arms[0].name}"
    named = listed([quoted(arm.name) if "," in arm.name else arm.name for arm in arms])
    return f"Comparison of {named}" if len(named) <= _LONGEST_TITLE else f"Comparison of {len(arms)} arms"


def _about(found: Comparison) -> str:
    devices = dict.fromkeys(str(lookup(arm.config, "machine", "device") or "") for arm in found.arms)
    parts = [f"Written {found.date} by colm_ds", *(f"trained on {device}" for device in devices if device)]
    if len(found.arms) > 1 and found.arms[-1].name not in found.title:
        parts.append(f"compared: {', '.join(arm.name for arm in found.arms)}")
    return " · ".join(parts)


def _arm_dict(arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    raw = [facts.train_loss for facts in arm.used if facts.train_loss.values]
    return {
        "name": arm.name,
        "selection": describe(arm),
        "selector": arm.selector,
        "large_batch_size": arm.large_batch_size,
        "coreset_size": arm.coreset_size,
        "is_finished": arm.is_finished,
        "num_steps": arm.num_steps,
        "seeds": [run.seed for run, _ in arm.counted],
        "numbers": {key: _measure_dict(measure) for key, measure in arm.scalars.items()},
        **{key: {name: _measure_dict(m) for name, m in group.items()} for key, group in arm.groups.items()},
        "against": {role: _against_dict(arm, other) for role, other in references(arm, arms).items()},
        "curves": {
            "train_loss_smoothed": [_curve_dict(thin(smooth(curve))) for curve in raw],
            "heldout": {key: _curve_dict(arm.heldout(key)) for key in ("overall", "macro", "small")},
            "perplexity": {name: _curve_dict(curve) for name, curve in arm.perplexity().items()},
            "tokens": _curve_dict(thin(arm.tokens())),
            "coherence": {name: _curve_dict(thin(curve, MAX_POINTS)) for name, curve in arm.coherence().items()},
        },
        "runs": [
            {
                "name": run.name,
                "folder": run.folder.resolve().name,
                "seed": run.seed,
                "is_finished": run.is_finished,
                "numbers": {key: plain(value) for key, value in facts.scalars.items()},
                "problems": run.problems,
                "config": run.config,
            }
            for run, facts in zip(arm.runs, arm.facts, strict=True)
        ],
    }


def _finite(value: Any) -> Any:
    """The same value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure_dict(measure: Measure) -> dict[str, Any]:
    return {key: plain(value) for key, value in asdict(measure).items()}


def _curve_dict(curve: Curve) -> dict[str, Any]:
    return {
        "step": curve.steps,
        "seconds": [plain(value) for value in curve.seconds],
        "value": [plain(value) for value in curve.values],
    }


def _against_dict(arm: Arm, other: Arm) -> dict[str, Any]:
    gaps = {key: difference(arm, other, f"heldout_{key}") for key in ("overall", "macro", "small")}
    return {
        "arm": other.name,
        "heldout": {
            key: {name: plain(value) for name, value in asdict(gap).items()} | {"verdict": gap.verdict}
            for key, gap in gaps.items()
            if gap is not None
        },
        "step_s_ratio": plain(ratio(arm, other, "step_s")),
        "peak_gib_ratio": plain(ratio(arm, other, "peak_gib")),
    }
