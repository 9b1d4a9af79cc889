"""Check that a `transformers.Trainer` works with selection, and report all problems before training."""

from __future__ import annotations

from typing import Any

from colm_ds.config.colm import CoLMSection
from colm_ds.errors import CoLMError, Problems
from colm_ds.models.architecture import find_architecture

_REORDERING = {"group_by_length": "sorts by length", "batch_rebalance": "cuts batches by length"}


def check_arguments(trainer: Any, loss_owner: type, problems: Problems) -> None:
    """Record arguments of a trainer that selection cannot work with.

    Args:
        trainer: the trainer, after its `__init__`.
        loss_owner: class whose `compute_loss` follows the mixin's.
        problems: collects problems.
    """
    args = trainer.args
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy in _REORDERING:
        problems.add(
            "train_sampling_strategy",
            strategy,
            f"{_REORDERING[strategy]}, so a large batch would not be a draw of the mixture",
            'Remove it: micro-batches of a coreset are sorted by length anyway. "random" and "sequential" work.',
        )
    _check_packing(args, problems)
    _check_loss(trainer, loss_owner, problems)
    for key in ("auto_find_batch_size", "torch_compile", "use_liger_kernel", "save_on_each_node"):
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


def check_sizes(trainer: Any, config: CoLMSection, problems: Problems) -> None:
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
    num_examples = len(trainer.train_dataset)
    if large > num_examples:
        problems.add("large_batch_size", large, f"train_dataset has {num_examples} examples", "Write less or add data.")
    if config.signal is not None:
        try:
            find_architecture(trainer.model, config.probe.layer)
        except CoLMError as error:
            problems.messages.append(f"model: {error}")


def _check_packing(args: Any, problems: Problems) -> None:
    for key in ("packing", "padding_free"):
        if getattr(args, key, False):
            problems.add(
                key,
                True,
                "a packed row holds documents of several sources, so it has no source of its own and is not an example "
                "to keep or to leave out",
                "Remove it. To train on packed rows, pack every source by itself beforehand and give the rows a source "
                "column: then a row is an example",
            )


def _check_loss(trainer: Any, loss_owner: type, problems: Problems) -> None:
    args = trainer.args
    fix = "Remove it: the loss is the weighted mean of the examples' (colm.loss_normalization)."
    if args.label_smoothing_factor:
        problems.add("label_smoothing_factor", args.label_smoothing_factor, "CoLM weighs examples by itself", fix)
    if trainer.compute_loss_func is not None:
        problems.messages.append(f"compute_loss_func: CoLM weighs the losses of examples by itself. {fix}")
    if is_trl(loss_owner):
        if getattr(args, "loss_type", "nll") != "nll":
            problems.add("loss_type", args.loss_type, "has no loss per example", 'Write "nll".')
        if getattr(trainer, "aux_loss_enabled", False):
            problems.messages.append("router_aux_loss_coef: a loss of the whole batch has no weights. Write 0.")
    elif loss_owner.__module__ != "transformers.trainer":
        problems.messages.append(
            f"{loss_owner.__name__}.compute_loss: would be ignored, as CoLM weighs the losses of examples itself. "
            "Use transformers.Trainer or trl.SFTTrainer, or put what it adds into a class in front of CoLMMixin."
        )


def is_trl(loss_owner: type) -> bool:
    """Return whether this is TRL's `SFTTrainer`, whose `compute_loss` also keeps its metrics."""
    return loss_owner.__module__.startswith("trl.") and loss_owner.__name__ == "SFTTrainer"
