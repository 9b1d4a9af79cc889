"""Cost of a step in forwards of one example, by the cost model of docs/HOW.md."""

from __future__ import annotations


def backward_forwards(*, lora: bool, checkpointing: bool) -> int:
    """Return beta, the backward pass of one example in forwards: 2, of LoRA with a frozen base 1; recomputation 1."""
    return (1 if lora else 2) + (1 if checkpointing else 0)


def step_forwards(size: int, *, lora: bool, checkpointing: bool, replay: bool = False, probe: float = 0.0) -> float:
    """Return the cost of a step in forwards of one example.

    Args:
        size: b, examples trained on.
        lora: whether the base is frozen.
        checkpointing: whether activations are recomputed in the backward pass.
        replay: whether training starts from the probe's hidden states, so that its first forward is saved.
        probe: cost of the probe over the large batch: r times f, in forwards of one example.
    """
    return size * (backward_forwards(lora=lora, checkpointing=checkpointing) + (0 if replay else 1)) + probe
