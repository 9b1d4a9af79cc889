"""Check at start that a model keeps documents of a packed row apart, by its own losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import MicroBatch, make_micro_batch
from colm_ds.batching.packing import Packing, pack_micro_batch
from colm_ds.errors import ConfigError
from colm_ds.models.architecture import find_head, unwrap
from colm_ds.models.example_loss import find_loss_head, label_losses
from colm_ds.models.patch import eval_mode
from colm_ds.models.precision import full_products
from colm_ds.models.token_loss import sums_by_row
from colm_ds.randomness import private_generator
from colm_ds.types import Example

TOLERANCE, TOLERANCE_16_BITS = 1e-5, 2e-2
"""Largest relative difference between a document's loss in a row and alone, in float32 and in 16 bits."""

LEAK, LEAK_16_BITS = 1e-3, 0.1
"""Largest change of a token's loss by other documents, relative to that by the document's own earlier tokens."""

_SHORTEST_ROW = 12


def check_packing(model: nn.Module, packing: str | int, row_tokens: int, num_rows: int) -> Packing:
    """Find a layout of packed rows in which every document has the losses that it has alone; every rank does the same.

    Rows as long as in training are filled with documents of random tokens, and compared with each document alone. In
    16 bits that shows large errors only, so the tokens of the other documents are changed as well: a document's losses
    must not notice, while its own earlier tokens change them. If several rows of several documents fail, as with flash
    attention, the same is tried with all of them in one row.

    Args:
        model: the module to call: that of the DeepSpeed engine, or the model itself.
        packing: value of `colm.packing`, for the message.
        row_tokens: tokens that a row may hold.
        num_rows: rows of a micro-batch.

    Raises:
        ConfigError: if there is no such layout, with the reason.
    """
    base: Any = unwrap(model)
    config = getattr(base, "config", None)
    reason = _prompt_learning(model)
    if reason is None:
        layouts = (False, True) if num_rows > 1 else (False,)
        for one_row in layouts:
            reason = _why_not(model, row_tokens, min(num_rows, 2), one_row)
            if reason is None:
                return Packing(row_tokens, one_row)
    attention = getattr(config, "_attn_implementation", None)
    raise ConfigError(
        f"colm.packing = {packing!r}: model of type {getattr(config, 'model_type', type(base).__name__)!r}"
        f"{'' if attention is None else f' with {attention} attention'}: {reason}. Packed documents would not be "
        'trained on as they are alone: write "off", or use a model and an attention that take position_ids.'
    )


def _prompt_learning(model: nn.Module) -> str | None:
    """Return why an adapter of learned virtual tokens cannot be packed; None without such an adapter."""
    adapters = getattr(model, "peft_config", None) or {}
    kinds = [str(getattr(one.peft_type, "value", one.peft_type)) for one in adapters.values() if one.is_prompt_learning]
    return f"{kinds[0]} puts virtual tokens before a row, not before each document in it" if kinds else None


def _why_not(model: nn.Module, row_tokens: int, num_rows: int, one_row: bool) -> str | None:
    """Return what goes wrong in a layout of rows; None if nothing does."""
    try:
        return _compare(model, max(row_tokens, _SHORTEST_ROW), num_rows, one_row)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        return f"{type(error).__name__} in a packed pass: {' '.join(str(error).split())[:200]}"


def _compare(model: nn.Module, row_tokens: int, num_rows: int, one_row: bool) -> str | None:
    third = row_tokens // 3
    sizes = [row_tokens - 2 * third, third, third, *([third, third] if num_rows > 1 else [])]
    row_sizes = [len(sizes)] if one_row else [3, 2][:num_rows]
    last = [2, 4][:num_rows]  # documents that others precede in their row
    documents = _documents(model, sizes)
    changed = [ids if index in last else _changed(model, ids) for index, ids in enumerate(documents)]
    half = (third // 2 - 1) | 1  # odd: no chunk of attention, as in Llama 4, ends there
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes) - 1)  # of every label
    renewed = [
        torch.cat([_changed(model, ids[:half]), ids[half:]]) if index in last else ids
        for index, ids in enumerate(documents)
    ]
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    is_exact = {parameter.dtype for parameter in weights} <= {torch.float32, torch.float64}
    with eval_mode(model), torch.no_grad(), full_products() if is_exact else nullcontext():
        losses = _losses(model, _packed(documents, row_sizes))
        alone = torch.cat([_losses(model, make_micro_batch([_example(ids)])) for ids in documents])
        if not bool(torch.isfinite(alone).all()):
            return None  # the model is broken, which is not for packing to say
        others, own = (_losses(model, _packed(each, row_sizes)) for each in (changed, renewed))
    packed, wanted = (sums_by_row(each, owners, len(sizes)) for each in (losses, alone))
    differences = (packed - wanted).abs() / wanted.abs().clamp_min(1e-6)
    worst, most = int(differences.argmax()), TOLERANCE if is_exact else TOLERANCE_16_BITS
    if not float(differences[worst]) <= most:
        return (
            f"a document of {sizes[worst]} tokens has a loss of {float(wanted[worst]) / (sizes[worst] - 1):.6g} alone "
            f"and {float(packed[worst]) / (sizes[worst] - 1):.6g} behind others in a row, a relative difference of "
            f"{float(differences[worst]):.1e} (at most {most:g})"
        )
    inside = torch.isin(owners, torch.tensor(last))
    later = inside & (torch.cat([torch.arange(size - 1) for size in sizes]) >= half)
    leak, effect = float((others - losses)[inside].abs().max()), float((own - losses)[later].abs().max())
    most = LEAK if is_exact else LEAK_16_BITS
    if not leak <= most * effect or effect == 0.0:
        return (
            f"other documents of a row change the loss of a token by {leak:.1e}, its own document's earlier tokens by "
            f"{effect:.1e} (at most {most:g} of that)"
        )
    return None


def _documents(model: nn.Module, sizes: Sequence[int]) -> list[Tensor]:
    """Draw token ids of every document, the same on all ranks."""
    generator = private_generator(0, "packing")
    return [torch.randint(0, _vocabulary_size(model), (size,), generator=generator) for size in sizes]


def _changed(model: nn.Module, ids: Tensor) -> Tensor:
    """Return other token ids, none of them equal."""
    return (ids + 1) % _vocabulary_size(model)


def _vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that both the input embedding and the head know."""
    base: Any = unwrap(model)
    embedding, head = base.get_input_embeddings(), find_head(base)
    sizes = [getattr(embedding, "num_embeddings", None), getattr(head, "out_features", None)]
    return min([int(size) for size in sizes if size is not None] or [int(base.config.vocab_size)])


def _example(ids: Tensor) -> Example:
    return Example(ids, ids, 0, 0)


def _packed(documents: Sequence[Tensor], row_sizes: Sequence[int]) -> MicroBatch:
    return pack_micro_batch(make_micro_batch([_example(ids) for ids in documents]), row_sizes)


def _losses(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the losses of all labels in nats, float64 `[num_labels]` on the CPU, by document and position."""
    device = next(model.parameters()).device
    return label_losses(model, find_loss_head(model), batch.to(device)).double().cpu()
