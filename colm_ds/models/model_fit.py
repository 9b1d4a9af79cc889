"""Check before training that a model fits its data: ids, positions, and that no token sees a later one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.batching.row_facts import RowFacts, facts_of_dataset
from colm_ds.errors import DataError, Problems
from colm_ds.models.architecture import num_embeddings
from colm_ds.models.patch import eval_mode
from colm_ds.types import Example, SourcedDataset

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|pos_emb(edding)?s?)$")
_PROBED = 8


@dataclass(frozen=True)
class ModelLimits:
    """Limits of what a model can be given.

    Attributes:
        num_ids: token ids that have an embedding; None: the model does not say.
        num_positions: learned positions; None: positions are computed, and have no end.
    """

    num_ids: int | None
    num_positions: int | None

    @classmethod
    def of(cls, model: nn.Module) -> ModelLimits:
        """Return the limits of any model of transformers, also wrapped by PEFT or partitioned by ZeRO-3."""
        return cls(num_embeddings(model), _learned_positions(model))

    def add_problems(self, facts: RowFacts, problems: Problems, of: str = "") -> None:
        """Record ids without an embedding, labels that cannot be predicted, and examples that are too long.

        Args:
            facts: what is known of the rows.
            problems: where they are recorded.
            of: name of the dataset behind the numbers of examples, such as " of eval_dataset".
        """
        rows, positions = self.num_ids, self.num_positions
        known = f"the model has embeddings for {rows:,} ids, 0 to {rows - 1}" if rows else ""
        resize = "Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save that."
        has_wrong_id = False
        for spot, is_wrong in (
            (facts.largest_id, lambda value: rows is not None and value >= rows),
            (facts.smallest_id, lambda value: value < 0),
        ):
            if spot is not None and is_wrong(spot[1]):
                has_wrong_id = True
                why = f"in example {spot[0]}{of}, and {known or 'ids count from 0'}"
                problems.add("token id", spot[1], why, resize if spot[1] >= 0 else "Ids count from 0.")
        for spot, is_wrong in (
            (facts.largest_label, lambda value: rows is not None and value >= rows),
            (facts.smallest_label, lambda value: value < 0),
        ):
            if spot is not None and is_wrong(spot[1]) and not has_wrong_id:
                why = f"in example {spot[0]}{of}, and {known or 'labels are token ids'}"
                problems.add("label", spot[1], why, f"Write a token id, or {IGNORE_INDEX} for no prediction.")
        longest = facts.longest
        if positions is not None and longest is not None and longest[1] > positions:
            problems.add(
                "length",
                longest[1],
                f"of example {longest[0]}{of} in tokens, and the model has learned {positions} positions",
                f"Truncate examples to at most {positions} tokens (data.max_length of a recipe, max_length of TRL).",
            )

    def check(self, examples: Iterable[Example]) -> None:
        """Check examples that were not looked at before training.

        Raises:
            DataError: naming the first that the model cannot be given.
        """
        for place, example in enumerate(examples):
            ids, labels = example.input_ids, example.labels[1:]
            labels = labels[labels != IGNORE_INDEX]
            is_numbered = example.index >= 0
            where = f"example {example.index} of the dataset" if is_numbered else f"example {place} of this rank's"
            for name, values in (("token id", ids), ("label", labels)):
                if not len(values):
                    continue
                low, high = int(values.min()), int(values.max())
                if low < 0 or (self.num_ids is not None and high >= self.num_ids):
                    known = "" if self.num_ids is None else f"; the model has embeddings for 0 to {self.num_ids - 1}"
                    raise DataError(
                        f"{where}: {name} {low if low < 0 else high}{known}. Use the model's own tokenizer."
                    )
            if self.num_positions is not None and len(ids) > self.num_positions:
                raise DataError(
                    f"{where}: {len(ids)} tokens, and the model has learned {self.num_positions} positions. Truncate "
                    "examples."
                )


def check_model_fits(model: nn.Module, dataset: SourcedDataset | None, where: str = "model") -> None:
    """Raise if the model cannot be trained on the data; all ranks call it together, before training.

    Args:
        model: any model of transformers, also wrapped by PEFT or partitioned by ZeRO-3.
        dataset: the examples; None checks the model alone.
        where: what the message names as the place of the problems.

    Raises:
        ConfigError: as `check_rows_fit`, `check_causal` and `check_router_loss`.
    """
    check_rows_fit(model, dataset, where)
    check_causal(model, where)
    check_router_loss(model, where)


def check_rows_fit(model: nn.Module, dataset: SourcedDataset | None, where: str = "model") -> None:
    """Check what needs no pass of the model.

    Raises:
        ConfigError: naming token ids without an embedding, labels that are none, examples without a label or longer
            than the learned positions, heads that do not divide.
    """
    problems = Problems(where)
    if dataset is not None:
        ModelLimits.of(model).add_problems(facts_of_dataset(dataset), problems)
        empty = np.flatnonzero(np.asarray(dataset.num_label_tokens) == 0)
        if len(empty):
            why = f"the first is {empty[0]}"
            problems.add("examples without a label to train on", len(empty), why, "Leave them out.")
    add_head_problems(getattr(model, "config", None), problems)
    problems.raise_if_any()


def check_causal(model: nn.Module, where: str = "model") -> None:
    """Raise a `ConfigError` if a token of the model sees later ones; passes eight tokens through it twice."""
    if is_causal(model) is False:
        problems = Problems(where)
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        why = "a token sees later ones, so its next token is no prediction"
        problems.add("model type", kind, why, "Use a causal LM.")
        problems.raise_if_any()


def check_router_loss(model: nn.Module, where: str = "model") -> None:
    """Raise a `ConfigError` if a mixture of experts is to add its router's loss, which is one of no example."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and coefficient:
        problems = Problems(where)
        why = "the router's loss is one of the whole batch, and examples are chosen and weighed by their own"
        instead = "Write 0 to train without it, or set output_router_logits to false."
        problems.add("router_aux_loss_coef", coefficient, why, instead)
        problems.raise_if_any()


def add_head_problems(config: Any, problems: Problems) -> None:
    """Record heads of a model's configuration that divide neither its hidden size nor each other."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    if getattr(config, "head_dim", None) in (None, hidden // heads) and hidden % heads:
        problems.add("num_attention_heads", heads, f"does not divide hidden_size = {hidden}", "Choose a divisor.")
    if isinstance(groups, int) and groups > 0 and heads % groups:
        problems.add(
            "num_key_value_heads", groups, f"does not divide num_attention_heads = {heads}", "Choose a divisor."
        )


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
