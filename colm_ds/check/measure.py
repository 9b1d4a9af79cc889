"""Load a recipe's model and data, sketch the gradients of a sample, and measure every way to choose a coreset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from colm_ds.batching.loader import source_counts
from colm_ds.batching.sources import small_source_ids
from colm_ds.check.errors_of_coresets import LargeBatches, coreset_errors
from colm_ds.check.other_selectors import ScoredSample, other_ways, score_sample
from colm_ds.check.prices import price_of_ways
from colm_ds.check.sample import DrawnSample, check_enough, measure_sample
from colm_ds.check.signals_of_sample import SampleFacts
from colm_ds.check.verdict import MeasuredWay, measured_way, recommend
from colm_ds.check.ways_to_choose import WayToChoose, picks_at_random, resets, ways_to_choose
from colm_ds.config.colm import CoLMSection, ProbeConfig
from colm_ds.engine.token_table import occurring_ids
from colm_ds.errors import ConfigError, ProbeError
from colm_ds.export.run import load_at_start, put_weights_at
from colm_ds.models.model_fit import check_model_fits
from colm_ds.probe.gradient_sketch import (
    MAX_TOKENS,
)
from colm_ds.probe.tokens import example_features, vectors_of_model, vocabulary_size
from colm_ds.process.progress import Progress
from colm_ds.randomness import private_generator
from colm_ds.recipes.model import load_tokenizer
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.selection import SINGLE_PROCESS, Signals
from colm_ds.training.tasks import load_task
from colm_ds.types import Coreset, SourcedDataset

LEAST_EXAMPLES, LARGE_BATCHES = 256, 4
"""Minimum examples of a sample, and minimum number of large batches."""

NUM_BATCHES = 30

_COLUMNS = 1 << 14
"""Entries of the sketches that are multiplied in float64 at a time."""


@dataclass(frozen=True)
class CheckResult:
    """Result of a check.

    Attributes:
        name: name of the recipe.
        size: b.
        large: r.
        steps: n, optimizer steps of the run.
        num_examples: N.
        num_batches: K.
        side: side of the gradient sketches.
        num_modules: number of trained matrices.
        variance: V, squared error of the mean gradient of b random examples, relative to |mean gradient|^2.
        ways: every way to choose, the lowest kappa first.
        recommendation: one sentence.
        notes: remarks for the reader, in sentences.
        weights: origin of the weights, in words.
        recipe_is_random: whether the recipe picks at random.
    """

    name: str
    size: int
    large: int
    steps: int
    num_examples: int
    num_batches: int
    side: int
    num_modules: int
    variance: float
    ways: tuple[MeasuredWay, ...]
    recommendation: str
    notes: tuple[str, ...]
    weights: str
    recipe_is_random: bool


def check_recipe(
    recipe: BaseRecipe,
    *,
    num_examples: int | None = None,
    num_batches: int = NUM_BATCHES,
    at: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    all_selectors: bool = False,
    target: str | None = None,
    progress: bool = False,
) -> CheckResult:
    """Measure what every way to choose coresets is worth on a recipe's model and data.

    Args:
        recipe: read from its file.
        num_examples: N; default: the larger of `LEAST_EXAMPLES` and `LARGE_BATCHES` large batches.
        num_batches: minimum number of large batches to choose from.
        at: folder of a run or checkpoint whose trained weights are used; default: the weights at the start.
        max_tokens: padded tokens of one pass.
        all_selectors: whether to measure the baselines and the other systems too.
        target: file of records for those of them that compare with a target.
        progress: whether to show progress bars.

    Raises:
        ConfigError, DataError, CheckpointError, ProbeError: as training would, and if there is nothing to choose.
    """
    config = checked_section(recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    if target is not None:
        named = recipe.colm.target.model_copy(update={"data": target})
        recipe = recipe.model_copy(update={"colm": recipe.colm.model_copy(update={"target": named})})
    task = load_task(recipe, tokenizer)
    data = task.train
    check_enough(min(num_examples or len(data), len(data)), config.large_batch_size)  # now: loading a model takes long
    model = load_at_start(recipe, tokenizer)
    vectors = None
    if at is not None:
        with suppress(ProbeError):  # `check_model` meets it again, and says what it leaves out
            vectors = _token_vectors(model, config, data)
    weights = put_weights_at(model, recipe, at)
    on_gpu = torch.cuda.is_available()
    result = check_model(
        model.to("cuda" if on_gpu else "cpu"),
        config,
        data,
        price=price_of_ways(recipe, data, int(config.coreset_size or 0), config.large_batch_size, on_gpu=on_gpu),
        steps=recipe.steps,
        name=recipe.name,
        weights=weights,
        num_examples=num_examples,
        num_batches=num_batches,
        max_tokens=max_tokens,
        all_selectors=all_selectors,
        target=task.target,
        learning_rate=recipe.optimizer.lr,
        vectors=vectors,
        progress=progress,
    )
    notes = list(result.notes)
    if getattr(recipe, "clusters", None) is not None:
        notes.append("The recipe's clusters are made while it trains; sources are those of the data here.")
    if at is None and recipe.model.config is not None:
        notes.append("The weights are random, and soon others: look again after some twenty steps (--at).")
    return replace(result, notes=tuple(notes))


def checked_section(recipe: BaseRecipe) -> CoLMSection:
    """Return the recipe's `"colm"` section, b filled in.

    Raises:
        ConfigError: listing every problem, or if b is r.
    """
    config = recipe.resolve_section()
    if config.coreset_size == config.large_batch_size:
        raise ConfigError(
            f"colm.coreset_size = {config.coreset_size}: all of the large batch, so there is nothing to choose. Check "
            "with the r that you have in mind, for example colm.selector=auto "
            f"colm.large_batch_size={2 * config.large_batch_size}."
        )
    return config


def check_model(
    model: nn.Module,
    config: CoLMSection,
    data: SourcedDataset,
    *,
    price: Callable[[WayToChoose], float],
    steps: int,
    name: str = "run",
    weights: str = "as training begins",
    num_examples: int | None = None,
    num_batches: int = NUM_BATCHES,
    max_tokens: int = MAX_TOKENS,
    all_selectors: bool = False,
    target: SourcedDataset | None = None,
    learning_rate: float | None = None,
    vectors: Tensor | None = None,
    progress: bool = False,
) -> CheckResult:
    """Measure what every way to choose coresets is worth on a model and data.

    Args:
        model: the model on its device, bare or in a `PeftModel`.
        config: the `"colm"` section, `coreset_size` filled in.
        data: the training examples.
        price: returns the price of a way to choose: its step over plain training's on b.
        steps: n, optimizer steps of the run.
        name: name of the run.
        weights: origin of the model's weights, in words.
        num_examples: see `check_recipe`.
        num_batches: see `check_recipe`.
        max_tokens: see `check_recipe`.
        all_selectors: see `check_recipe`.
        target: examples for those of them that compare with a target.
        learning_rate: of the run's optimizer.
        vectors: those of `tokens`, which a run keeps from its start; None: of the model's embeddings as they are.
        progress: see `check_recipe`.

    Raises:
        ConfigError: if there are too few examples for two large batches, or the model does not fit the data.
        ProbeError: if no matrix is trained, or too many gradients are not finite.
    """
    check_model_fits(model, data)
    size, large = int(config.coreset_size or 0), config.large_batch_size
    measured = measure_sample(model, config, data, num_examples, max_tokens=max_tokens, progress=progress)
    sample, gram, architecture, notes = measured.sample, measured.gram, measured.architecture, list(measured.notes)
    parts = gram.parts.float() if gram.by_token else None
    facts = SampleFacts(
        sources=sample.sources,
        lengths=sample.lengths,
        num_label_tokens=sample.num_label_tokens,
        indices=sample.indices,
        parts=parts,
        features=_features(model, config, data, sample, vectors, notes),
        exact=measured.exact,
        shapes=() if architecture is None else tuple((t.out_features, t.in_features) for t in architecture.targets),
        learning_rate=learning_rate,
    )
    small = small_source_ids(config, source_counts(data))
    hidden_size = None if architecture is None else architecture.hidden_size
    compared = ways_to_choose(config, small, facts, len(data.source_names), hidden_size)
    scored: dict[tuple[str, ...], ScoredSample] = {}
    if all_selectors:
        others = other_ways(config, facts, len(data.source_names), target is not None)
        scored = score_sample(model, config, sample, others.ways, parts, target, progress)
        compared.ways += others.ways
        compared.notes += others.notes
    batches = LargeBatches.draw(len(sample.examples), large, num_batches, config.seed)
    coresets = _coresets(compared.ways, facts, scored, batches, size, config.seed, progress)
    errors = coreset_errors(gram, batches, coresets, measured.by_part)
    everything = torch.arange(len(sample.examples))
    variance = gram.variance(everything) / size / gram.mean_square()
    ways = [
        measured_way(way, error, price(way), variance, size, large, steps)
        for way, error in zip(compared.ways, errors, strict=True)
    ]
    ways.sort(key=lambda way: way.error.kappa)
    return CheckResult(
        name=name,
        size=size,
        large=large,
        steps=steps,
        num_examples=len(sample.examples),
        num_batches=len(batches.examples),
        side=measured.side,
        num_modules=measured.num_modules,
        variance=variance,
        ways=tuple(ways),
        recommendation=recommend(ways, size, large, steps, resets(config, "random", None)),
        notes=(*_by_part(ways), *notes, *compared.notes),
        weights=weights,
        recipe_is_random=picks_at_random(config),
    )


def _features(
    model: nn.Module,
    config: CoLMSection,
    data: SourcedDataset,
    sample: DrawnSample,
    vectors: Tensor | None,
    notes: list[str],
) -> Tensor | None:
    """Return features of `tokens` with `length_power: 0`, float32 `[N, K]`; None, with a note, if there are none."""
    try:
        vectors = _token_vectors(model, config, data) if vectors is None else vectors
        features = example_features(sample.examples, vectors, 0.0)
    except ProbeError as error:
        notes.append(f"tokens is left out: {error}")
        return None
    if not bool(torch.isfinite(features).all()):
        notes.append("tokens is left out: the input embeddings hold numbers that are not finite.")
        return None
    return features


def _token_vectors(model: nn.Module, config: CoLMSection, data: SourcedDataset) -> Tensor:
    """Return the vectors of `tokens` by a model's embeddings as they are, as training makes them at its start."""
    occurs = occurring_ids(data, vocabulary_size(model), SINGLE_PROCESS, 0)
    return vectors_of_model(model, config.seed, SINGLE_PROCESS, occurs)


def _coresets(
    ways: Sequence[WayToChoose],
    facts: SampleFacts,
    scored: Mapping[tuple[str, ...], ScoredSample],
    batches: LargeBatches,
    size: int,
    seed: int,
    progress: bool,
) -> list[list[Coreset]]:
    """Return the coresets of every way to choose, a list each; ways that share a batch's signals compute them once.

    Quotas carry over from a batch to that at the same place of the next round: so the errors of one round's batches,
    of whose products the bias is made, are independent.
    """
    coresets: list[list[Coreset]] = [[] for _ in ways]
    per_round = int((batches.rounds == 0).sum())
    sources = facts.sources.unique().tolist()
    carries = [[_first_carry(sources, seed, chain) for chain in range(per_round)] for _ in ways]
    with Progress("choosing", len(batches.examples), "batches", shown=progress) as bar:
        for number, examples in enumerate(batches.examples):
            made: list[tuple[ProbeConfig, Signals]] = []
            for place, way in enumerate(ways):
                signals = None
                if way.signal_key is not None:
                    signals = scored[way.signal_key].of(examples, number + 1)
                elif way.needs_signal:
                    signals = next((known for probe, known in made if probe == way.probe), None)
                    if signals is None:
                        signals = facts.signals(way.probe, examples, number + 1, seed)
                        made.append((way.probe, signals))
                chain = number % per_round
                coreset = way.choose(facts, batches, number, size, signals, carries[place][chain])
                if coreset.carry is not None:
                    carries[place][chain] = coreset.carry
                coresets[place].append(coreset)
            bar.advance()
    return coresets


def _by_part(ways: Sequence[MeasuredWay]) -> list[str]:
    """Return a note about kappa in each part of the model, for the recipe's way or else that with the lowest one."""
    shown = next((way for way in ways if way.way.is_recipe), ways[0])
    if not shown.error.kappa_by_part:
        return []
    numbers = ", ".join(f"{name} {kappa:.2f}" for name, kappa in shown.error.kappa_by_part.items())
    return [f"kappa of {shown.way.name} by part of the model, each of which Adam scales by itself: {numbers}."]


def _first_carry(sources: Sequence[int], seed: int, chain: int) -> dict[int, float]:
    """Return a carry-over as in the midst of a run: what is left of a rounding, by source id, of sum 0."""
    rest = torch.rand(len(sources), generator=private_generator(seed, "check carry", chain), dtype=torch.float64)
    return dict(zip(sources, (rest - rest.mean()).tolist(), strict=True))
