"""Ways to choose a coreset that a check compares: signal x scope x weights, draws, quotas, the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from colm_ds.check.errors_of_coresets import LargeBatches
from colm_ds.check.signals_of_sample import SampleFacts
from colm_ds.config.colm import OWN_WEIGHTS, CoLMSection, ProbeConfig
from colm_ds.selection import (
    SINGLE_PROCESS,
    SelectionSettings,
    SelectorContext,
    Signals,
    make_selector,
    needs_of,
    signal_of,
)
from colm_ds.types import Coreset, LargeBatch

ESTIMATORS = ("tokens", "exact", "sketch", "spsa")
"""Signals to compare; `projection` only if the recipe names it."""

WEIGHTS = ("uniform", "cluster", "matched")

JOINT, BY_SOURCE = "one pool", "per source"

RECIPE = "this recipe"

DEFAULT = f"importance by tokens, {JOINT}"
"""The way to choose of `colm.probe.estimator: tokens` with its defaults."""


@dataclass(frozen=True)
class WayToChoose:
    """One way to choose b of r.

    Attributes:
        name: name in tables.
        selector: one of `SELECTORS`.
        probe: the estimator and its settings.
        settings: settings of the selection.
        small: ids of sources that are kept whole.
        keys: the keys of a recipe for it.
        options: options of the selector.
        outer_rules: see `SelectorContext`.
        signal_key: signal and further scores that it goes by, if they are not an estimator's; see `ScoredSample`.
        is_recipe: whether it is the recipe's own.
    """

    name: str
    selector: str
    probe: ProbeConfig
    settings: SelectionSettings
    small: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    outer_rules: str = "auto"
    signal_key: tuple[str, ...] | None = None
    is_recipe: bool = False

    @property
    def needs_signal(self) -> bool:
        """Return whether it needs estimated gradients."""
        return signal_of(self.selector, dict(self.options)) is not None

    @property
    def passes_model(self) -> bool:
        """Return whether a training step passes the large batch through the model for it."""
        return self.needs_signal and self.probe.passes_model

    def same_choice(self, other: WayToChoose) -> bool:
        """Return whether both always make the same choice."""
        mine, theirs = (
            (*(way.selector, way.settings, way.small, way.options, way.outer_rules), way.needs_signal and way.probe)
            for way in (self, other)
        )
        return mine == theirs

    def choose(
        self,
        facts: SampleFacts,
        batches: LargeBatches,
        number: int,
        size: int,
        signals: Signals | None,
        carry: dict[int, float],
    ) -> Coreset:
        """Return the coreset of a large batch, chosen by training's own selector.

        Args:
            facts: facts of the sample.
            batches: large batches drawn from it.
            number: 0-based index of the batch.
            size: b.
            signals: signals of the batch's examples.
            carry: carry-over of the quotas up to the batch before, by source id, if they carry over.
        """
        examples = batches.examples[number]
        batch = LargeBatch(
            step=number + 1,
            indices=facts.indices[examples],
            sources=facts.sources[examples],
            lengths=facts.lengths[examples],
            num_label_tokens=facts.num_label_tokens[examples],
            home=torch.zeros_like(examples),
            examples={},
            lr=facts.learning_rate,
            carry=carry,
        )
        context = SelectorContext(
            size, self.small, self.settings, options=dict(self.options), outer_rules=self.outer_rules
        )
        selector = make_selector(self.selector, context)
        return selector.select(batch, signals, SINGLE_PROCESS)


@dataclass
class WaysCompared:
    """Ways that a check compares.

    Attributes:
        ways: without random picks, whose kappa is 1 by definition.
        notes: what was left out or differs from training, in sentences.
    """

    ways: list[WayToChoose] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ways_to_choose(
    config: CoLMSection, small: Sequence[int], facts: SampleFacts, num_sources: int, hidden_size: int | None
) -> WaysCompared:
    """Return all ways that can be compared on a sample, the recipe's own marked, and last if it is a different one.

    Args:
        config: the recipe's section.
        small: ids of the small sources that it keeps.
        facts: facts of the sample.
        num_sources: c; with one source, pools by source are the joint pool.
        hidden_size: hidden size of the model, the mask's `auto` size; None: no mask.
    """
    compared, carries = WaysCompared(), config.quotas == "carry"
    scopes = [(JOINT, False), *([(BY_SOURCE, True)] if num_sources > 1 else [])]
    for estimator in ESTIMATORS:
        if not facts.can(estimator):
            continue
        probe = ProbeConfig(estimator=estimator, layer=config.probe.layer)
        for scope, per_source in scopes:
            for weights in WEIGHTS:
                settings = SelectionSettings(
                    geometry="plain",
                    metric="euclidean" if estimator == "tokens" else "l1",
                    weights=weights,
                    per_source=per_source,
                    carries=carries,
                    mask_size=hidden_size if estimator in ("exact", "spsa") else None,
                    seed=config.seed,
                )
                name = f"{estimator}, {scope}, {weights}"
                compared.ways.append(WayToChoose(name, "colm", probe, settings, (), _keys("colm", probe, settings)))
    if facts.can("tokens"):
        probe = ProbeConfig(estimator="tokens")
        for selector, (scope, per_source) in product(OWN_WEIGHTS, scopes):
            settings = SelectionSettings(
                geometry="plain", metric="euclidean", per_source=per_source, carries=carries, seed=config.seed
            )
            name = f"{selector} by tokens, {scope}"
            compared.ways.append(WayToChoose(name, selector, probe, settings, (), _keys(selector, probe, settings)))
    if num_sources > 1:
        settings = SelectionSettings(geometry="plain", per_source=True, carries=carries, seed=config.seed)
        keys = ("colm.selector=keep_random", "colm.small_sources=none", "colm.per_source=true")
        compared.ways.append(WayToChoose("random by quotas", "keep_random", ProbeConfig(), settings, (), keys))
    compared.ways = [with_resets(way, config) for way in compared.ways]
    _add_recipe(compared, config, small, facts, hidden_size)
    return compared


def _add_recipe(
    compared: WaysCompared, config: CoLMSection, small: Sequence[int], facts: SampleFacts, hidden_size: int | None
) -> None:
    needs = needs_of(config.selector, config.options)
    signal = needs.signal
    if signal not in (None, "gradient"):
        compared.notes.append(f"The recipe's selector {config.selector!r} goes by a score; it is not compared.")
        return
    if needs.target or needs.past:
        what = "a target" if needs.target else "losses of earlier steps"
        compared.notes.append(f"The recipe's selector {config.selector!r} needs {what}; it is not compared.")
        return
    if picks_at_random(config) or config.selector == "full":
        return
    if signal is not None and not facts.can(config.probe.estimator):
        compared.notes.append(f"The recipe's own choice by {config.probe.estimator!r} cannot be compared here.")
        return
    if config.probe.is_stored:
        compared.notes.append("The recipe's sketches are from earlier steps, of which a check has none; not compared.")
        return
    masked = config.probe.estimator in ("exact", "spsa")
    settings = SelectionSettings(
        geometry="plain",
        metric=config.metric,
        weights=config.weights,
        per_source=config.per_source,
        small_share=1.0 if not small else None if config.small_share == "auto" else config.small_share,
        carries=config.quotas == "carry",
        mask_size=(hidden_size if config.mask.size == "auto" else config.mask.size) if masked else None,
        mask_criterion=config.mask.criterion if config.mask.criterion in ("grad", "random") else "grad",
        seed=config.seed,
    )
    way = WayToChoose(
        RECIPE,
        config.selector,
        config.probe,
        settings,
        tuple(small),
        ("as it is",),
        tuple(config.options.items()),
        config.outer_rules,
        is_recipe=True,
    )
    for place, other in enumerate(compared.ways):
        if way.same_choice(other):
            compared.ways[place] = replace(other, is_recipe=True)
            return
    compared.ways.append(way)
    if signal is None:
        return
    if config.geometry == "adam":
        compared.notes.append(
            f"{RECIPE!r} is measured with geometry: plain: Adam's needs the history of earlier steps, which a "
            "check does not have."
        )
    if config.probe.sample != 1.0 or config.probe.token_sample != 1.0:
        compared.notes.append(f"{RECIPE!r} is measured with probe.sample and probe.token_sample at 1.")
    if masked and config.mask.criterion not in ("grad", "random"):
        compared.notes.append(f"{RECIPE!r} is measured with mask.criterion: grad.")


def picks_at_random(config: CoLMSection) -> bool:
    """Return whether a recipe draws uniformly from the whole large batch."""
    return config.selector == "random" and config.outer_rules != "on"


def with_resets(way: WayToChoose, config: CoLMSection) -> WayToChoose:
    """Return a way to choose whose keys also take back what a recipe writes and this way would refuse."""
    selector, *others = way.keys
    missing = [key for key in resets(config, way.selector, way.probe) if key not in others]
    several = needs_of(way.selector, dict(way.options)).target and config.target.refresh > 1
    refresh = ["colm.probe.refresh=run"] if several and way.needs_signal else []
    return replace(way, keys=(selector, *missing, *others, *refresh))


def resets(config: CoLMSection, selector: str, probe: ProbeConfig | None) -> tuple[str, ...]:
    """Return `key=value` that take back a recipe's keys of other selectors.

    Args:
        config: the recipe's section.
        selector: the one to be written.
        probe: its signal; None: it needs none.
    """
    passes = probe is not None and probe.estimator != "tokens"
    signal = needs_of(selector).signal
    given = {
        "colm.options={}": bool(config.options),
        "colm.target={}": config.target.data is not None and not needs_of(selector).target,
        "colm.small_share=auto": config.small_share != "auto",
        "colm.outer_rules=auto": config.outer_rules != "auto",
        "colm.weights=uniform": config.weights != "uniform" and selector != "colm",
        "colm.geometry=adam": config.geometry != "adam" and selector == "opus",
        "colm.geometry=plain": config.geometry == "adam" and selector != "opus" and signal == "gradient",
        "colm.probe={}": config.probe.is_stored and signal not in (None, "gradient"),
        "colm.replay=auto": config.replay in ("on", "offload") and not passes,
    }
    return tuple(key for key, is_in_the_way in given.items() if is_in_the_way)


def probe_keys(probe: ProbeConfig) -> tuple[str, ...]:
    """Return `key=value` for a recipe that may write keys of another estimator, or options of another selector."""
    layer = "" if probe.estimator == "tokens" or probe.layer == ProbeConfig().layer else f", layer: {probe.layer}"
    return (f"colm.probe={{estimator: {probe.estimator}{layer}}}", "colm.mask={}", "colm.options={}")


def _keys(selector: str, probe: ProbeConfig, settings: SelectionSettings) -> tuple[str, ...]:
    """Return its settings as `key=value` for a recipe, in place of what the recipe writes about the probe."""
    return (
        f"colm.selector={selector}",
        *probe_keys(probe),
        "colm.small_sources=none",
        f"colm.per_source={str(settings.per_source).lower()}",
        f"colm.weights={settings.weights}",
        f"colm.metric={settings.metric}",
        "colm.geometry=plain",
    )
