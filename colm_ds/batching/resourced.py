"""A dataset with different sources than its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_ds.errors import DataError
from colm_ds.types import Example, SourcedDataset


class WithSources:
    """A `SourcedDataset` over the examples of another one, with different sources.

    Args:
        dataset: the examples.
        source_names: name of each source id.
        source_ids: source id of every example, `[n]`.

    Raises:
        DataError: if the ids do not fit.
    """

    def __init__(self, dataset: SourcedDataset, source_names: Sequence[str], source_ids: npt.NDArray[Any]) -> None:
        ids = np.asarray(source_ids, dtype=np.int32)
        if ids.shape != (len(dataset),) or ids.min() < 0 or ids.max() >= len(source_names):
            raise DataError(
                f"{len(ids)} source ids of {len(source_names)} sources for {len(dataset)} examples. "
                "Give every example the id of one of them."
            )
        self.dataset: SourcedDataset = dataset.dataset if isinstance(dataset, WithSources) else dataset
        self.source_names: Sequence[str] = tuple(source_names)
        self.source_ids: np.ndarray = ids
        self.lengths: np.ndarray = dataset.lengths
        self.num_label_tokens: np.ndarray = dataset.num_label_tokens

    def __len__(self) -> int:
        return len(self.source_ids)

    def __getitem__(self, index: int) -> Example:
        example = self.dataset[index]
        return replace(example, source=int(self.source_ids[example.index]))
