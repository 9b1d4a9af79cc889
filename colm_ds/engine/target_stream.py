"""Target examples of a run: which are passed through the model at a refresh, and what was last found for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colm_ds.batching.assign import home_ranks
from colm_ds.config.colm import TargetConfig
from colm_ds.errors import ConfigError
from colm_ds.randomness import private_generator
from colm_ds.selection import Signals
from colm_ds.types import LargeBatch, SourcedDataset


class TargetStream:
    """An endless stream over m target examples, reshuffled each time it has gone through them.

    Which ones a step takes follows from (seed, step) alone; only the signals of the last refresh are state.
    """

    def __init__(self, dataset: SourcedDataset, config: TargetConfig, seed: int, world_size: int) -> None:
        """Draw the m examples.

        Args:
            dataset: the target data.
            config: the section.
            seed: seed of the run.
            world_size: W, ranks that share the examples of a refresh.

        Raises:
            ConfigError: if there are fewer than m, or they are classification examples.
        """
        if getattr(dataset, "candidates", None) is not None:
            raise ConfigError("colm.target: classification examples cannot be targets. Give instruction data.")
        if len(dataset) < config.size:
            raise ConfigError(
                f"colm.target.size = {config.size}: the target data has {len(dataset)} examples. "
                f"Write at most {len(dataset)}."
            )
        self._dataset = dataset
        self._config = config
        self._seed = seed
        self._world_size = world_size
        self._drawn = draw_targets(np.asarray(dataset.source_ids), config, seed)
        self._signals: Tensor | None = None
        self._refresh = -1

    def due(self, step: int) -> bool:
        """Return whether a step refreshes the target's signals."""
        return (step - 1) // self._config.refresh != self._refresh

    def indices(self, step: int) -> list[int]:
        """Return the places in the target data that a step's refresh takes, `[m']`."""
        start = (step - 1) // self._config.refresh * self._config.batch
        places = [divmod(place, len(self._drawn)) for place in range(start, start + self._config.batch)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [orders[epoch][place] for epoch, place in places]

    def extend(self, batch: LargeBatch, rank: int) -> LargeBatch:
        """Return a large batch with the step's target examples after its own, shared among ranks."""
        indices = self.indices(batch.step)
        examples = [self._dataset[index] for index in indices]
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        labelled = torch.tensor([int((example.labels[1:] != -100).sum()) for example in examples])
        home = home_ranks(lengths, self._world_size)
        mine = {batch.size + n: one for n, one in enumerate(examples) if int(home[n]) == rank}
        return replace(
            batch,
            indices=torch.cat([batch.indices, torch.full_like(lengths, -1)]),
            sources=torch.cat([batch.sources, torch.full_like(lengths, -1)]),
            lengths=torch.cat([batch.lengths, lengths]),
            num_label_tokens=torch.cat([batch.num_label_tokens, labelled]),
            home=torch.cat([batch.home, home]),
            examples={**batch.examples, **mine},
        )

    def split(self, signals: Signals, batch: LargeBatch, refreshed: bool) -> Signals:
        """Return the signals of the large batch alone, with the target's beside them.

        Args:
            signals: signals of the large batch, if `refreshed` with those of the targets after them.
            batch: the large batch.
            refreshed: whether this step's probe passed the targets.
        """
        assert signals.vectors is not None
        if refreshed:
            own = len(signals.positions) - self._config.batch
            self._signals = signals.vectors[own:]
            self._refresh = (batch.step - 1) // self._config.refresh
            signals = replace(
                signals,
                positions=signals.positions[:own],
                finite=signals.finite[: batch.size],
                vectors=signals.vectors[:own],
            )
        return replace(signals, target=self._signals, target_indices=self.indices(batch.step))

    def state_dict(self) -> dict[str, Any]:
        """Return the last refresh's signals, if later steps use them."""
        if self._config.refresh == 1 or self._signals is None:
            return {}
        return {"signals": self._signals.cpu(), "refresh": self._refresh}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them on a device."""
        self._signals = state["signals"].to(device) if state else None
        self._refresh = state["refresh"] if state else -1

    def _order(self, epoch: int) -> list[int]:
        generator = private_generator(self._seed, "target", epoch)
        return self._drawn[torch.randperm(len(self._drawn), generator=generator)].tolist()


def draw_targets(source_ids: np.ndarray, config: TargetConfig, seed: int) -> Tensor:
    """Draw m places of the target data at random, or with `mix: equal` as many of every source as it has and fit.

    Args:
        source_ids: source id of every example, `[n]`.
        config: the section; `size` is at most n.
        seed: seed of the run.

    Returns:
        Ascending int64 `[m]`.
    """
    shuffled = torch.randperm(len(source_ids), generator=private_generator(seed, "target examples"))
    if config.mix == "equal":
        ids = torch.from_numpy(np.ascontiguousarray(source_ids)).long()[shuffled]
        turn = torch.zeros_like(ids)  # the how-manieth of its source, in shuffled order
        for source in ids.unique().tolist():
            members = ids == source
            turn[members] = torch.arange(int(members.sum()))
        shuffled = shuffled[torch.argsort(turn, stable=True)]
    return shuffled[: config.size].sort().values
