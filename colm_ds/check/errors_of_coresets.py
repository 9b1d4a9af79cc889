"""Compute errors of coresets' mean gradients against their large batches', from the gradients' Gram matrix alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from colm_ds.probe.variance import worth_of
from colm_ds.randomness import private_generator
from colm_ds.types import Coreset


@dataclass(frozen=True)
class GradientGram:
    """Inner products of the gradients of N examples, from which all errors follow.

    Attributes:
        products: y_i . y_j, float64 `[N, N]`: y is the gradient of an example's mean loss, or in a mean over tokens of
            the sum of its token losses.
        parts: weight of each example in the divisor, float64 `[N]`: 1, or in a mean over tokens its labelled tokens.
        by_token: whether the step is a mean over tokens.
    """

    products: Tensor
    parts: Tensor
    by_token: bool

    def mean_square(self) -> float:
        """Return |mean gradient of all examples|^2."""
        return float(self.products.sum() / self.parts.sum() ** 2)

    def variance(self, examples: Tensor) -> float:
        """Return the sample variance of some examples' gradients, sum |y_i - p_i mean|^2 / (n - 1) / (mean p)^2.

        Divided by b and multiplied by 1 - b / n it is the expected squared error of the mean of a random b of them:
        exactly in a mean over examples, to first order in a mean over tokens.

        Args:
            examples: their indices, int64 `[n]`.
        """
        products, parts = self.products[examples][:, examples], self.parts[examples]
        n, total = len(examples), float(parts.sum())
        square = float(products.sum()) / total**2
        cross = float((products @ parts).sum()) / total
        spread = float(products.diagonal().sum()) - 2.0 * cross + float(parts.square().sum()) * square
        return max(0.0, spread) / (n - 1) / (total / n) ** 2

    def centred(self) -> Tensor:
        """Return (y_i - p_i mean) . (y_j - p_j mean), float64 `[N, N]`."""
        total = self.parts.sum()
        to_mean = self.products.sum(dim=1) / total
        crossed = to_mean[:, None] * self.parts + self.parts[:, None] * to_mean
        return self.products - crossed + self.parts[:, None] * self.parts * self.mean_square()

    def coefficients(self, batch: Tensor, coreset: Coreset) -> Tensor:
        """Return c, with sum of c_i y_i the coreset's mean gradient less the large batch's; float64 `[N]`.

        Args:
            batch: the examples of the large batch, int64 `[r]`.
            coreset: coreset of that batch.
        """
        weights = coreset.weights.double()
        chosen = batch[coreset.positions]
        divisor = (weights * self.parts[chosen]).sum() if self.by_token else float(coreset.size)
        difference = torch.zeros(len(self.parts), dtype=torch.float64)
        difference[batch] = -1.0 / self.parts[batch].sum()
        difference[chosen] += weights / divisor
        return difference


@dataclass(frozen=True)
class LargeBatches:
    """Large batches drawn from N examples.

    Attributes:
        examples: examples of each batch, int64 `[K, r]`.
        rounds: round of each batch, int64 `[K]`: batches of one round have no example in common.
    """

    examples: Tensor
    rounds: Tensor

    @classmethod
    def draw(cls, num_examples: int, size: int, count: int, seed: int) -> LargeBatches:
        """Cut random orders of the examples into batches until there are at least `count`.

        Args:
            num_examples: N, at least r.
            size: r.
            count: minimum number of batches; those of the last order are all taken.
            seed: seed of the orders.
        """
        per_round = num_examples // size
        batches, rounds = [], []
        for number in range(-(-count // per_round)):
            generator = private_generator(seed, "check batches", number)
            order = torch.randperm(num_examples, generator=generator)[: per_round * size]
            batches.append(order.view(per_round, size))
            rounds += [number] * per_round
        return cls(torch.cat(batches), torch.tensor(rounds))


@dataclass(frozen=True)
class CoresetError:
    """Error of one way to choose coresets, over its large batches.

    Attributes:
        kappa: squared error over its expected value for as many random examples.
        kappa_se: standard error of kappa over the batches.
        worth: random examples with the same error.
        bias: |mean error|^2 relative to |mean gradient|^2, without noise; may fall below 0 by chance.
        bias_se: its standard error over rounds of batches and over the choice of the sample; None for a single round.
        bias_within_sample: the same from all pairs of batches, including those that share examples, and so with the
            chance of this sample in it.
        deviations: of every batch's squared error from kappa times the expected one, over the mean expected one, `[K]`;
            empty: not known.
        kappa_by_part: kappa of the gradients of each part of the model by itself; empty if there is one part.
    """

    kappa: float
    kappa_se: float
    worth: float
    bias: float
    bias_se: float | None
    bias_within_sample: float
    deviations: tuple[float, ...] = ()
    kappa_by_part: Mapping[str, float] = field(default_factory=dict)

    @property
    def shown_bias(self) -> float:
        """Return the significant part of the bias: less two standard errors, at least 0."""
        return max(0.0, self.bias - 2.0 * (self.bias_se or 0.0))


def se_of_difference(first: CoresetError, second: CoresetError) -> float:
    """Return the standard error of the difference of two kappas, which are measured on the same batches.

    Batch by batch, as errors of a batch go together; without its deviations as if they were independent.
    """
    count = len(first.deviations)
    if count < 2 or count != len(second.deviations):
        return math.hypot(first.kappa_se, second.kappa_se)
    both = torch.tensor([first.deviations, second.deviations], dtype=torch.float64)
    return float((both[0] - both[1]).std()) / count**0.5


def coreset_errors(
    gram: GradientGram,
    batches: LargeBatches,
    ways: Sequence[Sequence[Coreset]],
    by_part: Mapping[str, GradientGram] | None = None,
) -> list[CoresetError]:
    """Return the error of every way's coresets, one for each large batch.

    Args:
        gram: inner products of all examples.
        batches: K batches of r examples.
        ways: K coresets of b for every way.
        by_part: inner products of the gradients of each part of the model, if there are several.
    """
    variances = _variances(gram, batches)
    parts = by_part if by_part is not None and len(by_part) > 1 else {}
    of_parts = {name: (part, _variances(part, batches)) for name, part in parts.items()}
    return [_coreset_error(gram, variances, batches, coresets, of_parts) for coresets in ways]


def coreset_error(gram: GradientGram, batches: LargeBatches, coresets: Sequence[Coreset]) -> CoresetError:
    """Return the error of coresets, one for each large batch; see `coreset_errors`."""
    return coreset_errors(gram, batches, [coresets])[0]


def _coreset_error(
    gram: GradientGram,
    variances: Tensor,
    batches: LargeBatches,
    coresets: Sequence[Coreset],
    of_parts: Mapping[str, tuple[GradientGram, Tensor]],
) -> CoresetError:
    """Return the error of one way's coresets.

    Kappa is the sum of their squared errors over the sum of the expected ones. The squared mean error is estimated
    by products of the errors of two batches, whose mean is free of noise. Batches that share examples share the chance
    that made an example stand out, so the bias is estimated from batches of one round, which share none.

    Args:
        gram: inner products of all examples.
        variances: of every batch, `[K]`.
        batches: K batches of r examples.
        coresets: K coresets of b.
        of_parts: the same inner products and variances for each part of the model.
    """
    differences = torch.stack(
        [gram.coefficients(batch, coreset) for batch, coreset in zip(batches.examples, coresets, strict=True)]
    )
    products = differences @ gram.products @ differences.T
    squares = products.diagonal()
    r, sizes = batches.examples.shape[1], [coreset.size for coreset in coresets]
    factors = torch.tensor([1.0 / size - 1.0 / r for size in sizes], dtype=torch.float64)
    expected = factors * variances
    kappa = float(squares.sum() / expected.sum())
    deviations = (squares - kappa * expected) / expected.mean()
    scale = gram.mean_square()
    pairs = [_mean_product(products, (batches.rounds == number).nonzero().flatten()) for number in _numbers(batches)]
    by_round = torch.tensor([pair for pair in pairs if pair is not None], dtype=torch.float64) / scale
    count = len(by_round)
    everything = _mean_product(products, torch.arange(len(products)))
    within = 0.0 if everything is None else everything / scale
    return CoresetError(
        kappa=kappa,
        kappa_se=float(deviations.std()) / len(squares) ** 0.5,
        worth=worth_of(kappa, sizes[0], r),
        bias=float(by_round.mean()) if count else within,
        bias_se=(float(by_round.var()) / count + _chance(gram, differences.mean(dim=0)) / scale**2) ** 0.5
        if count > 1
        else None,
        bias_within_sample=within,
        deviations=tuple(deviations.tolist()),
        kappa_by_part={
            name: float((differences @ part.products * differences).sum() / (factors * of_part).sum())
            for name, (part, of_part) in of_parts.items()
            if bool(of_part.any())  # a part whose gradients are all zero has no kappa
        },
    )


def _variances(gram: GradientGram, batches: LargeBatches) -> Tensor:
    """Return the variance of every large batch, float64 `[K]`."""
    return torch.tensor([gram.variance(batch) for batch in batches.examples], dtype=torch.float64)


def _chance(gram: GradientGram, mean: Tensor) -> float:
    """Return the variance of a bias, before division by |mean gradient|^2, due to the choice of the sample.

    Without a bias the mean error is a sum over examples of c_i (y_i - p_i mean), independent and 0 on average. Then the
    sum of the products of two different ones has the variance 2 sum over i != j of their products' squares.

    Args:
        gram: inner products of all examples.
        mean: c, the mean over batches of the coefficients, `[N]`.
    """
    added = gram.centred() * mean[:, None] * mean
    return 2.0 * float(added.square().sum() - added.diagonal().square().sum())


def _numbers(batches: LargeBatches) -> list[int]:
    return sorted(set(batches.rounds.tolist()))


def _mean_product(products: Tensor, places: Tensor) -> float | None:
    """Return the mean product of two different errors; None for a single one."""
    pairs = list(combinations(places.tolist(), 2))
    if not pairs:
        return None
    first, second = torch.tensor(pairs).unbind(1)
    return float(products[first, second].mean())
