"""`tokens`: an example's labels, looked up in the model's input embeddings, without any pass of the model.

phi_i = T_i^(-p) x mean over the labelled tokens of a vector for each token id, T_i their number. Draws by importance
from one pool, or its medoids with matched weights, represent a large batch as well as those of the exact gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import embedding_weight, num_embeddings
from colm_ds.probe.estimators import VectorRows, multiply_by_parts
from colm_ds.randomness import private_generator
from colm_ds.selection import Exchange, Signals
from colm_ds.types import Coreset, Example

WIDTH = 256
"""Numbers of a token's vector: embeddings are projected on as many random directions (benchmarks/token_signal.py)."""

_ROWS_AT_ONCE = 8192


def token_vectors(embedding: Tensor, seed: int, width: int = WIDTH, occurs: Tensor | None = None) -> Tensor:
    """Return a vector for each token id: its embedding, standardised by coordinate, through a random projection.

    Args:
        embedding: `[vocabulary, hidden]` of any float type, on the CPU. A coordinate that never changes becomes 0.
        seed: seed of the projection.
        width: entries of a vector.
        occurs: ids over which mean and deviation are taken, bool `[vocabulary]`; None, or none of them: all.

    Returns:
        float32 `[vocabulary, width]`, computed in float64 and rounded to float16, as checkpoints store it.
    """
    hidden = embedding.shape[1]
    counted = embedding if occurs is None or not bool(occurs.any()) else embedding[occurs]
    parts = list(counted.split(_ROWS_AT_ONCE))
    mean = sum(part.double().sum(dim=0) for part in parts) / len(counted)
    deviation = (sum((part.double() - mean).square().sum(dim=0) for part in parts) / len(counted)).sqrt()
    scale = torch.where(deviation > 1e-12 * deviation.max(), 1.0 / deviation.clamp_min(1e-300), 0.0)
    directions = torch.randn(hidden, width, generator=private_generator(seed, "token vectors"), dtype=torch.float64)
    projected = directions / width**0.5
    rows = embedding.split(_ROWS_AT_ONCE)
    return torch.cat([(((part.double() - mean) * scale) @ projected).half().float() for part in rows])


def random_vectors(vocabulary_size: int, seed: int, width: int = WIDTH) -> Tensor:
    """Return random vectors, for a model without input embeddings; float32 `[vocabulary, width]`."""
    generator = private_generator(seed, "random token vectors")
    return (torch.randn(vocabulary_size, width, generator=generator) / width**0.5).half().float()


def counted_tokens(example: Example) -> Tensor:
    """Return the token ids that an example's features are made of, int64 `[n]`.

    These are the labels; for a classification example, the prompt and the gold candidate.
    """
    if example.candidates is None:
        labels = example.labels[1:]
        return labels[labels != IGNORE_INDEX]
    parts = example.input_ids.split(list(example.candidates.lengths))
    return parts[example.candidates.gold]


def mean_vectors(examples: Iterable[Example], vectors: Tensor) -> Tensor:
    """Return the mean vector of each example's counted tokens, float16 `[n, width]`.

    A row depends on its example alone, whoever computes it and in whichever batch.

    Raises:
        ProbeError: if a token id has no vector.
    """
    tokens = []
    for example in examples:
        tokens.append(counted_tokens(example))
        if (unknown := unknown_token(tokens[-1], len(vectors))) is not None:
            raise no_vector(example.index, unknown, len(vectors))
    return mean_of_tokens(tokens, vectors)


def mean_of_tokens(tokens: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """Return the mean vector of each row of token ids, all of which have one; float16 `[n, width]`."""
    if not tokens:
        return torch.zeros(0, vectors.shape[1], dtype=torch.float16)
    lengths = torch.tensor([len(each) for each in tokens])
    offsets = lengths.cumsum(0) - lengths
    return F.embedding_bag(torch.cat(list(tokens)), vectors, offsets, mode="mean").half()


def unknown_token(tokens: Tensor, vocabulary_size: int) -> int | None:
    """Return a token id without a vector, or None if all have one."""
    outside = tokens[(tokens < 0) | (tokens >= vocabulary_size)]
    return int(outside[0]) if len(outside) else None


def no_vector(index: int, token: int, vocabulary_size: int) -> ProbeError:
    """Return the error for an example with a token id that the model does not know."""
    return ProbeError(
        f"example {index}: token id {token}, and the model knows {vocabulary_size} tokens. "
        "Give it the tokenizer that it was trained with."
    )


def features(means: Tensor, num_label_tokens: Tensor, length_power: float) -> Tensor:
    """Return phi, float32 `[n, width]`.

    Args:
        means: from `mean_vectors`, `[n, width]`.
        num_label_tokens: T of each example, 1 for classification, int64 `[n]`.
        length_power: p.
    """
    return (means.double() * num_label_tokens.double().pow(-length_power)[:, None]).float()


def example_features(examples: Sequence[Example], vectors: Tensor, length_power: float) -> Tensor:
    """Return phi of some examples, float32 `[n, width]`.

    Args:
        examples: ordinary ones, or classification, whose T is 1.
        vectors: from `token_vectors`.
        length_power: p.

    Raises:
        ProbeError: if a token id has no vector.
    """
    lengths = [len(counted_tokens(example)) if example.candidates is None else 1 for example in examples]
    return features(mean_vectors(examples, vectors), torch.tensor(lengths, dtype=torch.int64), length_power)


def vectors_of_model(model: nn.Module, seed: int, exchange: Exchange, occurs: Tensor | None = None) -> Tensor:
    """Return the token vectors of a model's input embeddings as they are now, the same on every rank.

    All ranks call it together: under ZeRO-3 the weight is gathered, and all take rank 0's vectors.

    Args:
        model: any model; without input embeddings the vectors are random.
        seed: seed of projection or vectors.
        exchange: the ranks.
        occurs: ids that occur in the data, bool `[vocabulary]`; see `token_vectors`.
    """
    weight = embedding_weight(model)
    if weight is None:
        return random_vectors(vocabulary_size(model), seed)
    with _whole(weight):
        vectors = torch.zeros(weight.shape[0], WIDTH)
        if exchange.is_main:
            vectors = token_vectors(weight.detach().cpu(), seed, occurs=occurs)
    return exchange.broadcast(vectors)


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that a model knows.

    Raises:
        ProbeError: if it has neither input embeddings nor a `vocab_size`.
    """
    known = num_embeddings(model)
    if known is not None:
        return known
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not size:
        raise ProbeError("tokens: a model with neither input embeddings nor a vocab_size. Use another estimator.")
    return int(size)


class TokensEstimator:
    """Look signals up in token vectors, fixed at the start of the run; r x 256 floats are exchanged.

    Attributes:
        is_local: False, see `Estimator`.
        vectors: float32 `[vocabulary, width]` on the CPU.
    """

    is_local = False

    def __init__(self, vectors: Tensor, length_power: float) -> None:
        """Keep the vectors; signals stay on the CPU, so that no device is synchronised.

        Args:
            vectors: float32 `[vocabulary, width]` on the CPU, from `vectors_of_model`.
            length_power: p.
        """
        self.vectors = vectors
        self._length_power = length_power
        self._rows = VectorRows()
        self._parts: Tensor | None = None

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`."""
        self._rows.begin(probed)
        self._parts = parts

    def look_up(self, examples: Mapping[int, Example]) -> None:
        """Look up this rank's examples, by position."""
        if not examples:
            return
        positions = torch.tensor(sorted(examples), dtype=torch.int64)
        rows = example_features([examples[place] for place in positions.tolist()], self.vectors, self._length_power)
        self._rows.add(positions, multiply_by_parts(rows, self._parts, positions))

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all features."""
        return self._rows.gather(batch_size, self.vectors.shape[1], self.vectors.device, exchange)

    def signals_of(self, means: Tensor, num_label_tokens: Tensor, probed: Tensor, parts: Tensor | None) -> Signals:
        """Return the signals of a large batch whose mean vectors are known, without keeping state.

        Args:
            means: mean vectors of every example, from `mean_vectors`, `[r, width]`.
            num_label_tokens: T of every example, int64 `[r]`.
            probed: positions whose signal is needed, ascending int64 `[n]`.
            parts: see `Estimator.begin`.
        """
        rows = multiply_by_parts(features(means, num_label_tokens, self._length_power), parts, torch.arange(len(means)))
        return Signals(probed, torch.isfinite(rows).all(dim=1), vectors=rows[probed])

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Do nothing: there is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors and their digest: embeddings may be trained, but a resumed run keeps the first ones."""
        return {"vectors": self.vectors.half(), "digest": digest(self.vectors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the vectors of the resumed run.

        Raises:
            ProbeError: if they do not match their digest or the vocabulary.
        """
        vectors = state["vectors"].float()
        if digest(vectors) != state["digest"]:
            raise ProbeError("the saved token vectors are not what their digest says. Resume from another checkpoint.")
        if len(vectors) != len(self.vectors):
            raise ProbeError(
                f"the saved token vectors are of {len(vectors)} tokens, the model has {len(self.vectors)}. "
                "Resume with the model of the saved run."
            )
        self.vectors = vectors


def digest(vectors: Tensor) -> str:
    """Return a digest of token vectors' bytes."""
    return hashlib.blake2b(vectors.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _whole(weight: Tensor) -> Any:
    """Gather a weight that ZeRO-3 has partitioned, for the block."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
