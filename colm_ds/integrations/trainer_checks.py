"""Check that a `transformers.Trainer` works with selection, and report all problems before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import Trainer

from colm_ds.batching.row_facts import has_arrow_columns
from colm_ds.config.colm import CoLMSection
from colm_ds.config.optimizer import check_groups, check_numbers
from colm_ds.errors import CoLMError, ConfigError, Problems
from colm_ds.integrations.large_batches import ExampleCollator, facts_by_columns, number_common
from colm_ds.models.architecture import find_architecture
from colm_ds.models.model_fit import ModelLimits, add_head_problems, check_router_loss

TAKEN_OVER = {
    "compute_loss": "is called in evaluation, not for the micro-batches of a coreset",
    "get_train_dataloader": "is not called: large batches are read instead",
    "get_batch_samples": "is not called: coresets are chosen instead",
}
"""Methods that `CoLMMixin` has in front of a Trainer's, and what that means for those of a class in between."""

KNOWN_TRAINERS = {
    ("llamafactory", "CustomSeq2SeqTrainer"): {"compute_loss": ""},
    ("axolotl", "AxolotlTrainer"): {"compute_loss": "tokens per second (include_tkps) are not counted in training"},
}
"""Classes, by package, whose methods the mixin may go in front of, and what is lost with it."""


def check_arguments(trainer: Any, loss_owner: type, allows_overrides: bool, problems: Problems) -> None:
    """Record arguments of a trainer that selection cannot work with.

    Args:
        trainer: the trainer, after its `__init__`.
        loss_owner: class whose `compute_loss` follows the mixin's.
        allows_overrides: whether losses of the user's own may be lost.
        problems: collects problems.
    """
    args = trainer.args
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started != args.world_size:
        problems.messages.append(
            f"ranks: {started} processes were started, but the Trainer counts {args.world_size}, so that each would "
            "train by itself. Without an accelerator write use_cpu = True."
        )
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy == "batch_rebalance":
        problems.add(
            "train_sampling_strategy",
            strategy,
            "cuts batches by length, so a large batch would not be a draw of the mixture",
            'Remove it: micro-batches of a coreset are sorted by length anyway. "random" and "sequential" work.',
        )
    _check_packing(args, problems)
    _check_loss(trainer, loss_owner, allows_overrides, problems)
    for key in ("auto_find_batch_size", "use_liger_kernel", "save_on_each_node"):
        if getattr(args, key, False):
            problems.add(key, True, "does not work with selection", "Remove it.")
    settings = args.accelerator_config
    for key in ("split_batches", "dispatch_batches"):
        if getattr(settings, key, None):
            problems.add(f"accelerator_config.{key}", True, "every rank reads its own examples", "Remove it.")
    if args.n_gpu > 1:
        problems.add("n_gpu", args.n_gpu, "one process for several GPUs", "Start with torchrun or accelerate launch.")
    parallel = {"FSDP": trainer.is_fsdp_enabled, "tensor parallelism": trainer.get_tp_size() > 1}
    parallel |= {"context parallelism": trainer.get_cp_size() > 1, "sequence parallelism": trainer.get_sp_size() > 1}
    for name in (name for name, on in parallel.items() if on):
        problems.messages.append(f"{name}: not supported with selection. Use DDP or DeepSpeed ZeRO.")


def check_sizes(trainer: Any, config: CoLMSection, num_examples: int, problems: Problems) -> None:
    """Record sizes that contradict each other, and a model that cannot be probed."""
    args, world_size, large = trainer.args, trainer.args.world_size, config.large_batch_size
    parts = args.gradient_accumulation_steps * world_size
    if large % parts:
        problems.add(
            "large_batch_size",
            large,
            f"not divisible by gradient_accumulation_steps = {args.gradient_accumulation_steps} x {world_size} ranks",
            f"Write {max(1, large // parts) * parts} or {-(-large // parts) * parts}.",
        )
    if large > num_examples:
        problems.add("large_batch_size", large, f"train_dataset has {num_examples} examples", "Write less or add data.")
    if config.probes_model:
        try:
            find_architecture(trainer.model, config.probe.layer)
        except CoLMError as error:
            problems.messages.append(f"model: {error}")


def check_optimization(trainer: Any, problems: Problems) -> None:
    """Record numbers that no optimizer takes, of the arguments or of an optimizer that was given, and heads."""
    args = trainer.args
    names = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
    check_numbers({name: getattr(args, name, None) for name in names}, problems)
    try:
        check_groups(trainer.optimizer)
    except CoLMError as error:
        problems.messages.append(str(error))
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", {})
    for section in ("optimizer", "scheduler"):
        check_numbers((deepspeed.get(section) or {}).get("params") or {}, problems, f"{section}.params.")
    add_head_problems(getattr(trainer.model, "config", None), problems)


def check_heldout(trainer: Any, limits: ModelLimits, problems: Problems, notes: list[str]) -> None:
    """Record evaluation data that the model cannot be given, and note what of it is trained on.

    Args:
        trainer: the trainer; `eval_dataset` may be one dataset, several by name, or None.
        limits: of the model.
        problems: gets ids and lengths that the model cannot be given.
        notes: gets a line about examples that are in both.
    """
    several = trainer.eval_dataset
    several = several if isinstance(several, Mapping) else {"": several}
    for name, dataset in several.items():
        key = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        if dataset is None:
            continue
        train = trainer.train_dataset
        try:
            if has_arrow_columns(dataset):
                collator = trainer._get_collator_with_removed_columns(trainer.data_collator, description="evaluation")
                facts = facts_by_columns(dataset, ExampleCollator(collator, np.zeros(len(dataset), dtype=np.int64)))
                if facts is not None:
                    limits.add_problems(facts, problems, f" of {key}")
            common = len(train) if dataset is train else number_common(train, dataset)
        except CoLMError as error:
            problems.messages.append(f"{key}: {error}")
            continue
        if common:
            notes.append(
                f"{key}: {common:,} of {len(dataset):,} examples are trained on too, so its loss says less of other "
                "texts. Hold rows out of train_dataset (train_test_split)."
            )


def _check_packing(args: Any, problems: Problems) -> None:
    for key in ("packing", "padding_free", "sample_packing"):
        if getattr(args, key, False):
            problems.add(
                key,
                True,
                "a packed row holds documents of several sources, so it has no source of its own and is not an example "
                "to keep or to leave out",
                "Remove it. To train on packed rows, pack every source by itself beforehand and give the rows a source "
                "column: then a row is an example",
            )


def _check_loss(trainer: Any, loss_owner: type, allows_overrides: bool, problems: Problems) -> None:
    args = trainer.args
    if trainer.compute_loss_func is not None and not allows_overrides:
        problems.messages.append(
            "compute_loss_func: not called for a coreset, as CoLM weighs the losses of examples by itself. Remove it, "
            "or give colm_allow_overrides=True to train without it."
        )
    if getattr(args, "orpo_alpha", None):
        problems.add("orpo_alpha", args.orpo_alpha, "a loss of pairs, not of examples", "Remove it.")
    if is_trl(loss_owner):
        if args.label_smoothing_factor:
            problems.add("label_smoothing_factor", args.label_smoothing_factor, "TRL's loss has none", "Remove it.")
        if getattr(args, "loss_type", "nll") != "nll":
            problems.add("loss_type", args.loss_type, "has no loss per example", 'Write "nll".')
        if getattr(trainer, "aux_loss_enabled", False):
            problems.messages.append("router_aux_loss_coef: a loss of the whole batch has no weights. Write 0.")
        return
    try:
        check_router_loss(trainer.model, "the model")
    except ConfigError as error:
        problems.messages.append(str(error))


def take_over(trainer: Any, mixin: type, allows_overrides: bool, problems: Problems) -> list[str]:
    """Put the mixin's methods in front of those of classes behind it, and of functions assigned to the trainer.

    The Trainer's own functions are accepted wherever they were assigned, and those of `KNOWN_TRAINERS`.

    Args:
        trainer: the trainer, after its `__init__`; functions assigned to it are removed.
        mixin: `CoLMMixin`.
        allows_overrides: accept every other function too.
        problems: collects functions that are not accepted.

    Returns:
        What is lost, a line each.
    """
    kinds = type(trainer).__mro__
    lost = []
    for method, why in TAKEN_OVER.items():
        own = getattr(Trainer, method)
        if method in vars(trainer):
            assigned = vars(trainer).pop(method)
            name, function, known = f"{method} assigned to the trainer", getattr(assigned, "__func__", assigned), None
        else:
            kind = next(kind for kind in kinds[kinds.index(mixin) + 1 :] if method in vars(kind))
            name, function = f"{kind.__name__}.{method}", vars(kind)[method]
            known = KNOWN_TRAINERS.get((kind.__module__.split(".")[0], kind.__name__), {}).get(method)
            if is_trl(kind):
                known = ""  # its compute_loss is called for its metrics
        if function is own or known == "":
            continue
        if known or allows_overrides:
            lost.append(f"{name}: {known or why}.")
            continue
        problems.messages.append(
            f"{name}: {why}. Use transformers.Trainer or trl.SFTTrainer, put what it adds into a class in front of "
            "CoLMMixin, or give colm_allow_overrides=True to train without it."
        )
    if trainer.compute_loss_func is not None and allows_overrides:
        lost.append("compute_loss_func: is not called for the micro-batches of a coreset.")
    return lost


def is_trl(loss_owner: type) -> bool:
    """Return whether this is TRL's `SFTTrainer`, whose `compute_loss` also keeps its metrics."""
    return loss_owner.__module__.startswith("trl.") and loss_owner.__name__ == "SFTTrainer"
