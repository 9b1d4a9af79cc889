"""An engine's state into a checkpoint and back, so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colm_ds.checkpoints import atomic
from colm_ds.distributed.agreement import broadcast_text
from colm_ds.errors import CheckpointError
from colm_ds.randomness import random_state, restore_random_state


def save_engine(engine: Any, folder: Path, tag: str, client_state: Mapping[str, Any], keep_last: int | None) -> None:
    """Write a checkpoint of a `CoLMEngine`; see `CoLMEngine.save_checkpoint`."""
    shared = {
        "client_state": dict(client_state),
        "selector": engine.coreset_selector.state_dict(),
        "sources": engine.loader.other_sources,
        "next_step": engine.loader.next_step,
        "step_count": engine.step_count,
        "num_samples": engine.num_samples,
        "skipped": (engine.skipped.total, engine.skipped.in_a_row),
    }
    atomic.save(
        engine.deepspeed_engine,
        folder,
        tag,
        step=engine.step_count,
        shared=shared,
        own={"random_state": random_state()},
        facts=_facts(engine),
        keep_last=keep_last,
        exclude_frozen=_has_frozen(engine),
    )


def load_engine(
    engine: Any, folder: Path, tag: str | None, **options: Any
) -> tuple[atomic.Found | None, dict[str, Any]]:
    """Restore a `CoLMEngine`; see `CoLMEngine.load_checkpoint`."""
    found = find_together(folder, tag)
    if found is None:
        return None, {}
    ours, theirs = _facts(engine), found.facts
    for key in ours:
        if ours[key] != theirs.get(key):
            raise CheckpointError(
                f"{found.path}: {_difference(key, theirs.get(key), ours[key])}. "
                "Resume with the model, LoRA and ZeRO stage that it was saved with."
            )
    if _has_frozen(engine):
        options = {"load_module_strict": False, **options}
    atomic.load(engine.deepspeed_engine, found, **options)
    shared, own = atomic.read_state(found, dist.get_rank())
    if shared.get("sources"):
        engine.set_sources(shared["sources"]["names"], shared["sources"]["ids"].numpy())
    engine.coreset_selector.load_state_dict(shared["selector"])
    engine.loader.next_step = shared["next_step"]
    engine.step_count, engine.num_samples = shared["step_count"], shared["num_samples"]
    engine.skipped.total, engine.skipped.in_a_row = shared["skipped"]
    if own is not None:
        restore_random_state(own["random_state"])
    return found, shared["client_state"]


def find_together(folder: Path, tag: str | None = None) -> atomic.Found | None:
    """The checkpoint to load, looked for by rank 0 for all; all ranks call it together.

    Raises:
        CheckpointError: on every rank, if there are checkpoints but none that can be loaded.
    """
    answer: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            found = atomic.find(folder, tag, repair=True)
            answer = {"path": str(found.path), "passed_over": found.passed_over} if found else {}
        except CheckpointError as error:
            answer = {"error": str(error)}
    answer = json.loads(broadcast_text(json.dumps(answer), 0))
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return atomic.describe(Path(answer["path"]), answer["passed_over"]) if answer else None


def _facts(engine: Any) -> dict[str, Any]:
    """What a checkpoint must agree on with the engine that loads it."""
    trained = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.deepspeed_engine.module.named_parameters()
        if parameter.requires_grad
    }
    return {"stage": int(engine.deepspeed_engine.zero_optimization_stage()), "trained": trained}


def _has_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.deepspeed_engine.module.parameters())


def _difference(key: str, saved: Any, own: Any) -> str:
    """How a fact of a checkpoint differs from the engine's."""
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return f"was saved with {key} {saved}, this engine has {own}"
    for name in sorted({*own, *saved}):
        if own.get(name) != saved.get(name):
            return f"{name} has shape {saved.get(name)} there and {own.get(name)} here (None: not trained)"
    return ""
