"""Plain autograd, one unpadded example at a time, to compare the probe with; and a step of the probe to compare."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import MicroBatch, make_micro_batch
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.models.patch import eval_mode
from colm_ds.probe.estimators import Estimator
from colm_ds.probe.exact import ExactEstimator
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.projection import ProjectionEstimator
from colm_ds.probe.sketch import SketchEstimator
from colm_ds.probe.spsa import SpsaEstimator
from colm_ds.probe.tail import TailInput, run_trunk
from colm_ds.randomness import private_generator
from colm_ds.selection import SINGLE_PROCESS, AdamHistory, Signals
from colm_ds.types import Example
from tests.tiny_models import VOCABULARY_SIZE

LENGTHS = (9, 14, 5, 11, 7)
CPU = torch.device("cpu")
ESTIMATORS = ("spsa", "exact", "sketch", "projection")


def make_examples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Example]:
    """Random examples: a prompt without loss, then an answer with a gap in its labels."""
    generator = private_generator(seed, "examples")
    examples = []
    for number, length in enumerate(lengths):
        input_ids = torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator)
        labels = input_ids.clone()
        start = 1 + number % 3
        labels[:start] = -100
        labels[start + 1] = -100
        examples.append(Example(input_ids, labels, 0, number))
    return examples


def pad_further(batch: MicroBatch, columns: int, token_id: int) -> MicroBatch:
    """The same examples with more padding, of another token."""
    padding = torch.full((len(batch.input_ids), columns), token_id)
    input_ids = torch.cat([batch.input_ids, padding], dim=1)
    return MicroBatch(input_ids, batch.rows, batch.positions, batch.targets, batch.counts)


def trunk(model: nn.Module, examples: Sequence[Example] | MicroBatch) -> tuple[Architecture, TailInput]:
    """The model's parts and what enters its last layer, as a step of training gets them."""
    batch = examples if isinstance(examples, MicroBatch) else make_micro_batch(examples)
    architecture = find_architecture(model)
    with eval_mode(model):
        return architecture, run_trunk(model, architecture, batch)


def make_estimator(
    name: str, architecture: Architecture, *, num_probes: int = 3, every_step: bool = True, adam: bool = True
) -> Any:
    """An estimator of seed 0."""
    if name == "exact":
        return ExactEstimator(architecture, CPU)
    if name == "projection":
        history = AdamHistory(architecture.num_coordinates) if adam else None
        return ProjectionEstimator(
            architecture, CPU, num_probes=num_probes, every_step=every_step, seed=0, history=history
        )
    if name == "sketch":
        return SketchEstimator(
            architecture, CPU, num_probes=num_probes, every_step=every_step, beta2=0.999, seed=0, adam=adam
        )
    return SpsaEstimator(architecture, CPU, num_probes=num_probes, epsilon=1e-3, every_step=every_step, seed=0)


def probe_step(
    estimator: Estimator,
    model: nn.Module,
    examples: Sequence[Example],
    micro_batches: Sequence[Sequence[int]] | None = None,
    *,
    step: int = 1,
    batch_size: int | None = None,
    parts: Tensor | None = None,
) -> Any:
    """The `Signals` of examples, probed as in a step of training.

    Args:
        estimator: takes in the micro-batches.
        model: bare or under PEFT, in any mode.
        examples: the large batch; those in no micro-batch are not probed.
        micro_batches: positions of every micro-batch in their order; None takes one of all examples.
        step: 1-based.
        batch_size: r, if larger than the examples given.
        parts: see `Estimator.begin`.
    """
    groups = [list(range(len(examples)))] if micro_batches is None else [list(group) for group in micro_batches]
    probed = torch.tensor(sorted(position for group in groups for position in group))
    estimator.begin(step, probed, len(probed), parts)
    architecture = find_architecture(model)
    with eval_mode(model), torch.no_grad():
        for group in groups:
            members = [examples[position] for position in group]
            tail = run_trunk(model, architecture, make_micro_batch(members))
            estimator.observe(tail, torch.tensor(group, dtype=torch.int64), [len(one.input_ids) for one in members])
    return estimator.signals(batch_size or len(examples), SINGLE_PROCESS)


def signal_rows(signals: Signals) -> Tensor:
    """What is known of every probed example, a row each, ordered by position: sketches, coefficients or gradients."""
    if signals.vectors is not None:
        return signals.vectors
    assert signals.gradients is not None
    order = signals.positions.argsort()
    return signals.gradients.chunk(order, 0, signals.gradients.num_coordinates)


def probed_gradients(architecture: Architecture, tail: TailInput) -> Tensor:
    """Per-example gradients from the probe's factors, float64 `[n, out, in]`."""
    ((delta, inputs),) = gradient_factors(architecture, tail)
    return torch.einsum("blo,bli->boi", delta.double(), inputs.double())


def plain_losses(model: Any, examples: Sequence[Example]) -> Tensor:
    """Hugging Face's own loss of every example alone, float32 `[n]`."""
    with torch.no_grad():
        losses = [model(input_ids=one.input_ids[None], labels=one.labels[None]).loss for one in examples]
    return torch.stack(losses).float()


def plain_gradients(model: Any, examples: Sequence[Example], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Gradient of every example's mean loss for the last V projection, float64 `[n, out, in]`.

    Args:
        model: left alone; a copy is differentiated.
        examples: taken one by one without padding.
        dtype: what the copy computes in; None keeps the model's.
    """
    model = copy.deepcopy(model).eval()
    model = model if dtype is None else model.to(dtype)
    weight, rows = target_weight(model)
    return torch.stack([gradient[rows].double() for (gradient,) in _autograd(model, examples, [weight])])


def layer_gradients(model: Any, examples: Sequence[Example], layer: str) -> Tensor:
    """Gradients in float64 for all matrices of a probed layer, flattened one after the other, `[n, d]`."""
    model = copy.deepcopy(model).eval().double()
    if layer == "v_proj":
        return plain_gradients(model, examples).flatten(1)
    names = dict(model.named_parameters())
    last = f"layers.{model.config.num_hidden_layers - 1}."
    wanted = {"qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "fc": ("fc2", "down_proj")}[layer]
    weights = []
    for projection in wanted:
        mine = [name for name in names if last in name and f".{projection}." in name and name.endswith("weight")]
        adapted = [name for name in mine if "lora_B" in name]
        weights += [names[name] for name in adapted or mine]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in _autograd(model, examples, weights)])


def _autograd(model: Any, examples: Sequence[Example], weights: Sequence[nn.Parameter]) -> list[tuple[Tensor, ...]]:
    """Gradients of every example's mean loss for some weights; only these require one afterwards."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    gradients = []
    for example in examples:
        logits = model(input_ids=example.input_ids[None]).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, example.labels[1:], ignore_index=-100)
        gradients.append(torch.autograd.grad(loss, weights))
    return gradients


def target_weight(model: Any) -> tuple[nn.Parameter, slice]:
    """The weight that the probe differentiates and its rows, found by name and not by the code under test."""
    names = dict(model.named_parameters())
    last = f"layers.{model.config.num_hidden_layers - 1}.self_attn."
    endings = tuple(
        f"{last}{projection}.{weight}"
        for projection in ("v_proj", "qkv_proj")
        for weight in ("weight", "lora_B.default.weight")
    )
    (name,) = [name for name in names if name.endswith(endings)]
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_values = config.num_key_value_heads * head_size
    return names[name], slice(names[name].shape[0] - num_values, None)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| / |expected| of a row of `[n, ...]`."""
    difference = found.double().flatten(1) - expected.double().flatten(1)
    return float((difference.norm(dim=1) / expected.double().flatten(1).norm(dim=1)).max())


def correlation(found: Tensor, expected: Tensor) -> float:
    """Pearson correlation of all entries."""
    return float(torch.corrcoef(torch.stack([found.double().flatten(), expected.double().flatten()]))[0, 1])
