"""Sources by clustering: k-means on the model's last hidden state at the end of every prompt (CoLM, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from colm_ds.batching.collate import IGNORE_INDEX, length_sorted_batches, pad_batch
from colm_ds.batching.mixture import seeded_permutation
from colm_ds.errors import ConfigError, DivergenceError
from colm_ds.models.patch import eval_mode, patched_forwards
from colm_ds.randomness import derive_seed
from colm_ds.selection import Exchange
from colm_ds.types import CandidateTable, Example, SourcedDataset

_GATHERED = 1 << 14
"""Examples whose features are sent in one collective."""

_STARTS = 4
"""Starts of k-means; the best is kept."""

_SILHOUETTE_EXAMPLES = 2000
"""Examples, drawn at random, whose silhouette is computed: its cost is quadratic."""


@dataclass(frozen=True)
class Clusters:
    """Examples by cluster; cluster 0 is the largest.

    Attributes:
        labels: cluster of every example, int64 `[n]`.
        silhouettes: mean silhouette by number of clusters, where the number was chosen by it.
    """

    labels: npt.NDArray[np.int64]
    silhouettes: dict[int, float]

    @property
    def counts(self) -> list[int]:
        """Examples of every cluster."""
        counts: list[int] = np.bincount(self.labels).tolist()
        return counts


def prompt_of(example: Example) -> Tensor:
    """Return the tokens before the first trained one; all tokens if there are none."""
    first = 1 + int((example.labels[1:] != IGNORE_INDEX).nonzero()[0])
    return example.input_ids[:first] if first > 1 else example.input_ids


def hidden_features(
    forward: Any,
    model: nn.Module,
    head: nn.Module,
    dataset: SourcedDataset,
    *,
    device: torch.device,
    exchange: Exchange,
    rank: int,
    max_tokens: int,
) -> Tensor:
    """Return the last hidden state, after the final norm, of every prompt's last token; all ranks call it together.

    Every rank computes a share of the micro-batches. They, and so the features of the same weights, are bitwise the
    same for any number of ranks.

    Args:
        forward: engine or model to call.
        model: the module to put into eval mode meanwhile.
        head: module that takes the hidden states (`find_loss_head`).
        dataset: the examples.
        device: where the model runs.
        exchange: the ranks.
        rank: this rank.
        max_tokens: maximum padded tokens of a micro-batch.

    Returns:
        float32 `[n, hidden]` on the CPU of the main rank; `[0, hidden]` on the others.
    """
    table: CandidateTable | None = getattr(dataset, "candidates", None)
    lengths = dataset.lengths.tolist() if table is None else table.widths.tolist()
    groups = length_sorted_batches(lengths, max_tokens=max_tokens)
    features: list[Tensor] = []
    indices: list[int] = []
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(groups), exchange.num_processes):  # the same number of forwards on every rank
            group = groups[start + rank] if start + rank < len(groups) else []
            prompts = [prompt_of(dataset[index]) for index in group] or [torch.zeros(1, dtype=torch.int64)]
            features.append(_last_states(forward, head, prompts, device)[: len(group)].cpu())
            indices += group
    rows, places = torch.cat(features), torch.tensor(indices, dtype=torch.int64)
    parts = []
    for start in range(0, len(dataset), _GATHERED):
        stop = min(start + _GATHERED, len(dataset))
        mine = (places >= start) & (places < stop)
        gathered = exchange.gather_rows(rows[mine].to(device), (places[mine] - start).to(device), stop - start)
        parts.append(gathered.cpu() if exchange.is_main else gathered[:0].cpu())
    return torch.cat(parts)


def _last_states(forward: Any, head: nn.Module, prompts: Sequence[Tensor], device: torch.device) -> Tensor:
    padded = pad_batch([Example(ids, ids, 0, 0) for ids in prompts], pad_token_id=0)
    rows, last = torch.arange(len(prompts), device=device), (padded["lengths"] - 1).to(device)
    with patched_forwards({head: lambda hidden: hidden[rows, last]}):
        states: Tensor = forward(input_ids=padded["input_ids"].to(device), use_cache=False).logits
    return states.float()


def cluster_features(features: npt.NDArray[np.float32], num: int | Sequence[int], seed: int) -> Clusters:
    """Run k-means with 4 starts; the same arguments give the same clusters.

    Args:
        features: `[n, hidden]`.
        num: number of clusters, or minimum and maximum, between which the largest mean silhouette decides.
        seed: of the starts, and of the examples whose silhouettes are computed.

    Raises:
        ConfigError: without scikit-learn, or for more clusters than examples.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise ConfigError("clusters: needs scikit-learn. Run: pip install 'colm_ds[clusters]'") from None
    numbers = [num] if isinstance(num, int) else list(range(num[0], num[1] + 1))
    if numbers[-1] >= len(features):
        raise ConfigError(f"clusters.num = {num}: must be less than the {len(features)} examples. Choose fewer.")
    values = features.astype(np.float64)
    sample = np.sort(seeded_permutation(len(values), seed, "silhouette")[:_SILHOUETTE_EXAMPLES])
    state = derive_seed(seed, "k-means") % (1 << 32)
    best: npt.NDArray[np.int64] | None = None
    silhouettes: dict[int, float] = {}
    with threadpool_limits(1):  # threads sum in an order that is not fixed
        for number in numbers:
            labels = _by_size(KMeans(number, n_init=_STARTS, random_state=state).fit(values).labels_)
            if len(numbers) > 1:
                several = len(set(labels[sample].tolist())) > 1
                score = float(silhouette_score(values[sample], labels[sample])) if several else -1.0
                if best is None or score > max(silhouettes.values()):
                    best = labels
                silhouettes[number] = score
            else:
                best = labels
    assert best is not None
    return Clusters(best, silhouettes)


def _by_size(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Number clusters from the largest down; ties go to the one with the first example."""
    names, firsts, counts = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((firsts, -counts))
    number = np.empty(int(names.max()) + 1, dtype=np.int64)
    number[names[order]] = np.arange(len(names))
    return number[labels]


def cluster_together(features: Tensor, size: int, num: int | Sequence[int], seed: int, exchange: Exchange) -> Clusters:
    """Cluster on the main rank and return the clusters on all ranks; all ranks call it together.

    Args:
        features: from `hidden_features`.
        size: n, examples of the dataset.
        num: as for `cluster_features`.
        seed: as for `cluster_features`.
        exchange: the ranks.

    Raises:
        ConfigError: on every rank, if the main one cannot cluster.
        DivergenceError: on every rank, if a feature is not finite.
    """
    labels = torch.full((size,), -1, dtype=torch.int64)
    numbers = [num] if isinstance(num, int) else list(range(num[0], num[1] + 1))
    scores = torch.full((len(numbers),), torch.nan, dtype=torch.float64)
    failure: ConfigError | None = None
    if exchange.is_main and bool(torch.isfinite(features).all()):
        try:
            made = cluster_features(features.numpy(), num, seed)
            labels = torch.from_numpy(made.labels)
            scores = torch.tensor([made.silhouettes.get(number, torch.nan) for number in numbers], dtype=torch.float64)
        except ConfigError as error:
            failure = error
            labels.fill_(-2)
    labels, scores = exchange.broadcast(labels), exchange.broadcast(scores)
    if failure is not None:
        raise failure
    if int(labels[0]) == -2:
        raise ConfigError("clusters: rank 0 could not make them; its message says why.")
    if int(labels[0]) < 0:
        raise DivergenceError("clusters: hidden states of the model are not finite, so it has diverged.")
    known = {number: float(score) for number, score in zip(numbers, scores, strict=True) if score == score}
    return Clusters(labels.numpy(), known)
