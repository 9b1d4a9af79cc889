"""Read the probed weights while their modules run: under ZeRO-3 they are gathered only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.models.architecture import ProbeTarget


@contextmanager
def reading_parameters(targets: Sequence[ProbeTarget]) -> Iterator[Callable[[], Tensor]]:
    """Keep a copy of the targets' weights from their first forward in the block.

    Yields:
        A function that returns them, flattened and concatenated, float32 `[d]`; call it after the block.
    """
    weights: dict[int, Tensor] = {}

    def read(place: int, target: ProbeTarget) -> None:
        weights.setdefault(place, target.weight_rows().detach().float().flatten())

    def hook(place: int, target: ProbeTarget) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: read(place, target)

    with ExitStack() as hooks:
        for place, target in enumerate(targets):
            # Before the forward, after ZeRO-3's own hook has gathered the weight; after the forward it is released.
            hooks.callback(target.module.register_forward_pre_hook(hook(place, target)).remove)
        yield lambda: torch.cat([weights[place] for place in range(len(targets))])
        for place, target in enumerate(targets):
            if place not in weights:  # this rank probed nothing; outside ZeRO-3 the weights are available
                read(place, target)
