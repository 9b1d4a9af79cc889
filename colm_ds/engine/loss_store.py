"""Losses of every example of the dataset, as training itself found them: what selectors without a probe go by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import CheckpointError
from colm_ds.types import PastLosses


class LossStore:
    """First and last mean token loss by dataset index, 8 bytes an example; the same on every rank.

    Every step's losses are known on every rank already, as they are summed over ranks with the step's loss, so nothing
    more is sent. They are those before the step, with dropout if the model has any.
    """

    def __init__(self, num_examples: int) -> None:
        """Begin without losses.

        Args:
            num_examples: N.
        """
        self._last = torch.full((num_examples,), torch.nan)
        self._first = torch.full((num_examples,), torch.nan)

    def note(self, indices: Tensor, losses: Tensor) -> None:
        """Remember the losses of one step.

        Args:
            indices: dataset indices, each once, int64 `[n]`.
            losses: in nats, `[n]`; those that are not finite are passed over.
        """
        finite = torch.isfinite(losses)
        indices, values = indices[finite], losses[finite].float()
        self._last[indices] = values
        unseen = torch.isnan(self._first[indices])
        self._first[indices[unseen]] = values[unseen]

    def of(self, indices: Tensor) -> PastLosses:
        """Return what is known of a large batch's examples.

        Args:
            indices: dataset indices, int64 `[r]`.
        """
        return PastLosses(self._last[indices], self._first[indices], len(self._last))

    def state_dict(self) -> dict[str, Any]:
        """Return all losses."""
        return {"last": self._last, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            CheckpointError: if they are of a dataset of another size.
        """
        if len(state["last"]) != len(self._last):
            raise CheckpointError(
                f"the checkpoint has losses of {len(state['last'])} examples, the dataset has {len(self._last)}. "
                "Resume with the data that the run was started with."
            )
        self._last, self._first = state["last"].clone(), state["first"].clone()
