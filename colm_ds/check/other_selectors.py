"""Measure the selectors that a check compares only on request: baselines and other systems, by their own signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.check.sample import DrawnSample
from colm_ds.check.signals_of_sample import SampleFacts
from colm_ds.check.ways_to_choose import BY_SOURCE, JOINT, WaysCompared, WayToChoose
from colm_ds.config.colm import CoLMSection, ProbeConfig
from colm_ds.engine.target_stream import TargetStream
from colm_ds.probe.of_examples import signals_of_examples
from colm_ds.selection import SELECTORS, SelectionSettings, Signals, needs_of, takes_outer_rules
from colm_ds.types import SourcedDataset

_COMPARED_ANYWAY = ("colm", "balanced", "keep_random", "random", "full")

_VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {"vector_sum": ({}, {"method": "best_of"})}
"""Options to measure, of selectors that have more than one kind of rule."""


def other_ways(config: CoLMSection, facts: SampleFacts, num_sources: int, has_target: bool) -> WaysCompared:
    """Return every other selector that can be measured on a sample, in one pool and with quotas by source.

    Args:
        config: the recipe's section.
        facts: facts of the sample.
        num_sources: c; with one source, pools by source are the joint pool.
        has_target: whether there are target examples.
    """
    compared = WaysCompared()
    missing: dict[str, list[str]] = {"losses of earlier steps": [], "reference losses": [], "a target": []}
    for name in SELECTORS:
        needs = needs_of(name)
        if name in _COMPARED_ANYWAY:
            continue
        for lacks, why in (
            (needs.past, "losses of earlier steps"),
            (needs.reference, "reference losses"),
            (needs.target and not has_target, "a target"),
        ):
            if lacks:
                missing[why].append(name)
                break
        else:
            if needs.signal is None or facts.exact is not None:
                compared.ways += _ways_of(name, config, facts, num_sources)
    for why, names in missing.items():
        if names:
            fix = " (--target)" if why == "a target" else ""
            compared.notes.append(f"{', '.join(names)}: not measured for want of {why}{fix}.")
    if any(way.selector == "opus" for way in compared.ways):
        compared.notes.append("opus is measured with geometry: plain, as a check has no history of gradients.")
    return compared


def _ways_of(name: str, config: CoLMSection, facts: SampleFacts, num_sources: int) -> list[WayToChoose]:
    needs, pools = needs_of(name), takes_outer_rules(name)
    scopes = [(JOINT, False), (BY_SOURCE, True)][: min(num_sources, 2)] if pools else [("", False)]
    probes = [ProbeConfig(estimator="sketch", layer=config.probe.layer)]
    if needs.signal == "gradient" and not needs.target and facts.can("tokens"):
        probes.append(ProbeConfig(estimator="tokens"))
    ways = []
    for options, probe, (scope, per_source) in product(_VARIANTS.get(name, ({},)), probes, scopes):
        by_tokens = probe.estimator == "tokens"
        words = [name, *map(str, options.values()), *(["by tokens"] if by_tokens else [])]
        keys = [f"colm.selector={name}", *(f"colm.options.{key}={value}" for key, value in options.items())]
        if needs.signal == "gradient":
            keys.append(f"colm.probe.estimator={probe.estimator}")
        if pools:
            keys += [f"colm.per_source={str(per_source).lower()}", "colm.small_sources=none"]
        ways.append(
            WayToChoose(
                name=", ".join([" ".join(words), *([scope] if scope else [])]),
                selector=name,
                probe=probe,
                settings=SelectionSettings(geometry="plain", per_source=per_source, seed=config.seed),
                keys=tuple(keys),
                options=tuple(options.items()),
                outer_rules="auto" if not pools else "on" if per_source else "off",
                signal_key=None if needs.signal is None or by_tokens else (needs.signal, *needs.also),
            )
        )
    return ways


@dataclass(frozen=True)
class ScoredSample:
    """Signals of one kind for the examples of a sample, and for those of a target.

    Attributes:
        own: signals of the sample, `vectors` `[N, K]`.
        parts: labelled tokens of each by which its signal is multiplied, float32 `[N]`; None: 1.
        target: signals of the whole target data, float32 `[m, K]`; None without a target.
        stream: the target examples that a step takes.
    """

    own: Signals
    parts: Tensor | None
    target: Tensor | None
    stream: TargetStream | None

    def of(self, examples: Tensor, step: int) -> Signals:
        """Return the signals of a large batch, with the step's targets beside them.

        Args:
            examples: examples of the batch, int64 `[r]`.
            step: 1-based step.
        """
        assert self.own.vectors is not None
        parts = None if self.parts is None else self.parts[examples]
        vectors = self.own.vectors[examples]
        places = [] if self.stream is None else self.stream.indices(step)
        return Signals(
            torch.arange(len(examples)),
            self.own.finite[examples],
            vectors=vectors if parts is None else vectors * parts[:, None],
            parts=parts,
            widths=self.own.widths,
            target=None if self.target is None else self.target[places],
            target_indices=places,
        )


def score_sample(
    model: nn.Module,
    config: CoLMSection,
    sample: DrawnSample,
    ways: Sequence[WayToChoose],
    parts: Tensor | None,
    target: SourcedDataset | None,
    progress: bool = False,
) -> dict[tuple[str, ...], ScoredSample]:
    """Return the signals that ways to choose need, by their `signal_key`: one pass over the sample for each.

    Args:
        model: the model on its device.
        config: the recipe's section.
        sample: the sample.
        ways: from `other_ways`.
        parts: labelled tokens of every example in a mean over tokens, float32 `[N]`; None: a mean over examples.
        target: the target data.
        progress: whether to show progress bars.
    """
    stream = None if target is None else TargetStream(target, config.target, config.seed, 1)
    scored: dict[tuple[str, ...], ScoredSample] = {}
    for way in ways:
        key = way.signal_key
        if key is None or key in scored:
            continue
        signal, also = key[0], key[1:]
        settings: dict[str, Any] = {"seed": config.seed, "progress": progress}
        own = signals_of_examples(model, sample.examples, sample.lengths, way.probe, signal, also, **settings)
        near = None
        if target is not None:
            near = signals_of_examples(model, target, target.lengths, way.probe, signal, also, **settings).vectors
            assert near is not None
            if parts is not None and signal == "gradient":
                near = near * _num_labels(target)[:, None]
        scored[key] = ScoredSample(own, parts if signal == "gradient" else None, near, stream)
    return scored


def _num_labels(data: SourcedDataset) -> Tensor:
    return torch.tensor([int((data[place].labels[1:] != IGNORE_INDEX).sum()) for place in range(len(data))]).float()
