"""What a result rests on: runs, machine, versions, and in which settings the arms differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from colm_ds.report.arms import Arm, flatten, method_settings, micro_batch_size, value_text
from colm_ds.report.section import Listing, ReportSection
from colm_ds.report.tables import MISSING, Column, Table, compact, whole
from colm_ds.run_folder.read import Run, lookup, number, numbers

_REVISION = 12  # characters of a git revision in the table; the configuration has all


def setup_section(arms: Sequence[Arm], sized: Sequence[Arm] = ()) -> ReportSection:
    """Runs, machine and versions, differing settings, and every run's resolved configuration.

    Args:
        arms: the comparison's arms.
        sized: arms that ran for their memory alone: listed, without their configurations.
    """
    tables = [runs_table([*arms, *sized]), machine_table(arms), settings_table(arms)]
    listings = [
        Listing(f"Resolved configuration of {_run_label(arm, run)}", _configuration(run))
        for arm in arms
        for run in arm.runs
    ]
    return ReportSection("setup", "Machine, versions, commands", [], [], [table for table in tables if table], listings)


def problems_of(arms: Sequence[Arm]) -> list[str]:
    """What was wrong with the runs' files, one sentence each."""
    return [f"{_run_label(arm, run)}: {problem}" for arm in arms for run in arm.runs for problem in run.problems]


def runs_table(arms: Sequence[Arm]) -> Table:
    """One row for each run."""
    columns = [
        Column("run"),
        Column("folder"),
        Column("seed", whole),
        Column("date"),
        Column("git revision"),
        Column("status"),
        Column("steps", whole),
        Column("wall clock, s", compact),
        Column("command"),
    ]
    rows = []
    for arm in arms:
        for run, facts in zip(arm.runs, arm.facts, strict=True):
            rows.append(
                [
                    _run_label(arm, run),
                    run.folder.resolve().name,
                    run.seed,
                    _text(run.config.get("date")),
                    (_text(run.config.get("git_revision")) or "")[:_REVISION] or None,
                    _text(run.summary.get("status")) or "unfinished",
                    facts.num_steps,
                    facts.scalars.get("wall_s"),
                    _text(run.config.get("command")),
                ]
            )
    return Table("runs", "Runs", columns, rows)


def machine_table(arms: Sequence[Arm]) -> Table | None:
    """Machine, sizes and versions; where runs differ, which has what."""
    labelled = [(_run_label(arm, run), _machine(run)) for arm in arms for run in arm.runs]
    rows = []
    for key in dict.fromkeys(key for _, found in labelled for key in found):
        by_value: dict[str, list[str]] = {}
        for label, found in labelled:
            by_value.setdefault(str(found.get(key, MISSING)), []).append(label)
        if len(by_value) == 1:
            rows.append([key, next(iter(by_value))])
        else:
            rows.append([key, "; ".join(f"{value} ({', '.join(named)})" for value, named in by_value.items())])
    return Table("machine", "Machine and versions", [Column("what"), Column("value")], rows) if rows else None


def settings_table(arms: Sequence[Arm]) -> Table | None:
    """Settings in which the arms differ; None if there are none."""
    settings = [method_settings(arm.config) for arm in arms]
    keys = sorted({key for found in settings for key in found})
    differing = [key for key in keys if len({str(found.get(key, MISSING)) for found in settings}) > 1]
    if not differing:
        return None
    rows = [[key, *(found.get(key) for found in settings)] for key in differing]
    return Table("settings", "Settings that differ", [Column("setting"), *(Column(arm.name) for arm in arms)], rows)


def unequal(arms: Sequence[Arm]) -> list[str]:
    """What should be the same in a fair comparison and is not, one sentence each."""
    found = []
    for what, values in (
        ("the number of steps", [arm.num_steps for arm in arms if arm.is_finished]),
        ("the data (sources and their sizes)", [numbers(arm.config.get("sources")) or None for arm in arms]),
        ("the number of parameters", [number(arm.config.get("num_parameters")) for arm in arms]),
        ("the number of trainable parameters", [number(arm.config.get("num_trainable")) for arm in arms]),
        ("the number of ranks", [number(arm.config.get("world_size")) for arm in arms]),
        ("the device", [_text(lookup(arm.config, "machine", "device")) for arm in arms]),
        (
            "the micro-batch",
            [micro_batch_size(arm) for arm in arms],
        ),
        ("the git revision", [_text(arm.config.get("git_revision")) for arm in arms]),
    ):
        if len({str(value) for value in values if value is not None}) > 1:
            found.append(what)
    return found


def _machine(run: Run) -> dict[str, Any]:
    config = run.config
    found = dict(flatten(config["machine"])) if isinstance(config.get("machine"), dict) else {}
    for key, label in (
        ("world_size", "ranks"),
        ("num_parameters", "parameters"),
        ("num_trainable", "trainable parameters"),
        ("num_heldout", "held-out examples"),
    ):
        value = number(config.get(key))
        if value is not None:
            found[label] = whole(value)
    if isinstance(config.get("versions"), dict):
        found |= {f"version of {name}": value_text(value) for name, value in config["versions"].items()}
    return found


def _run_label(arm: Arm, run: Run) -> str:
    """Name of a run, with its seed where the arm has several."""
    return arm.name if len(arm.runs) == 1 else f"{arm.name}, seed {run.seed}"


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _configuration(run: Run) -> str:
    return json.dumps(run.config, indent=2, ensure_ascii=False, default=str) if run.config else MISSING
