"""Check at start that the parts found in a model reproduce its own loss and the gradient of its V projection."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import Architecture, ProbeTarget
from colm_ds.models.patch import eval_mode
from colm_ds.models.precision import full_products
from colm_ds.models.quantized import float_weight, quantized_linears, rounds_inputs
from colm_ds.probe.factors import example_gradients, gradient_factors
from colm_ds.probe.tail import precise_tail, run_trunk, tail_losses
from colm_ds.randomness import private_generator
from colm_ds.types import Example

TOLERANCE, TOLERANCE_16_BITS = 1e-5, 2e-2
"""Largest relative difference of the losses in float32 and in 16 bits."""

GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a V gradient in float32, relative to its norm; a wrong row or layer makes it about 1."""

_LENGTHS = (7, 4)


def check_architecture(model: nn.Module, architecture: Architecture, tail_dtype: torch.dtype | None = None) -> None:
    """Compare the probe with the model itself on two short examples; every rank does the same.

    The probe's losses come from a padded batch, the model's own from each example alone, so a model whose attention is
    not causal fails too. In float32 the first example's gradient is compared as well, and where the projection is fused
    the model looks at a single token, whose queries and keys cannot matter: the rows with a gradient are the values.

    Args:
        model: the module to call: that of the DeepSpeed engine, or the model itself.
        architecture: its parts.
        tail_dtype: compare also the losses of `precise_tail` in this dtype, which `spsa` takes.

    Raises:
        ProbeError: if they differ, with the difference, or the model's code fails.
    """
    try:
        _check(model, architecture, tail_dtype)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        what = f"{type(error).__name__} in the probe's pass: {' '.join(str(error).split())[:200]}"
        raise _refused(architecture, what) from error


def _check(model: nn.Module, architecture: Architecture, tail_dtype: torch.dtype | None) -> None:
    device = next(architecture.last_layer.parameters()).device
    layer = architecture.last_layer
    dtypes = {parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()}
    dtypes |= {float_weight(module).dtype for _, module in quantized_linears(layer)}
    is_exact = dtypes <= {torch.float32, torch.float64} and not any(rounds_inputs(each) for each in layer.modules())
    examples = _examples(architecture)
    batch = make_micro_batch([Example(ids, ids, 0, index) for index, ids in enumerate(examples)]).to(device)
    with eval_mode(model), torch.no_grad(), full_products() if is_exact else nullcontext():
        cuts = [_Cut(target) for target in architecture.targets]
        first, gradients = _own_gradients(model, examples[0], cuts)
        is_exact = is_exact and not any(cut.is_lowered for cut in cuts)
        own = torch.stack([first, *(_own_loss(model, ids) for ids in examples[1:])])
        if not bool(torch.isfinite(own).all()):
            return  # the model is broken, which is not for the probe to say
        tail = run_trunk(model, architecture, batch)
        _compare(architecture, "loss", tail_losses(architecture, tail), own, is_exact)
        if tail_dtype is not None:
            with precise_tail(architecture, tail_dtype):
                losses = tail_losses(architecture, tail.cast(tail_dtype))
            _compare(architecture, f"{str(tail_dtype).removeprefix('torch.')} loss", losses, own, is_exact)
        if is_exact:
            factors = gradient_factors(architecture, tail)
            _compare_gradients(architecture, example_gradients(factors, 0, _LENGTHS[0]), gradients)
        if is_exact and any(cut.target.out_features < cut.width for cut in cuts):
            _check_rows(model, architecture, examples[1][:1])


def _examples(architecture: Architecture) -> list[Tensor]:
    """Draw token ids of every example, the same on all ranks."""
    generator = private_generator(0, "self-check")
    embedding: Any = architecture.model
    embedding = embedding.get_input_embeddings()
    size = min(architecture.vocabulary_size, int(getattr(embedding, "num_embeddings", architecture.vocabulary_size)))
    return [torch.randint(0, size, (length,), generator=generator) for length in _LENGTHS]


def _own_loss(model: Any, ids: Tensor) -> Tensor:
    """Compute the model's own mean token loss of one example, with the gradients that hooks have asked for."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if len(ids) == 1:
        return F.cross_entropy(logits, ids)
    return F.cross_entropy(logits[:-1], ids[1:])


class _Cut:
    """A hook from which on the model is differentiated: for the whole output of a probed module.

    Attributes:
        width: of the output.
        inputs: of the module, `[..., in]`.
        leaf: its output, which requires a gradient.
        is_lowered: whether it runs under autocast, as in models that accelerate has wrapped.
    """

    def __init__(self, target: ProbeTarget) -> None:
        self.target = target
        self.width = 0
        self.inputs: Tensor | None = None
        self.leaf: Tensor | None = None
        self.is_lowered = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        self.width = output.shape[-1]
        self.is_lowered = torch.is_autocast_enabled(output.device.type)
        self.inputs, self.leaf = inputs[0].detach(), output.detach().requires_grad_(True)
        torch.set_grad_enabled(True)  # until the block without gradients around this forward ends
        return self.leaf.clone()  # later operations may change it in place


def _own_gradients(model: nn.Module, ids: Tensor, cuts: list[_Cut]) -> tuple[Tensor, Tensor]:
    """Return the model's own loss of one example, and its gradient of the probed matrices, float32 `[d]`."""
    loss, deltas = _differentiated(model, ids, cuts)
    parts = []
    for cut, delta in zip(cuts, deltas, strict=True):
        assert cut.inputs is not None
        rows, inputs = cut.target.rows_of(delta).flatten(0, -2), cut.inputs.flatten(0, -2)
        parts.append((rows.T.float() @ inputs.float()).flatten())
    return loss, torch.cat(parts)


def _differentiated(model: nn.Module, ids: Tensor, cuts: list[_Cut]) -> tuple[Tensor, list[Tensor]]:
    with ExitStack() as hooks:
        for cut in cuts:
            hooks.enter_context(cut.target.hooking(cut))
        with torch.no_grad():
            loss = _own_loss(model, ids)
    leaves = [cut.leaf for cut in cuts if cut.leaf is not None]
    deltas = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(leaf) if delta is None else delta for leaf, delta in zip(leaves, deltas, strict=True)
    ]


def _compare(architecture: Architecture, what: str, probed: Tensor, own: Tensor, is_exact: bool) -> None:
    most = TOLERANCE if is_exact else TOLERANCE_16_BITS
    differences = (probed.double() - own.double()).abs() / own.double().abs().clamp_min(1e-6)
    worst = int(differences.argmax())
    if not float(differences[worst]) <= most:
        raise _refused(
            architecture,
            f"the {what} of the probe is {float(probed[worst]):.7g}, that of the model itself {float(own[worst]):.7g}, "
            f"a relative difference of {float(differences[worst]):.1e} (at most {most:g})",
        )


def _compare_gradients(architecture: Architecture, probed: Tensor, own: Tensor) -> None:
    difference = float((probed - own).norm() / own.norm().clamp_min(1e-20))
    if not difference <= GRADIENT_TOLERANCE:
        raise _refused(
            architecture,
            f"the gradient of {architecture.targets[0].name} in the probe differs from autograd's by {difference:.1e} "
            f"of its norm (at most {GRADIENT_TOLERANCE:g})",
        )


def _check_rows(model: nn.Module, architecture: Architecture, ids: Tensor) -> None:
    """Raise unless of a fused projection those rows that are taken for values have a gradient for a single token.

    Nothing is said where attention has a sink, a score without a token, beside which a single token's own matters.
    """
    if any("sink" in name for name, _ in architecture.last_layer.named_parameters()):
        return
    cuts = [_Cut(target) for target in architecture.targets]
    _, deltas = _differentiated(model, ids, cuts)
    for target, delta in zip(architecture.targets, deltas, strict=True):
        inside = float(target.rows_of(delta).norm())
        outside = float(target.with_rows(delta, torch.zeros_like(target.rows_of(delta))).norm())
        if outside > GRADIENT_TOLERANCE * inside:
            raise _refused(
                architecture,
                f"rows of {target.name} that are not taken for values ({architecture.layout}) have a gradient of norm "
                f"{outside:.1e} for a single token, the values' is {inside:.1e}",
            )


def _refused(architecture: Architecture, what: str) -> ProbeError:
    return ProbeError(
        f"self-check: model of type {architecture.model_type!r}: {what}. The probe does not read this model rightly; "
        "the selectors that need no probe (tokens, random, keep_random, full) can be used with it."
    )
