"""What an arm of `peers.py` measures of every step; it needs neither colm_ds nor a version of anything."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

WARM_UP = 2
KINDS = ("step_s", "cpu_s", "positions")


class Clock:
    """Seconds by the clock and of the CPU, positions and loss of every step, and the resident bytes before the first.

    Attributes:
        losses: of the steps, where they are known.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._begun: list[tuple[float, ...]] = []
        self._ended: list[tuple[float, ...]] = []
        self._held = 0
        self._positions = 0

    def watch(self, model: Any) -> None:
        """Count the positions that go into a model's passes, padding included."""

        def count(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self._positions += output.shape[:-1].numel()

        model.get_input_embeddings().register_forward_hook(count)

    def begin(self) -> None:
        """Note the begin of a step."""
        if not self._begun:
            import psutil

            self._held = psutil.Process().memory_info().rss
        self._begun.append(self._now())

    def end(self, loss: float | None = None) -> None:
        """Note the end of a step, and its loss if it is known."""
        self._ended.append(self._now())
        if loss is not None:
            self.losses.append(loss)

    def measured(self) -> dict[str, Any]:
        """Return the medians over the steps but the first ones, all losses, and the peak over the start in GiB."""
        steps = list(zip(self._begun, self._ended, strict=True))[WARM_UP:]
        medians = {
            name: statistics.median(ended[kind] - begun[kind] for begun, ended in steps)
            for kind, name in enumerate(KINDS)
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._held
        return {**medians, "losses": self.losses, "peak_gib": peak / 2**30}

    def _now(self) -> tuple[float, ...]:
        return time.perf_counter(), time.process_time(), self._positions
