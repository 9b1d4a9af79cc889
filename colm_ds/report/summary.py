"""The comparison in a few plain sentences, computed from its numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from colm_ds.report.arms import Arm
from colm_ds.report.differences import TINY, Difference, difference, ratio, references
from colm_ds.report.setup import unequal
from colm_ds.report.tables import fixed, percent, plural, quoted, seconds, signed, times
from colm_ds.run_folder.read import numbers

_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SAME_COST = 0.03  # ratios of time and memory within this of 1 are called about the same
_UNEVEN = 2.0  # p90 over p10 of the time per step above which times are called unreliable
_MOST_NAMED = 3

_LOSS = fixed(3)
_PLAIN = ("plain_r", "plain_r_steps", "plain_b")


def summary(arms: Sequence[Arm], small: Collection[str]) -> str:
    """One paragraph: who has the lowest losses, what it costs against plain training, how sure that is."""
    sentences = [_scope(arms, small)]
    if len(arms) == 1:
        sentences += [_single_arm(arms[0])]
    else:
        ranked = _comparable(arms)
        if ranked:
            sentences.append(_ranking(ranked, "heldout_overall", "held-out loss overall"))
            sentences.append(_ranking(ranked, "heldout_small", "mean loss on the small sources"))
            sentences.append(_exact_match(ranked))
        else:
            sentences.append("No two arms have held-out losses after the same training, so none is called the lowest.")
        sentences += _against_plain(arms, ranked)
    sentences.append(_seeds(arms))
    return " ".join(sentence for sentence in sentences if sentence)


def caveats(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know before trusting the comparison: unfinished arms and unequal conditions."""
    found = []
    unfinished = [arm for arm in arms if not arm.is_finished]
    for arm in unfinished:
        where = f"at step {arm.num_steps:,}" if arm.num_steps is not None else "before its first step"
        found.append(
            f"{quoted(arm.name)} is not finished: it still runs or was stopped {where}; "
            "its numbers are the last it logged."
        )
    for arm in arms:
        if arm.is_finished and not all(run.is_finished for run in arm.runs):
            count = sum(not run.is_finished for run in arm.runs)
            found.append(f"{quoted(arm.name)}: {plural(count, 'run')} not finished and left out of the means.")
    uneven = [arm for arm in arms if (arm.mean("step_s_p90") or 0.0) > _UNEVEN * (arm.mean("step_s_p10") or math.inf)]
    if uneven:
        found.append(
            f"The time per step of {listed([quoted(arm.name) for arm in uneven])} varies more than twofold within the "
            "run: something else may have used the machine, and ratios of time then say little."
        )
    different = unequal(arms)
    if any("plain_r_steps" in references(arm, arms) for arm in arms):  # both protocols are there
        different = [what for what in different if what != "the micro-batch"]
    if different:
        found.append(f"Not the same in all arms: {listed(different)}.")
    return found


def listed(words: Sequence[str]) -> str:
    """Words as an enumeration: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _scope(arms: Sequence[Arm], small: Collection[str]) -> str:
    counts = sorted({len(arm.counted) for arm in arms})
    seeds = (
        f"{_word(counts[0])} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    )
    head = f"{_word(len(arms))} arm{'s' * (len(arms) != 1)} with {seeds}{' each' * (len(arms) > 1)}".capitalize()
    steps = sorted({arm.num_steps for arm in arms if arm.num_steps is not None})
    if steps:
        head += f", {steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "") + f" step{'s' * (steps[-1] != 1)}"
    sources = next((found for arm in arms if (found := numbers(arm.config.get("sources")))), {})
    if sources:
        kept = len([name for name in small if name in sources])
        head += f", {plural(int(sum(sources.values())), 'training example')} from {plural(len(sources), 'source')}"
        head += f" ({_word(kept)} small)"
    return head + "."


def _single_arm(arm: Arm) -> str:
    parts = []
    for key, words, form in (
        ("heldout_overall", "a held-out loss of {} nats per token overall", _LOSS),
        ("heldout_small", "{} on average over the small sources", _LOSS),
        ("perplexity", "a held-out perplexity of {}", fixed(2)),
        ("accuracy", "an accuracy of {}", percent),
        ("exact_match", "an exact match of {}", percent),
        ("step_s", "{} s per step (median)", seconds),
        ("peak_gib", "a memory peak of {} GiB", fixed(2)),
    ):
        value = arm.mean(key)
        if value is not None:
            parts.append(words.format(form(value)))
    told = f"{quoted(arm.name)} shows {listed(parts)}." if parts else f"{quoted(arm.name)} has no results yet."
    return f"{told} There is no other arm to hold it against."


def _comparable(arms: Sequence[Arm]) -> list[Arm]:
    """Finished arms; where fewer than two are, all with held-out losses, if they are of the same step."""
    finished = [arm for arm in arms if arm.is_finished and arm.mean("heldout_overall") is not None]
    if len(finished) > 1:
        return finished
    known = [arm for arm in arms if arm.mean("heldout_overall") is not None]
    ends = {curve.steps[-1] for arm in known if (curve := arm.heldout("overall")).steps}
    return known if len(known) > 1 and len(ends) == 1 else []


def _ranking(arms: Sequence[Arm], key: str, what: str) -> str:
    """Who has the lowest loss, and by how much."""
    known = sorted((arm for arm in arms if arm.mean(key) is not None), key=lambda arm: arm.mean(key) or 0.0)
    if len(known) < 2:
        return ""
    first, second = known[0], known[1]
    gap = difference(second, first, key)
    assert gap is not None
    head = f"The lowest {what} is that of {quoted(first.name)}, {_LOSS(first.mean(key) or 0.0)} nats per token"
    close = [arm for arm in known[1:] if not (found := difference(arm, first, key)) or not found.is_measurable]
    if not close:
        return f"{head}; next is {quoted(second.name)} with {_LOSS(second.mean(key) or 0.0)}, {_gap(gap)}."
    named = listed([quoted(arm.name) for arm in close[:_MOST_NAMED]])
    if len(close) > _MOST_NAMED:
        named = f"{_word(len(close))} other arms"
    return f"{head}; {named} {'is' if len(close) == 1 else 'are'} not measurably different."


def _exact_match(arms: Sequence[Arm]) -> str:
    """Who answers most questions exactly, and whether chance in the questions explains it."""
    known = sorted(
        ((arm.mean("exact_match") or 0.0, arm) for arm in arms if "exact_match" in arm.scalars), key=lambda p: -p[0]
    )
    if len(known) < 2:
        return ""
    (best, first), (next_best, second) = known[0], known[1]
    if best == 0:
        return "No arm answered any question exactly."
    counts = [arm.mean("num_questions") for arm in (first, second)]
    text = f"{quoted(first.name)} answers the most questions exactly, {percent(best)}; "
    text += f"next is {quoted(second.name)} with {percent(next_best)}"
    if all(counts):
        variance = sum(p * (1 - p) / n for p, n in zip((best, next_best), counts, strict=True) if n)
        if best - next_best <= 1.96 * math.sqrt(variance):
            text += f", which on {plural(int(counts[0] or 0), 'question')} is not measurably different"
    return text + "."


def _against_plain(arms: Sequence[Arm], ranked: Sequence[Arm]) -> list[str]:
    """Quality of the best selecting arm, the control only if it is alone, and costs of all, against plain training."""
    selecting = [arm for arm in arms if arm.selector is not None and not arm.is_plain]
    if not selecting:
        return []
    selecting.sort(
        key=lambda arm: (arm not in ranked, arm.selector == "keep_random", arm.mean("heldout_overall") or math.inf)
    )
    best = selecting[0]
    others = references(best, arms)
    plain: dict[str, Arm] = {role: others[role] for role in _PLAIN if role in others}
    if not plain:
        return ["There is no plain training on r or b among the arms to hold time and memory against."]
    sentences = [_quality(best, plain, ranked), _medoids(best, others.get("keep_random"), ranked)]
    # The costs of arms with the same references fit into one sentence; the others are in the tables.
    alike = [arm for arm in selecting if _plain_references(arm, arms) == list(plain.values())]
    for key, what in (("step_s", "Time per step"), ("peak_gib", "Peak memory")):
        sentences.append(_costs(alike, list(plain.values()), key, what))
    if len(alike) > _MOST_NAMED or len(alike) < len(selecting):
        sentences.append("The tables have every arm.")
    return sentences


def _quality(arm: Arm, plain: Mapping[str, Arm], ranked: Sequence[Arm]) -> str:
    """An arm's held-out loss against plain training on r and on b."""
    parts = []
    for role, other in plain.items():
        if role == "plain_r_steps":  # the same training, cut up in another way
            continue
        gaps = []
        for key, what in (("heldout_overall", "overall"), ("heldout_small", "on the small sources")):
            gap = difference(arm, other, key)
            if gap is not None and arm in ranked and other in ranked:
                gaps.append(f"{_gap(gap)} {what}")
        if gaps:
            size = f"{role[-1]} = {other.coreset_size}"
            parts.append(
                f"against {quoted(other.name)} (plain training on {size}) "
                f"the loss of {quoted(arm.name)} is {listed(gaps)}"
            )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _medoids(arm: Arm, control: Arm | None, ranked: Sequence[Arm]) -> str:
    """What choosing medoids adds to keeping small sources."""
    gap = difference(arm, control, "heldout_overall") if control is not None else None
    if gap is None or control is None or arm not in ranked or control not in ranked:
        return ""
    return (
        f"Against {quoted(control.name)}, which keeps the small sources and picks the rest at random, "
        f"it is {_gap(gap)} overall: "
        f"the medoids {'make that difference' if gap.is_measurable else 'add nothing measurable'}."
    )


def _plain_references(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    found = references(arm, arms)
    return [found[role] for role in _PLAIN if role in found]


def _costs(arms: Sequence[Arm], plain: Sequence[Arm], key: str, what: str) -> str:
    """One cost of some arms as multiples of that of plain training."""
    known = [(arm, [ratio(arm, other, key) for other in plain]) for arm in arms]
    shown = [(arm, [value for value in ratios if value is not None]) for arm, ratios in known]
    shown = [(arm, values) for arm, values in shown if len(values) == len(plain)][:_MOST_NAMED]
    if not shown:
        return ""
    named = listed([quoted(other.name) for other in plain])
    if all(abs(value - 1) < _SAME_COST for _, values in shown for value in values):
        return f"{what} is about that of {named} for {listed([quoted(arm.name) for arm, _ in shown])}."
    parts = [f"{quoted(arm.name)} {listed([times(value) for value in values])}" for arm, values in shown]
    return f"{what}, against that of {named}: {', '.join(parts)}."


def _gap(gap: Difference) -> str:
    if not gap.is_measurable:
        return "not measurably different"
    text = f"{100 * abs(gap.relative):.1f}% {'lower' if gap.mean < 0 else 'higher'}"
    if gap.standard_error is None:
        return text
    return f"{text} ({signed(4)(gap.mean)} ± {fixed(4)(gap.standard_error)} nats)"


def _seeds(arms: Sequence[Arm]) -> str:
    single = [quoted(arm.name) for arm in arms if len(arm.counted) == 1]
    if not single:
        return ""
    if len(single) == len(arms):
        who = "This is a single seed" if len(arms) == 1 else "Every arm ran with a single seed"
    else:
        named = listed(single) if len(single) <= _MOST_NAMED else f"{_word(len(single))} arms"
        who = f"{named} ran with a single seed"
    if len(arms) == 1:
        return f"{who}: how much of it is the luck of the seed is not known."
    return (
        f"{who}: differences below {100 * TINY:.0f}% are called not measurably different, and larger ones may "
        "still be the luck of the seed."
    )


def _word(count: int) -> str:
    return _NUMBER_WORDS[count] if 0 <= count < len(_NUMBER_WORDS) else f"{count:,}"
