"""Measure the selectors that a check compares only on request: baselines and other systems, by their own signals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.check.sample import DrawnSample
from colm_ds.check.signals_of_sample import SampleFacts
from colm_ds.check.ways_to_choose import BY_SOURCE, JOINT, WaysCompared, WayToChoose, probe_keys, with_resets
from colm_ds.config.colm import OWN_WEIGHTS, CoLMSection, ProbeConfig
from colm_ds.engine.target_stream import TargetStream
from colm_ds.probe.of_examples import signals_of_examples
from colm_ds.selection import SELECTORS, SelectionSettings, Signals, needs_of, takes_outer_rules
from colm_ds.types import SourcedDataset

_COMPARED_ANYWAY = ("colm", *OWN_WEIGHTS, "keep_random", "random", "full")

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
    compared.ways = [with_resets(way, config) for way in compared.ways]
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
        keys = [f"colm.selector={name}"]
        if needs.signal == "gradient":
            keys += probe_keys(probe)
        keys += [f"colm.options.{key}={value}" for key, value in options.items()]
        if pools:
            keys += [f"colm.per_source={str(per_source).lower()}", "colm.small_sources=none"]
        ways.append(
            WayToChoose(
                name=", ".join([" ".join(words), *([scope] if scope else [])]),
                selector=name,
                probe=probe,
                settings=SelectionSettings(
                    geometry="plain", per_source=per_source, carries=config.quotas == "carry", seed=config.seed
                ),
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
        stream: the target examples that a step takes; None without a target.
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
    """Return the signals that ways to choose need, by their `signal_key`: one pass for all scores, one for gradients.

    Args:
        model: the model on its device.
        config: the recipe's section.
        sample: the sample.
        ways: from `other_ways`.
        parts: labelled tokens of every example in a mean over tokens, float32 `[N]`; None: a mean over examples.
        target: the target data.
        progress: whether to show progress bars.
    """
    compares: dict[tuple[str, ...], bool] = {}
    for way in ways:
        if way.signal_key is not None:
            compares[way.signal_key] = compares.get(way.signal_key, False) or needs_of(way.selector).target
    stream = None if target is None else TargetStream(target, config.target, config.seed, 1)
    probe = ProbeConfig(estimator="sketch", layer=config.probe.layer)

    def columns(examples: Any, lengths: Any, keys: Iterable[tuple[str, ...]]) -> dict[str, Tensor]:
        names = list(dict.fromkeys(name for key in keys for name in key))
        by_name: dict[str, Tensor] = {}
        for several in (["gradient"], [name for name in names if name != "gradient"]):
            if set(several) & set(names):
                settings: dict[str, Any] = {"seed": config.seed, "progress": progress}
                signals = signals_of_examples(model, examples, lengths, probe, several[0], several[1:], **settings)
                assert signals.vectors is not None
                widths = list(signals.widths.values()) or [signals.vectors.shape[1]]
                by_name |= dict(zip(several, signals.vectors.split(widths, dim=1), strict=True))
        return by_name

    own = columns(sample.examples, sample.lengths, compares)
    near = {}
    if target is not None:
        near = columns(target, target.lengths, [key for key, with_target in compares.items() if with_target])
    scored = {}
    for key, with_target in compares.items():
        vectors = torch.cat([own[name] for name in key], dim=1)
        widths = {} if key == ("gradient",) else {name: own[name].shape[1] for name in key}
        finite = torch.isfinite(vectors).all(dim=1)
        scored[key] = ScoredSample(
            Signals(torch.arange(len(vectors)), finite, vectors=vectors, widths=widths),
            parts if "gradient" in key else None,
            torch.cat([near[name] for name in key], dim=1) if with_target else None,
            stream if with_target else None,
        )
    return scored
