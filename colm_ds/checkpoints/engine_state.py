"""Save an engine's state and restore it, so that a resumed run continues as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.tensors_only import pickle_stage_by_value
from colm_ds.distributed.agreement import broadcast_text
from colm_ds.errors import CheckpointError
from colm_ds.randomness import restore_random_state


def save_engine(
    engine: Any,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    *,
    keep_last: int | None,
    save_latest: bool,
    exclude_frozen: bool,
) -> None:
    """Write a checkpoint of a `CoLMEngine`; see `CoLMEngine.save_checkpoint`."""
    pickle_stage_by_value()
    atomic.save(
        engine.deepspeed_engine,
        folder,
        tag,
        step=engine.step_count,
        shared={"client_state": dict(client_state), **engine.state_dict()},
        own={"random_state": engine.random_state()},
        facts=_facts(engine) | _order(engine),
        keep_last=keep_last,
        resumed_in=engine.resumed_in,
        save_latest=save_latest,
        exclude_frozen=exclude_frozen and _has_frozen(engine),
    )


def check_order(engine: Any, checkpoint: atomic.Checkpoint) -> None:
    """Raise a `CheckpointError` if a checkpoint's place in the data is of another order than a `CoLMEngine` reads."""
    for key, this in _order(engine).items():
        saved = checkpoint.facts.get(key, this)  # earlier versions did not note it
        if saved != this:
            raise CheckpointError(
                f"{checkpoint.path}: saved with {key} {saved}, this run has {this}, so its place in the data is of "
                "another order. Resume with the former, or take the weights alone (load_module_only=True)."
            )


def load_engine(engine: Any, checkpoint: atomic.Checkpoint, **options: Any) -> dict[str, Any]:
    """Restore a `CoLMEngine` and return the client state; see `CoLMEngine.resume`."""
    ours, theirs = _facts(engine), checkpoint.facts
    for key in ours:
        if ours[key] != theirs.get(key):
            raise CheckpointError(
                f"{checkpoint.path}: {_difference(key, theirs.get(key), ours[key])}. "
                "Resume with the model, LoRA and ZeRO stage that it was saved with."
            )
    if options.get("load_module_only") and ours["stage"] == 3:
        raise CheckpointError(
            f"{checkpoint.path}: load_module_only: DeepSpeed loads no weights alone at ZeRO stage 3. Load at another "
            "stage, or give the run the folder that colm-ds export writes."
        )
    if _has_frozen(engine):
        options = {"load_module_strict": False, **options}
    with _damage_told(checkpoint):
        atomic.load(engine.deepspeed_engine, checkpoint, **options)
        shared, own = atomic.read_state(checkpoint, dist.get_rank())
        client_state: dict[str, Any] = shared.pop("client_state")
        if options.get("load_module_only"):
            return client_state
        engine.load_state_dict(shared)
        if own is not None:
            restore_random_state(own["random_state"])
    return client_state


@contextmanager
def _damage_told(checkpoint: atomic.Checkpoint) -> Iterator[None]:
    """Turn what files that fit their manifest, but not each other, make of loading into one message."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{checkpoint.path}: its files do not make a state of this run: {type(error).__name__}: {reason}. Move it "
            "away to resume from an older one."
        ) from error


def find_on_all_ranks(folder: Path, tag: str | None = None) -> atomic.Checkpoint | None:
    """Return the checkpoint to load, which rank 0 searches for; all ranks call it together.

    Raises:
        CheckpointError: on every rank, if there are checkpoints but none that can be loaded.
    """
    checkpoint, error = None, None
    if dist.get_rank() == 0:
        try:
            checkpoint = atomic.find(folder, tag, repair=True)
        except CheckpointError as failed:
            error = str(failed)
    return on_all_ranks(checkpoint, error)


def on_all_ranks(checkpoint: atomic.Checkpoint | None, error: str | None = None) -> atomic.Checkpoint | None:
    """Return rank 0's checkpoint on every rank; all ranks call it together.

    Args:
        checkpoint: rank 0's; ignored on other ranks.
        error: rank 0's error message, if it failed.

    Raises:
        CheckpointError: on every rank, if rank 0 has an error.
    """
    answer: dict[str, Any] = {"path": str(checkpoint.path), "passed_over": checkpoint.passed_over} if checkpoint else {}
    answer = json.loads(broadcast_text(json.dumps(answer if error is None else {"error": error}), 0))
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return atomic.describe(Path(answer["path"]), answer["passed_over"]) if answer else None


def _facts(engine: Any) -> dict[str, Any]:
    """Return the facts that a checkpoint and the engine that loads it must share."""
    trained = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.deepspeed_engine.module.named_parameters()
        if parameter.requires_grad
    }
    return {"stage": int(engine.deepspeed_engine.zero_optimization_stage()), "trained": trained}


def _order(engine: Any) -> dict[str, int]:
    """Return what the order follows from in which rows are read."""
    colm = engine.config.colm
    return {"large_batch_size": colm.large_batch_size, "seed": colm.seed, "dataset": len(engine.loader.dataset)}


def _has_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.deepspeed_engine.module.parameters())


def _difference(key: str, saved: Any, own: Any) -> str:
    """Describe how a fact of a checkpoint differs from the engine's."""
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return f"was saved with {key} {saved}, this engine has {own}"
    for name in sorted({*own, *saved}):
        if own.get(name) != saved.get(name):
            return f"{name} has shape {saved.get(name)} there and {own.get(name)} here (None: not trained)"
    return ""
