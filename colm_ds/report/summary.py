"""A comparison in three sentences, computed from its numbers, and what a reader must know before trusting it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from colm_ds.report.arms import Arm, references
from colm_ds.report.quality import main_column
from colm_ds.report.section import View, main_arm
from colm_ds.report.setup import unequal
from colm_ds.report.statistics import difference, ratio
from colm_ds.report.tables import Column, compact, fixed, listed, plural, quoted, signed, times, whole
from colm_ds.run_folder.read import numbers

_ALIKE = 0.03  # ratios within this of 1 are called about the same
_UNEVEN = 2.0  # p90 over p10 of the time per step above which times are called unreliable


def three_sentences(view: View) -> str:
    """Say in three sentences what was compared, how good the main arm is, and what it costs."""
    return " ".join(sentence for sentence in (_scope(view), _quality(view), _costs(view)) if sentence)


def caveats(arms: Sequence[Arm]) -> list[str]:
    """Return what a reader must know: unfinished arms, uneven times, unequal conditions, single seeds."""
    sentences = []
    for arm in [arm for arm in arms if not arm.is_finished]:
        where = f"at step {arm.num_steps:,}" if arm.num_steps is not None else "before its first step"
        sentences.append(
            f"{quoted(arm.name)} is not finished: it still runs or was stopped {where}; "
            "its numbers are the last it logged."
        )
    for arm in arms:
        left_out = len(arm.facts) - len(arm.used)
        if left_out:
            sentences.append(f"{quoted(arm.name)}: {plural(left_out, 'run')} not finished and left out of the means.")
        without = sum(bool(facts.heldout()) and "heldout.overall" not in facts.values for facts in arm.used)
        if 0 < without < len(arm.used):
            sentences.append(
                f"{quoted(arm.name)}: the held-out loss of {without} of {plural(len(arm.used), 'seed')} was not finite "
                "at the end; its means are of the others."
            )
    if uneven := uneven_times(arms):
        sentences.append(
            f"The time per step of {listed([quoted(arm.name) for arm in uneven])} varies more than twofold within the "
            "run: something else may have used the machine, and ratios of time then say little."
        )
    different = unequal(arms)
    if any("plain_r_steps" in references(arm, arms) for arm in arms):  # both protocols of memory are there
        different = [what for what in different if what != "the micro-batch"]
    if different:
        sentences.append(f"Not the same in all arms: {listed(different)}.")
    seeds = {frozenset(facts.run.seed for facts in arm.used) for arm in arms}
    if len(seeds) > 1:
        most = max(len(arm.used) for arm in arms)
        fewer = [quoted(arm.name) for arm in arms if len(arm.used) < most]
        named = f" ({listed(fewer)} {'has' if len(fewer) == 1 else 'have'} fewer)" if fewer else ""
        sentences.append(
            f"Not every arm has the same seeds{named}: means are then over different ones; compare seed by seed."
        )
    if all(len(arm.used) == 1 for arm in arms):
        sentences.append("Every arm has a single seed: differences, even large ones, may be the luck of the seed.")
    return sentences


def uneven_times(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms whose time per step varies so much within a run that something else may have used the machine."""
    return [arm for arm in arms if (arm.mean("step_s.p90") or 0.0) > _UNEVEN * (arm.mean("step_s.p10") or math.inf)]


def _scope(view: View) -> str:
    arms = view.arms
    counts, steps = (
        sorted(values) for values in ({len(arm.used) for arm in arms}, {arm.num_steps or 0 for arm in arms})
    )
    head = f"{plural(len(arms), 'arm')} with {_range(counts, 'seed')}{' each' * (len(arms) > 1)}"
    head += f", {_range(steps, 'step')}" if steps[-1] else ""
    sources = next((sizes for arm in arms if (sizes := numbers(arm.config.get("sources")))), {})
    if sources:
        head += f", {plural(int(sum(sources.values())), 'training example')} from {plural(len(sources), 'source')}"
        head += f" ({len([name for name in view.small if name in sources])} small)"
    return head + "."


def _quality(view: View) -> str:
    """Give the main number of the main arm, against each that it is held against."""
    main = main_column(view.arms)
    known = [arm for arm in view.arms if main.key in arm.values]
    arm = main_arm(known) or (known[0] if known else None)
    if arm is None:
        return "No arm has results yet."
    text = f"{quoted(arm.name)} ends with {_article(main)} of {main.text(arm.values[main.key])}"
    form = signed(main.format or fixed(3))
    parts = []
    for other, named in view.references(arm):
        gap = difference(arm.values[main.key], other.values.get(main.key))
        if gap is not None and arm.is_finished and other.is_finished:
            link = "than" if gap.is_measurable else "from"
            parts.append(f"{gap.verdict(main.best)} {link} {named} ({Column('', form).text(gap)})")
    if parts:
        return f"{text}: {'; '.join(parts)}."
    alone = "there is no other arm to hold it against" if len(view.arms) == 1 else "no finished arm to hold it against"
    return f"{text}; {alone}."


def _costs(view: View) -> str:
    """Give time per step and peak of the main arm, as multiples of those of the others."""
    arm = main_arm(view.arms) or view.arms[0]
    parts = []
    for key, what, unit in (("step_s.median", "a step takes", "s"), ("peak_memory_gib.peak", "peak memory is", "GiB")):
        if key not in arm.values:
            continue
        ratios = [
            (value, other)
            for other, _ in view.references(arm)
            if (value := ratio(arm.values[key], other.values.get(key)))
        ]
        against = listed([f"{times(value)} that of {quoted(other.name)}" for value, other in ratios])
        if ratios and all(abs(value - 1) < _ALIKE for value, _ in ratios):
            against = f"about that of {listed([quoted(other.name) for _, other in ratios])}"
        amount = f"{compact(arm.values[key].mean)} {unit}"
        parts.append(f"{what} {amount}" + (f", {against}" if against else ""))
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _range(counts: Sequence[int], noun: str) -> str:
    low, high = counts[0], counts[-1]
    return plural(high, noun) if low == high else f"{whole(low)} to {plural(high, noun)}"


def _article(column: Column) -> str:
    return ("an " if column.label[0] in "aeiou" else "a ") + column.label
