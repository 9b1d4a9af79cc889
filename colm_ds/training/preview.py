"""Show what a recipe would train on, without training: sources, lengths, examples, and one selected coreset."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from colm_ds.batching.loader import LargeBatchLoader, source_counts
from colm_ds.batching.sources import small_source_ids
from colm_ds.config.colm import OWN_WEIGHTS, CoLMSection
from colm_ds.data import TokenDataset
from colm_ds.data.choice_dataset import ChoiceDataset
from colm_ds.data.examples import describe_read
from colm_ds.data.holdout import count_common
from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.errors import ConfigError
from colm_ds.models.model_fit import check_model_fits
from colm_ds.randomness import seed_global_generators
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.recipe import BaseRecipe, ChoiceRecipe, Recipe
from colm_ds.selection import sees_sources
from colm_ds.training.start_summary import is_weighted
from colm_ds.training.tasks import with_steps
from colm_ds.training.tasks.choices import load_choice_data
from colm_ds.training.tasks.instructions import load_data, load_target
from colm_ds.types import Coreset, Example, LargeBatch

Data = TokenDataset | ChoiceDataset

_BAR = 40
_BINS = 12


def preview(recipe: BaseRecipe, *, num_examples: int = 3, with_coreset: bool = True) -> str:
    """Return the preview as one text.

    Args:
        recipe: recipe of the run.
        num_examples: number of examples to show in full.
        with_coreset: also load the model, probe one large batch and show its coreset.

    Raises:
        ConfigError, DataError, ProbeError: as training would.
    """
    if not isinstance(recipe, (Recipe, ChoiceRecipe)):
        raise ConfigError("preview shows rows of text and classification tasks; this recipe is of another kind.")
    section = recipe.resolve_section()
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer_place)
    train: Data
    heldout: Data | None
    if isinstance(recipe, ChoiceRecipe):
        train, heldout = load_choice_data(recipe, tokenizer)
    else:
        train, heldout = load_data(recipe, tokenizer)
    section = section.model_copy(update={"replay": "off"})  # nothing is trained that it could speed up
    parts = [
        *(["\n".join(read)] if (read := describe_read(getattr(train, "read", {}))) else []),
        describe_sources(recipe, train, heldout),
        *_described_overlap(recipe, train, heldout),
        describe_lengths(train, recipe.data.max_length),
        *(describe_example(train, index, tokenizer) for index in one_of_each(train.source_ids, num_examples)),
    ]
    if with_coreset:
        parts.append(describe_coreset(recipe.model_copy(update={"colm": section}), train, tokenizer, heldout))
    return "\n\n".join(parts)


def describe_sources(recipe: Recipe | ChoiceRecipe, train: Data, heldout: Data | None) -> str:
    """Describe the sources: examples and tokens of each, which are small, and what was dropped."""
    counts = source_counts(train)
    kept_whole = sees_sources(recipe.colm.selector, recipe.colm.outer_rules)
    small = set(small_source_ids(recipe.colm, counts)) if kept_whole else set()
    limit = len(train) / len(counts)
    width = max(map(len, counts))
    lines = [f"{'source':{width}} {'examples':>9} {'share':>7} {'tokens':>11} {'trained':>11}  kept whole"]
    for number, (name, count) in enumerate(counts.items()):
        mine = train.source_ids == number
        tokens, trained = int(train.lengths[mine].sum()), int(train.num_label_tokens[mine].sum())
        kept = "yes" if number in small else ""
        lines.append(f"{name:{width}} {count:>9,} {count / len(train):>7.1%} {tokens:>11,} {trained:>11,}  {kept}")
    total, trained = int(train.lengths.sum()), int(train.num_label_tokens.sum())
    lines.append(f"{'all':{width}} {len(train):>9,} {1:>7.0%} {total:>11,} {trained:>11,}")
    lines.append(
        f"small: fewer than |V|/c = {limit:,.1f} examples"
        if kept_whole and recipe.colm.small_sources in ("auto", "below_mean")
        else ""
    )
    steps = with_steps(recipe, train).steps
    passes = steps * recipe.colm.large_batch_size / len(train)
    looked_at = "passes over the data differ by file, as files have weights"
    if not is_weighted(recipe):
        looked_at = f"in which {passes:.2f} passes over the data are inspected"
    lines.append(f"steps: {steps:,}, {looked_at}")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in train.num_dropped.items() if count) or "none"
    lines.append(f"dropped: {dropped}; held out: {0 if heldout is None else len(heldout):,} examples")
    if recipe.clusters is not None:
        after = ", ".join(map(str, recipe.clusters.steps(steps)))
        lines.append(f"clusters take the place of these sources after {after} steps")
    return "\n".join(line for line in lines if line)


def _described_overlap(recipe: Recipe | ChoiceRecipe, train: Data, heldout: Data | None) -> list[str]:
    """Say how many examples of a held-out file are trained on too, if any are."""
    if recipe.data.heldout is None or not isinstance(train, TokenDataset) or not isinstance(heldout, TokenDataset):
        return []
    common = count_common(train, heldout)
    return [f"WARNING: {common:,} of {len(heldout):,} held-out examples are trained on too."] * bool(common)


def describe_lengths(train: Data, max_length: int) -> str:
    """Draw a histogram of lengths in tokens, with quartiles and the number of truncated examples."""
    lengths = np.asarray(train.lengths)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    quartiles = np.percentile(lengths, [25, 50, 75]).astype(int).tolist()
    cut = int((lengths >= max_length).sum())
    head = f"length in tokens: quartiles {quartiles[0]}, {quartiles[1]}, {quartiles[2]}; longest {lengths.max()}; "
    lines = [head + f"{cut:,} examples ({cut / len(lengths):.1%}) reach data.max_length = {max_length}"]
    for (start, stop), count in zip(pairwise(edges.tolist()), counts, strict=True):
        bar = "#" * round(_BAR * count / max(1, counts.max()))
        lines.append(f"{start:>6} - {stop - 1:<6} {count:>8,} {bar}".rstrip())
    return "\n".join(lines)


def describe_example(train: Data, index: int, tokenizer: Any) -> str:
    """Show one example as the model sees it, with trained tokens between >>> and <<<."""
    example = train[index]
    trained = example.labels != -100
    name = train.source_names[int(train.source_ids[index])]
    if example.candidates is not None:
        prompt = tokenizer.decode(example.input_ids[: int(trained.nonzero()[0])])
        answers = _answers(example, tokenizer)
        head = f"example {index:,} ({name}): {int(train.lengths[index])} tokens computed, {len(answers)} candidates"
        return f"{head}\n{prompt}>>>{answers.pop(example.candidates.gold)}<<< and not {' or '.join(answers)}"
    num_trained = int(train.num_label_tokens[index])
    head = f"example {index:,} ({name}): {len(trained)} tokens, {num_trained} of them trained"
    starts = [0, *(trained.diff().nonzero().flatten() + 1).tolist(), len(trained)]
    parts = [tokenizer.decode(example.input_ids[start:end]) for start, end in pairwise(starts)]
    marked = (f">>>{part}<<<" if trained[start] else part for part, start in zip(parts, starts, strict=False))
    return head + "\n" + "".join(marked)


def _answers(example: Example, tokenizer: Any) -> list[str]:
    """Return the texts after the prompt: the responses from the first on, or the candidates."""
    sizes = [len(example.labels)] if example.candidates is None else list(example.candidates.lengths)
    parts = zip(example.input_ids.split(sizes), example.labels.split(sizes), strict=True)
    return [tokenizer.decode(ids[int((labels != -100).nonzero()[0]) :]) for ids, labels in parts]


def describe_coreset(recipe: Recipe | ChoiceRecipe, train: Data, tokenizer: Any, heldout: Data | None = None) -> str:
    """Describe the first large batch of the run on one device, and its coreset."""
    seed_global_generators(recipe.seed)
    model = load_model(recipe.model, recipe.lora, tokenizer)
    check_model_fits(model, train)
    selector = CoresetSelector(
        model,
        recipe.colm,
        train,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        dataset=train,
        target=_target_of(recipe, tokenizer, train, heldout),
        learning_rate=lambda: recipe.optimizer.lr,
        by_engine=True,
    )
    kept_sources = small_source_ids(recipe.colm, source_counts(train))
    loader = LargeBatchLoader(
        train, recipe.colm.large_batch_size, seed=recipe.colm.seed, rank=0, world_size=1, kept_sources=kept_sources
    )
    batch = next(iter(loader))
    coreset = selector(batch).coreset
    by_example = _by_example(train, batch, coreset, tokenizer, recipe.colm)
    return "\n".join([*_by_source(train, batch, coreset, recipe.colm), "", *by_example])


def _target_of(recipe: Recipe | ChoiceRecipe, tokenizer: Any, train: Data, heldout: Data | None) -> TokenDataset | None:
    if not isinstance(recipe, Recipe) or not isinstance(train, TokenDataset):
        return None
    return load_target(recipe, tokenizer, train, heldout if isinstance(heldout, TokenDataset) else None)[0]


def _by_source(train: Data, batch: LargeBatch, coreset: Coreset, config: CoLMSection) -> list[str]:
    kept = set(coreset.positions[: coreset.num_kept].tolist())
    chosen = set(coreset.positions.tolist())
    width = max(map(len, train.source_names))
    lines = [f"step 1: {coreset.size} of {batch.size} examples", f"{'source':{width}} {'seen':>5} {'kept':>5}  why"]
    for number, name in enumerate(train.source_names):
        seen = (batch.sources == number).nonzero().flatten().tolist()
        if not seen:
            continue
        mine = [position for position in seen if position in chosen]
        small = bool(mine) and all(position in kept for position in mine)
        why = "small source: all are kept" if small and len(mine) == len(seen) else ""
        if not why:
            why = _why_chosen(coreset, batch, number, config)
        lines.append(f"{name:{width}} {len(seen):>5} {len(mine):>5}  {why}")
    return lines


def _why_chosen(coreset: Coreset, batch: LargeBatch, source: int, config: CoLMSection) -> str:
    """Return how the examples of a source came into the coreset, if not as a small source."""
    if coreset.size == batch.size:
        return "all are trained on"
    if not sees_sources(config.selector, config.outer_rules):
        return "chosen among all, whatever their source"
    if not config.per_source:
        pool = coreset.coherence.get(-1)
        return "from one pool of all sources" + ("" if pool is None else f"; its coherence {pool:.2f}")
    coherence = coreset.coherence.get(source)
    picks = "drawn" if config.selector in OWN_WEIGHTS else "medoids"
    return "by its quota" if coherence is None else f"{picks} by its quota; coherence {coherence:.2f}"


def _by_example(train: Data, batch: LargeBatch, coreset: Coreset, tokenizer: Any, config: CoLMSection) -> list[str]:
    place = {position: number for number, position in enumerate(coreset.positions.tolist())}
    picks = _pick_numbers(batch, coreset)
    width = max(map(len, train.source_names))
    lines = [f"{'example':>8} {'source':{width}} {'tokens':>6}  {'in the coreset':20} begins with"]
    for position in range(batch.size):
        number = place.get(position)
        if number is None:
            kept = "-"
        elif number < coreset.num_kept:
            kept = "kept (small source)"
        else:
            weight = float(coreset.weights[number])
            pick = "drawn" if config.selector in OWN_WEIGHTS else f"pick {picks[position]}"
            kept = pick + (f", weight {weight:.2f}" if weight != 1 else "")
        example = batch.examples[position]
        answers = _answers(example, tokenizer)
        answer = answers[0 if example.candidates is None else example.candidates.gold]
        name = train.source_names[int(batch.sources[position])]
        shown = " ".join(answer.split())[:50]
        lines.append(
            f"{int(batch.indices[position]):>8} {name:{width}} {int(batch.lengths[position]):>6}  {kept:20} {shown}"
        )
    return lines


def one_of_each(source_ids: np.ndarray, count: int) -> list[int]:
    """Return `count` examples that take turns over the sources: the first of each, then the second of each."""
    order = np.argsort(source_ids, kind="stable")
    _, starts, sizes = np.unique(source_ids[order], return_index=True, return_counts=True)
    turn = np.arange(len(order)) - np.repeat(starts, sizes)
    return order[np.argsort(turn, kind="stable")][:count].tolist()


def _pick_numbers(batch: LargeBatch, coreset: Coreset) -> dict[int, int]:
    """Return the order in which medoids were picked, counted within each pool."""
    numbers: dict[int, int] = {}
    num_picked: dict[int, int] = {}
    for position in coreset.positions[coreset.num_kept :].tolist():
        source = int(batch.sources[position])
        pool = source if source in coreset.coherence else -1
        num_picked[pool] = numbers[position] = num_picked.get(pool, 0) + 1
    return numbers
