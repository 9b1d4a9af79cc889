"""Gradient sketches of every example of the dataset, as training's own passes left them: signals without a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colm_ds.errors import CheckpointError


@dataclass(frozen=True)
class StoredSketches:
    """Stored sketches of the examples of a large batch that have one.

    Attributes:
        known: which of the examples asked for have one, bool `[n]`.
        vectors: their sketches in order, float32 `[num_known, K]`.
        ages: steps since each was made, int64 `[num_known]`.
    """

    known: Tensor
    vectors: Tensor
    ages: Tensor


class SketchStore:
    """The last sketch of every example by dataset index, 2 K + 8 bytes an example; the same on every rank.

    float16 relative to each sketch's largest entry: a sketch from some hundred steps ago is off by far more than the
    2^-11 of rounding, while unscaled float16 would lose small gradients. Plain memory and no mapped file: a checkpoint
    must hold the store of its own step, which a file that later steps write to is not.
    """

    def __init__(self, num_examples: int, width: int, max_age: float, made_by: str = "") -> None:
        """Begin without sketches.

        Args:
            num_examples: N.
            width: K.
            max_age: steps after which a sketch counts as missing.
            made_by: of which matrices and with which signs sketches are; others are not compared with them.
        """
        self._values = torch.zeros(num_examples, width, dtype=torch.float16)
        self._scales = torch.zeros(num_examples)
        self._steps = torch.zeros(num_examples, dtype=torch.int32)  # 0: never
        self._max_age = max_age
        self._made_by = made_by

    def note(self, indices: Tensor, sketches: Tensor, step: int) -> float | None:
        """Remember the sketches of one step.

        Args:
            indices: dataset indices, int64 `[n]`; of one that is there twice the last sketch counts.
            sketches: `[n, K]`; rows that are not finite are passed over.
            step: 1-based step.

        Returns:
            The mean cosine between these and those that they replace, none of them too old: what a stored sketch still
            says when its example is next trained on. None: none was replaced.
        """
        finite = torch.isfinite(sketches).all(dim=1)
        indices, sketches = indices[finite], sketches[finite].float()
        if len(indices):  # an example may be twice in a weighted batch: its last sketch counts
            places = {index: place for place, index in enumerate(indices.tolist())}
            last = torch.tensor(sorted(places.values()), dtype=torch.int64)
            indices, sketches = indices[last], sketches[last]
        before = self.of(indices, step)
        cosines = torch.cosine_similarity(before.vectors, sketches[before.known], dim=1)
        scales = sketches.abs().amax(dim=1)
        self._values[indices] = (sketches / scales.clamp_min(1e-38)[:, None]).half()
        self._scales[indices] = scales
        self._steps[indices] = step
        return float(cosines.mean()) if len(cosines) else None

    def of(self, indices: Tensor, step: int) -> StoredSketches:
        """Return the known sketches of some examples that are not too old.

        Args:
            indices: dataset indices, int64 `[n]`.
            step: 1-based step that asks.
        """
        ages = step - self._steps[indices].long()
        known = (self._steps[indices] > 0) & (ages <= self._max_age)
        found = indices[known]
        return StoredSketches(known, self._values[found].float() * self._scales[found][:, None], ages[known])

    def state_dict(self) -> dict[str, Any]:
        """Return all sketches and the steps that they are from."""
        return {"values": self._values, "scales": self._scales, "steps": self._steps, "made_by": self._made_by}

    def clear(self) -> None:
        """Forget all sketches."""
        self._steps.zero_()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            CheckpointError: if they are of a dataset or of sketches of another size.
        """
        saved, own = tuple(state["values"].shape), tuple(self._values.shape)
        if saved != own:
            raise CheckpointError(
                f"the checkpoint has sketches of {saved[0]} examples and {saved[1]} numbers, this run of {own[0]} and "
                f"{own[1]}. Resume with the data and probe.num_probes that the run was started with."
            )
        if state["made_by"] != self._made_by:
            raise CheckpointError(
                f"the checkpoint has sketches of {state['made_by']}, this run makes them of {self._made_by}. "
                "Resume with the seed and probe.layer that the run was started with."
            )
        self._values, self._scales, self._steps = (state[key].clone() for key in ("values", "scales", "steps"))
