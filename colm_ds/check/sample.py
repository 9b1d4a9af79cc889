"""Draw a sample of a run's examples, and measure the inner products of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colm_ds.batching.assign import micro_batches
from colm_ds.batching.loader import LargeBatchLoader
from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.check.errors_of_coresets import GradientGram
from colm_ds.config.colm import CoLMSection
from colm_ds.errors import ConfigError, ProbeError
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.probe.gradient_sketch import (
    MAX_TOKENS,
    TABLE_BYTES,
    GradientSketch,
    fitting_side,
    is_fresh_adapter,
)
from colm_ds.process.progress import Progress
from colm_ds.types import Example, SourcedDataset

LEAST_EXAMPLES, LARGE_BATCHES = 256, 4
"""Minimum examples of a sample, and minimum number of large batches."""

_COLUMNS = 1 << 14
"""Entries of the sketches that are multiplied in float64 at a time."""


@dataclass(frozen=True)
class DrawnSample:
    """N examples of the run's first large batches; tensors `[N]`, and the padding facts of classification."""

    examples: list[Example]
    sources: Tensor
    indices: Tensor
    lengths: Tensor
    num_label_tokens: Tensor
    padded_lengths: Tensor

    def without(self, broken: Tensor) -> DrawnSample:
        """Return the sample without some of its examples, bool `[N]`."""
        kept = (~broken).nonzero().flatten()
        tensors = (self.sources, self.indices, self.lengths, self.num_label_tokens, self.padded_lengths)
        return DrawnSample([self.examples[place] for place in kept.tolist()], *(tensor[kept] for tensor in tensors))


@dataclass(frozen=True)
class MeasuredSample:
    """A sample with its measured gradients.

    Attributes:
        sample: the N examples, without those whose gradients are not finite.
        gram: inner products of their gradients.
        by_part: the same for each part of the model (`GradientSketch.parts`).
        exact: gradients of the probed matrices, float32 `[N, d]`; None if the family is unknown or they are too large.
        architecture: parts of the model with the probed matrices; None if `exact` is.
        side: side of the sketches.
        num_modules: number of measured matrices.
        notes: what was left out, and why, in sentences.
    """

    sample: DrawnSample
    gram: GradientGram
    by_part: Mapping[str, GradientGram]
    exact: Tensor | None
    architecture: Architecture | None
    side: int
    num_modules: int
    notes: tuple[str, ...]

    @property
    def parts(self) -> dict[str, GradientGram]:
        """Return the inner products of each part's gradients, and of `all`."""
        return {**self.by_part, "all": self.gram}


def measure_sample(
    model: nn.Module,
    config: CoLMSection,
    data: SourcedDataset,
    num_examples: int | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> MeasuredSample:
    """Sketch the gradients of the run's first examples.

    Args:
        model: the model on its device, bare or in a `PeftModel`.
        config: the `"colm"` section.
        data: the training examples.
        num_examples: N; default: the larger of `LEAST_EXAMPLES` and `LARGE_BATCHES` large batches.
        max_tokens: padded tokens of one pass.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: if there are too few examples for two large batches.
        ProbeError: if no matrix is trained.
    """
    large = config.large_batch_size
    sample = _drawn_sample(data, config, num_examples or max(LEAST_EXAMPLES, LARGE_BATCHES * large))
    check_enough(len(sample.examples), large)
    architecture, notes = _probed_part(model, config, len(sample.examples))
    side = fitting_side(model, len(sample.examples))
    sketch = GradientSketch(
        model, config.seed, side, exact=() if architecture is None else architecture.targets, name="check"
    )
    if is_fresh_adapter(model):
        notes.append("Every lora_B is zero, so that lora_A has no gradient yet: B alone is measured. See --at.")
    if others := [name for name in sketch.left_out if ".lora_A." not in name or not is_fresh_adapter(model)]:
        notes.append(f"Not measured: {len(others)} trained tensors of other kinds, such as {others[0]}.")
    table, exact = _sketch_all(sketch, sample, max_tokens, progress)
    broken = ~(torch.isfinite(table).all(dim=1) & torch.isfinite(exact).all(dim=1))
    if bool(broken.any()):
        notes.append(f"{int(broken.sum())} examples are left out, as their gradients are not finite.")
        sample, table, exact = sample.without(broken), table[~broken], exact[~broken]
        check_enough(len(sample.examples), large)
    by_token = config.loss_normalization == "token"
    parts = sample.num_label_tokens.float() if by_token else None
    divisors = torch.ones(len(table)).double() if parts is None else parts.double()
    by_part = {
        name: GradientGram(_products(table[:, columns], parts), divisors, by_token)
        for name, columns in sketch.parts().items()
    }
    everything = sum((part.products for part in by_part.values()), torch.zeros(len(table), len(table)).double())
    return MeasuredSample(
        sample=sample,
        gram=GradientGram(everything, divisors, by_token),
        by_part=by_part,
        exact=None if architecture is None else exact,
        architecture=architecture,
        side=side,
        num_modules=len(sketch.linears) + len(sketch.tokens),
        notes=tuple(notes),
    )


def _drawn_sample(data: SourcedDataset, config: CoLMSection, count: int) -> DrawnSample:
    """Return up to `count` different examples of the run's first large batches, within one pass over the data."""
    loader = LargeBatchLoader(data, config.large_batch_size, seed=config.seed, rank=0, world_size=1)
    batches, seen, step = [], 0, 1
    while seen < count and loader.epoch(step) == 0 and step <= count:
        batches.append(loader.batch(step))
        seen += batches[-1].size
        step += 1
    first: dict[int, tuple[int, int]] = {}
    for number, batch in enumerate(batches):
        for position, index in enumerate(batch.indices.tolist()):
            first.setdefault(index, (number, position))
    places = list(first.values())[:count]

    def of_each(key: str) -> Tensor:
        return torch.tensor([int(getattr(batches[number], key)[position]) for number, position in places])

    columns = [of_each(key) for key in ("sources", "indices", "lengths", "num_label_tokens", "padded_lengths")]
    return DrawnSample([batches[number].examples[position] for number, position in places], *columns)


def check_enough(num_examples: int, large: int) -> None:
    """Raise a ConfigError if a sample would hold fewer than two large batches."""
    if num_examples < 2 * large:
        raise ConfigError(
            f"{num_examples} examples: fewer than two large batches of colm.large_batch_size = {large}. Give more "
            "data or --examples, or check with a smaller r."
        )


def _probed_part(model: nn.Module, config: CoLMSection, num_examples: int) -> tuple[Architecture | None, list[str]]:
    """Return the parts of the model that the estimators read, or None and the reason why they cannot."""
    try:
        architecture = find_architecture(model, config.probe.layer)
    except ProbeError as error:
        return None, [f"exact, sketch and spsa are left out: {error}"]
    needed = 4 * num_examples * architecture.num_coordinates
    if needed > TABLE_BYTES:
        why = f"the gradients of {config.probe.layer} of {num_examples} examples take {needed / 2**30:.1f} GiB"
        return None, [f"exact, sketch and spsa are left out: {why}. Check fewer (--examples)."]
    return architecture, []


def _sketch_all(sketch: GradientSketch, sample: DrawnSample, max_tokens: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Return the sketches `[N, width]` and full gradients of the probed matrices `[N, d]`, float32 on the CPU."""
    count = len(sample.examples)
    (plan,) = micro_batches([list(range(count))], sample.padded_lengths, max_tokens=max_tokens)
    table, exact = torch.zeros(count, sketch.width), torch.zeros(count, sketch.num_exact)
    with Progress("gradients", count, "examples", shown=progress) as bar:
        for places in plan:
            micro = make_micro_batch([sample.examples[place] for place in places]).to(sketch.device)
            rows, whole = sketch.with_exact(micro)
            table[places], exact[places] = rows.float().cpu(), whole.float().cpu()
            bar.advance(len(places))
    return table, exact


def _products(table: Tensor, parts: Tensor | None) -> Tensor:
    """Return the Gram matrix of sketches, each times its part, float64 `[N, N]`."""
    products = torch.zeros(len(table), len(table), dtype=torch.float64)
    for start in range(0, table.shape[1], _COLUMNS):
        columns = table[:, start : start + _COLUMNS].double()
        products.addmm_(columns, columns.T)
    return products if parts is None else products * parts.double()[:, None] * parts.double()
