"""`tokens`: what an example's labels are, looked up in the model's input embeddings; no pass of the model at all.

phi_i = T_i^(-p) x mean over the labelled tokens of a vector for each token id, T_i their number. With one pool and
matched weights its medoids stand for a large batch as well as those of the exact gradient do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.errors import ProbeError
from colm_ds.probe.estimators import VectorRows, multiplied
from colm_ds.randomness import private_generator
from colm_ds.selection import Exchange, Signals
from colm_ds.types import Coreset, Example

WIDTH = 128
"""Numbers of a token's vector: embeddings are seen through as many random directions."""

_ROWS_AT_ONCE = 8192


def token_vectors(embedding: Tensor, seed: int, width: int = WIDTH) -> Tensor:
    """Return a vector for each token id: its embedding, standardised by coordinate, through a random projection.

    Args:
        embedding: `[vocabulary, hidden]` of any float type, on the CPU. A coordinate that never changes becomes 0.
        seed: of the projection.
        width: numbers of a vector.

    Returns:
        float32 `[vocabulary, width]`, computed in float64.
    """
    hidden = embedding.shape[1]
    parts = list(embedding.split(_ROWS_AT_ONCE))
    mean = sum(part.double().sum(dim=0) for part in parts) / len(embedding)
    deviation = (sum((part.double() - mean).square().sum(dim=0) for part in parts) / len(embedding)).sqrt()
    scale = torch.where(deviation > 1e-12 * deviation.max(), 1.0 / deviation.clamp_min(1e-300), 0.0)
    directions = torch.randn(hidden, width, generator=private_generator(seed, "token vectors"), dtype=torch.float64)
    projected = directions / width**0.5
    return torch.cat([(((part.double() - mean) * scale) @ projected).float() for part in parts])


def random_vectors(vocabulary_size: int, seed: int, width: int = WIDTH) -> Tensor:
    """Return random vectors, for a model without input embeddings; float32 `[vocabulary, width]`."""
    generator = private_generator(seed, "random token vectors")
    return torch.randn(vocabulary_size, width, generator=generator) / width**0.5


def counted_tokens(example: Example) -> Tensor:
    """Return the token ids that an example's features are made of, int64 `[n]`.

    Those with a label; of a classification example the prompt and the right candidate.
    """
    if example.candidates is None:
        labels = example.labels[1:]
        return labels[labels != IGNORE_INDEX]
    parts = example.input_ids.split(list(example.candidates.lengths))
    return parts[example.candidates.gold]


def example_features(examples: Iterable[Example], vectors: Tensor, length_power: float) -> Tensor:
    """Return phi of some examples, float32 `[n, width]`.

    Args:
        examples: ordinary ones or classification, whose T is 1.
        vectors: from `token_vectors`.
        length_power: p.

    Raises:
        ProbeError: if a token id has no vector.
    """
    rows = []
    for example in examples:
        tokens = counted_tokens(example)
        if len(tokens) and int(tokens.max()) >= len(vectors):
            raise ProbeError(
                f"example {example.index}: token id {int(tokens.max())}, and the model knows {len(vectors)} tokens. "
                "Give it the tokenizer that it was trained with."
            )
        length = len(tokens) if example.candidates is None else 1
        mean = vectors[tokens].double().mean(dim=0)
        rows.append((mean * float(length) ** -length_power).float())
    return torch.stack(rows) if rows else torch.zeros(0, vectors.shape[1])


def vectors_of_model(model: nn.Module, seed: int, exchange: Exchange) -> Tensor:
    """Return the token vectors of a model's input embeddings as they are now, the same on every rank.

    All ranks call it together: under ZeRO-3 the weight is put together, and rank 0's vectors are those of all.

    Args:
        model: any with input embeddings; where there are none the vectors are random.
        seed: of projection or vectors.
        exchange: the ranks.
    """
    weight = _embedding_weight(model)
    if weight is None:
        config = getattr(model, "config", None)
        size = getattr(config, "vocab_size", None)
        if not size:
            raise ProbeError("tokens: a model with neither input embeddings nor a vocab_size. Use another estimator.")
        return random_vectors(int(size), seed)
    with _whole(weight):
        vectors = torch.zeros(weight.shape[0], WIDTH)
        if exchange.is_main:
            vectors = token_vectors(weight.detach().cpu(), seed)
    return exchange.broadcast(vectors)


class TokensEstimator:
    """Looks signals up in token vectors that are kept as they were at the start; r x 128 floats travel.

    Attributes:
        is_local: False, see `Estimator`.
    """

    is_local = False

    def __init__(self, vectors: Tensor, length_power: float) -> None:
        """Keep the vectors; signals stay on the CPU, so that no device is waited for.

        Args:
            vectors: float32 `[vocabulary, width]` on the CPU, from `vectors_of_model`.
            length_power: p.
        """
        self._vectors = vectors
        self._length_power = length_power
        self._rows = VectorRows()
        self._parts: Tensor | None = None

    def begin(self, step: int, probed: Tensor, num_local: int, parts: Tensor | None = None) -> None:
        """See `Estimator.begin`."""
        self._rows.begin(probed)
        self._parts = parts

    def look_up(self, examples: Mapping[int, Example]) -> None:
        """Take in this rank's examples, by position."""
        if not examples:
            return
        positions = torch.tensor(sorted(examples), dtype=torch.int64)
        features = example_features(
            [examples[place] for place in positions.tolist()], self._vectors, self._length_power
        )
        self._rows.add(positions, multiplied(features, self._parts, positions))

    def signals(self, batch_size: int, exchange: Exchange) -> Signals:
        """See `Estimator.signals`: all ranks get all features."""
        return self._rows.gather(batch_size, self._vectors.shape[1], self._vectors.device, exchange)

    def update(self, coreset: Coreset, exchange: Exchange) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors and their digest: embeddings may be trained, and a resumed run goes by the first ones."""
        return {"vectors": self._vectors, "digest": digest(self._vectors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go by the vectors of the run that is resumed.

        Raises:
            ProbeError: if they are not what their digest says, or of another vocabulary.
        """
        vectors = state["vectors"]
        if digest(vectors) != state["digest"]:
            raise ProbeError("the saved token vectors are not what their digest says. Resume from another checkpoint.")
        if vectors.shape != self._vectors.shape:
            raise ProbeError(
                f"the saved token vectors are of {len(vectors)} tokens, the model has {len(self._vectors)}. "
                "Resume with the model of the saved run."
            )
        self._vectors = vectors


def digest(vectors: Tensor) -> str:
    """Return a digest of token vectors' bytes."""
    return hashlib.blake2b(vectors.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _embedding_weight(model: nn.Module) -> Tensor | None:
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(get(), "weight", None) if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return weight if (isinstance(weight, Tensor) and weight.dim() == 2) or hasattr(weight, "ds_id") else None


def _whole(weight: Tensor) -> Any:
    """Put a weight that ZeRO-3 has cut up together for the block."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
