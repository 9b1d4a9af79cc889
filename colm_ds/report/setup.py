"""Set-up of a comparison and how to repeat it: arms, settings; runs, commands, machine, versions, configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from colm_ds.report.arms import Arm, describe, flatten, method_settings, value_text
from colm_ds.report.facts import key_of
from colm_ds.report.section import SEEDS, Item, ReportSection, View, shown_name
from colm_ds.report.tables import MISSING, SEEDS_NOTE, Column, Table, compact, whole
from colm_ds.run_folder.metrics import METRICS
from colm_ds.run_folder.read import Run, lookup, number, numbers
from colm_ds.untrusted.printable import escaped

_REVISION = 12  # characters of a git revision in the table; the configuration has all


def compared_section(view: View) -> ReportSection:
    """List the arms and the settings in which they differ."""
    lead: dict[Column, Callable[[Arm], Any]] = {
        Column("b of r"): _sizes,
        Column("selection"): describe,
        Column("micro-batch", whole): lambda arm: arm.micro_batch_size,
        **SEEDS,
        Column("trained", whole): lambda arm: arm.mean("examples_trained"),
        Column("probed", whole): lambda arm: arm.mean("examples_probed"),
        Column("held against"): lambda arm: ", ".join(other.name for other, _ in view.references(arm)) or None,
    }
    rows = [[shown_name(arm), *(read(arm) for read in lead.values())] for arm in view.arms]
    note = (
        "b of r: examples trained on, of examples looked at in a step; trained and probed: in the whole run. Runs that "
        "differ in their seed only are one arm."
    )
    table = Table("arms", "Arms", [Column("arm"), *lead], rows, note)
    return ReportSection("compared", "What was compared", [], [Item(tables=[table, settings_table(view.arms)])])


def repeat_section(view: View) -> ReportSection:
    """List runs with their commands, machine and versions, all numbers of the steps, and every configuration."""
    listings = {
        f"Resolved configuration of {run_label(arm, run)}": escaped(
            json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
        )
        for arm in view.arms
        for run in arm.runs
    }
    tables = [runs_table([*view.arms, *view.sized]), machine_table(view.arms), metrics_table(view.arms)]
    return ReportSection("repeat", "How to repeat it", [], [Item(tables=tables), Item(listings=listings)])


def runs_table(arms: Sequence[Arm]) -> Table:
    """Make a table with a row for each run."""
    columns = [Column("run"), Column("command"), Column("folder"), Column("seed", whole), Column("date")]
    columns += [Column("git revision"), Column("status"), Column("steps", whole), Column("wall clock, s", compact)]
    rows = [
        [
            run_label(arm, facts.run),
            _text(facts.run.config.get("command")),
            facts.run.folder.resolve().name,
            facts.run.seed,
            _text(facts.run.config.get("date")),
            (_text(facts.run.config.get("git_revision")) or "")[:_REVISION] or None,
            _text(facts.run.summary.get("status")) or "unfinished",
            facts.num_steps,
            facts.values.get("wall_s"),
        ]
        for arm in arms
        for facts in arm.facts
    ]
    return Table("runs", "Runs", columns, rows)


def machine_table(arms: Sequence[Arm]) -> Table | None:
    """Make a table of machine, sizes and versions; where runs differ it says which has what."""
    labelled = [(run_label(arm, run), _machine(run)) for arm in arms for run in arm.runs]
    rows = []
    for key in dict.fromkeys(key for _, machine in labelled for key in machine):
        by_value: dict[str, list[str]] = {}
        for label, machine in labelled:
            by_value.setdefault(str(machine.get(key, MISSING)), []).append(label)
        several = [f"{value} ({', '.join(named)})" for value, named in by_value.items()]
        rows.append([key, "; ".join(several) if len(several) > 1 else next(iter(by_value))])
    return Table("machine", "Machine and versions", [Column("what"), Column("value")], rows) if rows else None


def metrics_table(arms: Sequence[Arm]) -> Table | None:
    """Make a table of every metric of the steps that is summed up over a run; None if no arm has any."""
    rows: list[list[Any]] = []
    for metric in METRICS:
        name = key_of(metric)
        members = dict.fromkeys(member for arm in arms for member in arm.group(name)) if metric.by else {"": None}
        for member in members:
            cells = [arm.values.get(f"{name}.{member}" if member else name) for arm in arms]
            title = metric.title + (f", {member}" if member else "")
            rows += [[title, metric.unit or None, metric.total, *cells]] if any(cells) and metric.total else []
    columns = [Column("number of the steps"), Column("unit"), Column("over the run")]
    columns += [Column(arm.name, compact) for arm in arms]
    return Table("metrics", "Every number of the steps", columns, rows, SEEDS_NOTE, folded=True) if rows else None


def settings_table(arms: Sequence[Arm]) -> Table | None:
    """Make a table of the settings in which the arms differ; None if there are none."""
    settings = [method_settings(arm.config) for arm in arms]
    keys = sorted({key for mine in settings for key in mine})
    differing = [key for key in keys if len({mine.get(key, MISSING) for mine in settings}) > 1]
    rows = [[key, *(mine.get(key) for mine in settings)] for key in differing]
    columns = [Column("setting"), *(Column(arm.name) for arm in arms)]
    return Table("settings", "Settings that differ", columns, rows, folded=len(rows) > 12) if rows else None


def unequal(arms: Sequence[Arm]) -> list[str]:
    """Name what should be the same in a fair comparison and is not."""
    facts: dict[str, Callable[[Arm], Any]] = {
        "the number of steps": lambda arm: arm.num_steps if arm.is_finished else None,
        "the data (sources and their sizes)": lambda arm: numbers(arm.config.get("sources")) or None,
        "the number of parameters": lambda arm: number(arm.config.get("num_parameters")),
        "the number of trainable parameters": lambda arm: number(arm.config.get("num_trainable")),
        "the number of ranks": lambda arm: number(arm.config.get("world_size")),
        "the device": lambda arm: _text(lookup(arm.config, "machine", "device")),
        "the micro-batch": lambda arm: arm.micro_batch_size,
        "the git revision": lambda arm: _text(arm.config.get("git_revision")),
    }
    values = {what: [read(arm) for arm in arms] for what, read in facts.items()}
    return [what for what, by_arm in values.items() if len({str(each) for each in by_arm if each is not None}) > 1]


def problems_of(arms: Sequence[Arm]) -> list[str]:
    """Return what was wrong with the runs' files, one sentence each."""
    return [f"{run_label(arm, run)}: {problem}" for arm in arms for run in arm.runs for problem in run.problems]


def run_label(arm: Arm, run: Run) -> str:
    """Return the name of a run, with its seed where the arm has several."""
    return arm.name if len(arm.runs) == 1 else f"{arm.name}, seed {run.seed}"


def _sizes(arm: Arm) -> str | None:
    if arm.coreset_size is None and arm.large_batch_size is None:
        return None
    return " of ".join(MISSING if size is None else str(size) for size in (arm.coreset_size, arm.large_batch_size))


def _machine(run: Run) -> dict[str, Any]:
    config = run.config
    machine: dict[str, Any] = dict(flatten(config["machine"])) if isinstance(config.get("machine"), dict) else {}
    for key, label in (
        ("world_size", "ranks"),
        ("num_parameters", "parameters"),
        ("num_trainable", "trainable parameters"),
        ("num_heldout", "held-out examples"),
    ):
        value = number(config.get(key))
        machine |= {label: whole(value)} if value is not None else {}
    if isinstance(config.get("versions"), dict):
        machine |= {f"version of {name}": value_text(value) for name, value in config["versions"].items()}
    return machine


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)
