"""Check before training that a model fits its data: ids, positions, and that no token sees a later one."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from colm_ds.errors import ConfigError, Problems
from colm_ds.models.architecture import num_embeddings
from colm_ds.models.patch import eval_mode
from colm_ds.types import SourcedDataset

MOST_READ = 10_000
"""Examples that are read for their ids where a dataset does not hold its tokens in one array."""

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|pos_emb(edding)?s?)$")
_TOKENS_AT_ONCE = 1 << 24
_PROBED = 8


def check_model_fits(model: nn.Module, dataset: SourcedDataset, where: str = "model") -> None:
    """Raise if the model cannot be trained on the data; all ranks call it together, before training.

    Args:
        model: any model of transformers, also wrapped by PEFT or partitioned by ZeRO-3.
        dataset: the examples.
        where: what the message names as the place of the problems.

    Raises:
        ConfigError: naming token ids without an embedding, examples longer than the learned positions, a model whose
            tokens see later ones.
    """
    problems = Problems(where)
    rows = num_embeddings(model)
    if rows is not None:
        place, largest = largest_token(dataset)
        if largest >= rows:
            problems.add(
                "token id",
                largest,
                f"in example {place}, and the model has embeddings for {rows:,} ids, 0 to {rows - 1}",
                "Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save that.",
            )
    positions = _learned_positions(model)
    lengths = np.asarray(dataset.lengths)
    if positions is not None and len(lengths) and int(lengths.max()) > positions:
        longest = int(lengths.argmax())
        problems.add(
            "length",
            int(lengths.max()),
            f"of example {longest} in tokens, and the model has learned {positions} positions",
            f"Truncate examples: data.max_length at most {positions}.",
        )
    if not problems.messages and is_causal(model) is False:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        problems.add(
            "model type", kind, "a token sees later ones, so its next token is no prediction", "Use a causal LM."
        )
    problems.raise_if_any(ConfigError)


def largest_token(dataset: SourcedDataset) -> tuple[int, int]:
    """Return an example with the largest token id, and that id; (0, -1) of a dataset without tokens.

    All tokens count if the dataset has them in one array `tokens`, else those of its first `MOST_READ` examples.
    """
    tokens: Any = getattr(dataset, "tokens", None)
    starts: Any = getattr(dataset, "starts", None)
    best = (0, -1)
    if isinstance(tokens, np.ndarray) and isinstance(starts, np.ndarray) and len(starts):
        first = int(starts.min())
        for begin in range(first, len(tokens), _TOKENS_AT_ONCE):
            part = tokens[begin : begin + _TOKENS_AT_ONCE]
            if int(part.max()) > best[1]:
                place = begin + int(part.argmax())
                best = (int(np.where(starts <= place, starts, -1).argmax()), int(part.max()))
        return best
    for index in islice(range(len(dataset)), MOST_READ):
        ids = dataset[index].input_ids
        if len(ids) and int(ids.max()) > best[1]:
            best = (index, int(ids.max()))
    return best


def is_causal(model: nn.Module) -> bool | None:
    """Return whether logits stay what they are if a later token changes; None if the model cannot be asked."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    rows = num_embeddings(model)
    if rows is None or rows < 4:
        return None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ids = (torch.arange(_PROBED) % (rows - 2) + 1).to(device)[None]
    other = ids.clone()
    other[0, -1] = 1 if int(ids[0, -1]) != 1 else 2
    with eval_mode(model), torch.no_grad():
        try:
            one, two = (model(input_ids=each, use_cache=False).logits[0, :-1].float() for each in (ids, other))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
    if one.shape != two.shape or not bool(torch.isfinite(one).all() & torch.isfinite(two).all()):
        return None
    spread = float((one - one.mean()).abs().max())
    is_exact = all(each.dtype in (torch.float32, torch.float64) for each in model.parameters())
    return float((one - two).abs().max()) <= (1e-5 if is_exact else 5e-3) * spread


def _learned_positions(model: nn.Module) -> int | None:
    """Return the number of positions that a model has learned; None if positions are computed."""
    named = [module for name, module in model.named_modules() if _POSITIONS.search(name)]
    sizes = [module.num_embeddings for module in named if isinstance(module, nn.Embedding)]
    if not sizes:
        return None
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(sizes + ([int(stated)] if isinstance(stated, int) else []))
