"""Sketch the gradients of the examples that training passes, from its own forward and backward: no pass is added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import Architecture, ProbeTarget
from colm_ds.probe.sketch import draw_signs, token_products


class TrainingSketch:
    """Collects the sketches of a step's examples on this rank, as `SketchEstimator` of `refresh: run` would make them.

    Hooks see the input of every probed matrix and the gradient of its output, and multiply both with the signs. What is
    sketched is the gradient of the step's loss; divided by what arrives at each example's summed loss (its loss weight,
    the step's normalisation, the number of ranks, the loss scale of fp16), it is that of the example's own loss,
    whatever the engine multiplied.

    With activation checkpointing a forward runs twice. The reentrant kind builds its graph in the second run, the other
    in the first, and gradients pass the one graph there is: hooks on tensors are called once.
    """

    def __init__(self, architecture: Architecture, num_probes: int, seed: int, device: torch.device) -> None:
        """Prepare for a model.

        Args:
            architecture: its parts.
            num_probes: K.
            seed: seed of the run, which the signs are drawn from once.
            device: where the model runs.

        Raises:
            ProbeError: if a probed matrix is not trained, so that no gradient need arrive at it.
        """
        for target in architecture.targets:
            if not any(parameter.requires_grad for parameter in target.module.parameters()):
                raise ProbeError(
                    f"colm.probe.source = 'store': {target.name} is not trained, so training's own pass computes no "
                    "gradient there. Adapt it by LoRA (lora.targets, layers_to_transform), probe a layer that is "
                    'trained (probe.layer), or write "pass".'
                )
        self._targets = architecture.targets
        self._signs = draw_signs(architecture, num_probes, seed, 0, device)
        self._num_probes = num_probes
        self._device = device
        self._rows: list[Tensor] = []

    def begin(self) -> None:
        """Discard what was collected: a step's passes begin, or begin again."""
        self._rows = []

    def of(self, micro: MicroBatch, num_examples: int) -> PassedMicroBatch:
        """Return what watches one training micro-batch and adds its sketches here.

        Args:
            micro: the micro-batch on the device.
            num_examples: its examples; 0 for a placeholder.
        """
        return PassedMicroBatch(self._targets, self._signs, micro, num_examples, self._rows)

    def sketches(self) -> Tensor:
        """Return the sketches of all examples since `begin`, in the order of their passes, float32 `[n, K]`.

        Rows that are not finite have none: their loss is not, or it has the weight 0.
        """
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self._num_probes, device=self._device)


class PassedMicroBatch:
    """Watches forward and backward of one micro-batch."""

    def __init__(
        self,
        targets: tuple[ProbeTarget, ...],
        signs: list[tuple[Tensor, Tensor]],
        micro: MicroBatch,
        num_examples: int,
        collected: list[Tensor],
    ) -> None:
        self._targets, self._signs = targets, signs
        self._micro, self._num_examples = micro, num_examples
        self._collected = collected
        self._arrived: Tensor | None = None
        self._seen: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the probed matrices while the block runs the forward or the backward, which may recompute layers."""

        def watch(rows: Tensor, columns: Tensor, target: ProbeTarget) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                if torch.is_grad_enabled() and output.requires_grad:
                    given = inputs[0].detach()
                    output.register_hook(lambda delta: self._note(target.rows_of(delta), given, rows, columns))

            return hook

        with ExitStack() as hooks:
            for target, (rows, columns) in zip(self._targets, self._signs, strict=True):
                hooks.enter_context(target.hooking(watch(rows, columns, target)))
            yield

    def watch_losses(self, sums: Tensor) -> None:
        """Watch what the step multiplies every example's summed loss with.

        Args:
            sums: from `example_loss_sums`, `[batch]`.
        """

        def arrived(gradient: Tensor) -> None:
            self._arrived = gradient

        sums.register_hook(arrived)

    def finish(self) -> None:
        """Add the sketches of the micro-batch, after its backward.

        Raises:
            ProbeError: if gradients did not pass each probed matrix once.
        """
        if self._arrived is None or len(self._seen) != len(self._targets):
            names = ", ".join(target.name for target in self._targets)
            raise ProbeError(
                f"colm.probe.source = 'store': {len(self._seen)} gradients passed {names} in a backward pass, where "
                f"{len(self._targets)} should. The model does not call each once, by its own forward. Write "
                '"source": "pass".'
            )
        # Each matrix has its own signs, so the sum of their sketches is a sketch of all together.
        total = torch.stack(self._seen).sum(dim=0)
        num_probes = total.shape[1]
        divisor = self._arrived.float() * self._micro.counts * num_probes**0.5
        self._collected.append((total / divisor[:, None])[: self._num_examples])

    def _note(self, delta: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> None:
        with torch.no_grad():
            micro = self._micro
            delta, inputs = (part.reshape(*micro.input_ids.shape, -1) for part in (delta, inputs))
            products = token_products(delta, inputs, rows, columns)
            if micro.position_ids is None:
                self._seen.append(micro.by_example(products).sum(dim=1))
            else:
                self._seen.append(micro.examples_of_tokens().to(products.dtype).flatten(1) @ products.flatten(0, 1))
