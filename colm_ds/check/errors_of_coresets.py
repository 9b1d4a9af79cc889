"""How far coresets' mean gradients are from their large batches', from the Gram matrix of the gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from colm_ds.probe.variance import worth_of
from colm_ds.randomness import private_generator
from colm_ds.types import Coreset


@dataclass(frozen=True)
class GradientGram:
    """What all errors follow from: inner products of the gradients of N examples.

    Attributes:
        products: y_i . y_j, float64 `[N, N]`: y is the gradient of an example's mean loss, or in a mean over tokens of
            the sum of its token losses.
        parts: what an example counts in the divisor, float64 `[N]`: 1, or in a mean over tokens its labelled tokens.
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
            examples: which, int64 `[n]`.
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
            coreset: chosen of it.
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
    """Large batches that are drawn from N examples.

    Attributes:
        examples: of each batch, int64 `[K, r]`.
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
            count: batches at least; those of the last order are all taken.
            seed: of the orders.
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
    """Error of one way to choose coresets, over the large batches that it chose from.

    Attributes:
        kappa: squared error over its expected value for as many random examples.
        kappa_se: standard error of kappa over the batches.
        worth: random examples with the same error.
        bias: |mean error|^2 in parts of |mean gradient|^2, its noise removed; may fall below 0 by chance.
        bias_se: standard error of it: over rounds of batches, and of these examples instead of others; None of a single
            round.
        bias_within_sample: the same from all pairs of batches, also those that share examples: what this sample of
            examples adds by chance is in it.
    """

    kappa: float
    kappa_se: float
    worth: float
    bias: float
    bias_se: float | None
    bias_within_sample: float

    @property
    def shown_bias(self) -> float:
        """Return the bias that is beyond chance: less two standard errors, 0 at least."""
        return max(0.0, self.bias - 2.0 * (self.bias_se or 0.0))


def coreset_error(gram: GradientGram, batches: LargeBatches, coresets: Sequence[Coreset]) -> CoresetError:
    """Return the error of coresets, one of each large batch.

    Kappa is the sum of their squared errors over the sum of the expected ones. A mean error's square is taken from
    products of the errors of two batches, whose mean has no noise in it. Batches that share examples share the chance
    that made an example stand out among all, so products of batches of one round, which share none, give the bias.

    Args:
        gram: of all examples.
        batches: K of r examples.
        coresets: K of b.
    """
    differences = torch.stack(
        [gram.coefficients(batch, coreset) for batch, coreset in zip(batches.examples, coresets, strict=True)]
    )
    products = differences @ gram.products @ differences.T
    found = products.diagonal()
    r, sizes = batches.examples.shape[1], [coreset.size for coreset in coresets]
    expected = torch.tensor(
        [(1.0 / size - 1.0 / r) * gram.variance(batch) for size, batch in zip(sizes, batches.examples, strict=True)],
        dtype=torch.float64,
    )
    kappa = float(found.sum() / expected.sum())
    scatter = (found - kappa * expected).std() / expected.mean()
    scale = gram.mean_square()
    pairs = [_mean_product(products, (batches.rounds == number).nonzero().flatten()) for number in _numbers(batches)]
    by_round = torch.tensor([pair for pair in pairs if pair is not None], dtype=torch.float64) / scale
    count = len(by_round)
    everything = _mean_product(products, torch.arange(len(products)))
    within = 0.0 if everything is None else everything / scale
    return CoresetError(
        kappa=kappa,
        kappa_se=float(scatter) / len(found) ** 0.5,
        worth=worth_of(kappa, sizes[0], r),
        bias=float(by_round.mean()) if count else within,
        bias_se=(float(by_round.var()) / count + _chance(gram, differences.mean(dim=0)) / scale**2) ** 0.5
        if count > 1
        else None,
        bias_within_sample=within,
    )


def _chance(gram: GradientGram, mean: Tensor) -> float:
    """Return the variance of a bias, not yet in parts of |mean gradient|^2, from which examples the sample holds.

    Without a bias the mean error is a sum of what examples add, c_i (y_i - p_i mean), independent and 0 on average.
    Then the sum of the products of two different ones has the variance 2 sum over i != j of their products' squares.

    Args:
        gram: of all examples.
        mean: c, the mean over batches of the coefficients, `[N]`.
    """
    added = gram.centred() * mean[:, None] * mean
    return 2.0 * float(added.square().sum() - added.diagonal().square().sum())


def _numbers(batches: LargeBatches) -> list[int]:
    return sorted(set(batches.rounds.tolist()))


def _mean_product(products: Tensor, places: Tensor) -> float | None:
    """Return the mean of the products of two different ones of some errors; None of a single one."""
    pairs = list(combinations(places.tolist(), 2))
    if not pairs:
        return None
    first, second = torch.tensor(pairs).unbind(1)
    return float(products[first, second].mean())
