"""CoLM in axolotl, as a plugin: `plugins: [colm_ds.integrations.axolotl.CoLMPlugin]` and a `colm:` block."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from colm_ds.batching.row_facts import Labels, facts_of_columns
from colm_ds.errors import ConfigError, Problems
from colm_ds.integrations.dataset_sources import (
    NO_LOSS,
    OWN_LOSS,
    PACKED,
    STREAM,
    add_refused,
    check_block,
    dataset_names,
    process_by_source,
    row_sources,
)
from colm_ds.integrations.large_batches import WithoutSource
from colm_ds.integrations.transformers import CoLMMixin

__all__ = ["CoLMArgs", "CoLMPlugin"]

_PACKED = (
    f"{PACKED} and is not an example to keep or to leave out. Write false; to train on packed rows, pack every source "
    "by itself beforehand and give the rows a source column"
)

REFUSED = {
    "sample_packing": _PACKED,
    "batch_flattening": _PACKED,
    "pretraining_dataset": f"{STREAM}. Write datasets",
    "streaming": f"{STREAM}. Remove it",
    "balance_labels": "cuts batches by labels, so a large batch would not be a draw of the mixture. Remove it",
    "use_eaft": OWN_LOSS,
    "use_dft": OWN_LOSS,
    "rl": f"{NO_LOSS}. Remove it",
    "reward_model": f"{NO_LOSS}. Remove it",
    "process_reward_model": f"{NO_LOSS}. Remove it",
    "trainer_cls": "is another trainer. Put CoLMMixin in front of it, without this plugin",
}
"""Keys of axolotl, and why selection does not go along with them."""


class CoLMArgs(BaseModel):
    """The keys that the plugin adds to axolotl's."""

    colm: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def check_colm(cls, data: Any) -> Any:
        """Check the `colm:` block, and that the other keys go with it.

        Raises:
            ConfigError: listing everything that cannot work.
        """
        problems = Problems("the axolotl configuration")
        check_block(data.get("colm"), "the axolotl configuration", problems)
        add_refused(data, REFUSED, problems)
        problems.raise_if_any()
        return data


class CoLMPlugin(BasePlugin):
    """Train axolotl's models on coresets.

    The source of a row is its `source` column (`colm.source_column`), or else the name of its dataset. An optimizer
    step trains on b = micro_batch_size x gradient_accumulation_steps x ranks out of `colm.large_batch_size` examples;
    an epoch reads floor(n / r) large batches.
    """

    def register(self, cfg: Any) -> None:
        """Have axolotl keep the sources while it prepares datasets, and count steps by large batches."""
        from axolotl.utils.data import sft

        for name, wrapper in (
            ("get_dataset_wrapper", _with_sources),
            ("generate_dataset_hash_from_config", _with_own_hash),
            ("calculate_total_num_steps", _with_steps_of_large_batches),
        ):
            original = getattr(sft, name)
            if not hasattr(original, "colm_original"):
                replacement = wraps(original)(wrapper(original))
                replacement.colm_original = original  # type: ignore[attr-defined]
                setattr(sft, name, replacement)

    def get_input_args(self) -> str:
        """Return where axolotl finds the keys."""
        return "colm_ds.integrations.axolotl.CoLMArgs"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return axolotl's trainer on coresets."""
        if not cfg.colm:
            return None
        from axolotl.core.trainers import AxolotlTrainer

        section = _section(cfg)

        class CoLMAxolotlTrainer(CoLMMixin, AxolotlTrainer):
            """axolotl's trainer on coresets."""

            def __init__(self, *args: Any, eval_data_collator: Any = None, **kwargs: Any) -> None:
                if eval_data_collator is not None:
                    eval_data_collator = WithoutSource(eval_data_collator, _column(cfg))
                super().__init__(*args, colm=section, eval_data_collator=eval_data_collator, **kwargs)

        return CoLMAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raise if another plugin's trainer was taken.

        Raises:
            ConfigError: naming the trainer.
        """
        if cfg.colm and not isinstance(trainer, CoLMMixin):
            raise ConfigError(
                f"plugins: {type(trainer).__name__} was taken as the trainer, which knows nothing of coresets. Put "
                "colm_ds.integrations.axolotl.CoLMPlugin before the plugin that has it, or remove one of them."
            )


def _with_sources(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `get_dataset_wrapper`, which tokenizes a dataset, so that it keeps the sources."""

    def get_dataset_wrapper(**given: Any) -> Any:
        cfg, entry, dataset = given["cfg"], given["dataset_config"], given.get("dataset")
        if not cfg.colm:
            return original(**given)
        prompters = []

        def process(part: Any) -> Any:
            processed, prompter = original(**{**given, "dataset": part})
            prompters.append(prompter)
            return processed

        name = dataset_names([*(dict(other) for other in cfg.datasets or ()), dict(entry)])[-1]
        sources = row_sources(dataset, name, _column(cfg))
        return process_by_source(dataset, sources, _column(cfg), process), prompters[0]

    return get_dataset_wrapper


def _with_own_hash(original: Callable[..., str]) -> Callable[..., str]:
    """Return the function that names a prepared dataset, so that one without sources is not taken."""

    def generate_dataset_hash_from_config(cfg: Any, *args: Any, **kwargs: Any) -> str:
        name = original(cfg, *args, **kwargs)
        return f"{name}-by-{_column(cfg)}" if cfg.colm else name

    return generate_dataset_hash_from_config


def _with_steps_of_large_batches(original: Callable[..., int]) -> Callable[..., int]:
    """Return the function that counts the steps of a run, so that an epoch has floor(n / r)."""

    def calculate_total_num_steps(cfg: Any, train_dataset: Any, *args: Any, **kwargs: Any) -> int:
        steps = original(cfg, train_dataset, *args, **kwargs)
        if not cfg.colm:
            return steps
        facts = facts_of_columns(train_dataset, Labels("labels"))
        per_epoch = (facts.num_rows - len(facts.without_label)) // int(_section(cfg)["large_batch_size"])
        return math.ceil(cfg.num_epochs * per_epoch)

    return calculate_total_num_steps


def _section(cfg: Any) -> dict[str, Any]:
    section: dict[str, Any] = cfg.colm.to_dict() if hasattr(cfg.colm, "to_dict") else dict(cfg.colm)
    return section


def _column(cfg: Any) -> str:
    return str(_section(cfg).get("source_column", "source"))
