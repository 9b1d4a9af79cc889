"""Pretrain on chunks of a token store: perplexity by source, epochs of every source, the best weights."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from colm_ds.batching.weighted_mixture import WeightedSampler
from colm_ds.checkpoints.weights import save_trained
from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.token_store import HELDOUT, TRAIN, TokenStore
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import ConfigError
from colm_ds.recipes.recipe import PretrainingRecipe
from colm_ds.run_folder.contents import BEST_MODEL
from colm_ds.run_folder.files import read_object
from colm_ds.training.tasks.base import InTraining, measure_heldout_loss

_BEFORE = f".{BEST_MODEL}_before"
"""Where the best weights stay until better ones are in their place."""


class PretrainingTask:
    """Implements `TrainingTask` for a recipe on chunks of text."""

    target = None

    def __init__(self, recipe: PretrainingRecipe, tokenizer: Any) -> None:
        """Open the store.

        Raises:
            ConfigError: if tokenizer, weights or batch size do not fit the store.
            DataError: if the store is missing or damaged.
        """
        data = recipe.data
        store = TokenStore(data.store)
        if describe_tokenizer(tokenizer) != store.manifest["tokenizer"]:
            raise ConfigError(
                f"tokenizer = {recipe.tokenizer_place!r}: not the one that {data.store} was made with. "
                "Leave the key out to take the store's."
            )
        self._recipe = recipe
        self._manifest, self._digest = store.manifest, store.digest
        self.train = ChunkDataset(store, TRAIN, data.chunk_tokens, data.weights)
        limit = recipe.evaluation.chunks_per_source
        self._heldout = ChunkDataset(store, HELDOUT, data.chunk_tokens, data.weights, limit)
        if recipe.colm.large_batch_size > len(self.train):
            raise ConfigError(
                f"colm.large_batch_size = {recipe.colm.large_batch_size}: more than the {len(self.train)} chunks of "
                f"{data.store}. Choose fewer, or add data."
            )
        longest = (recipe.model.config or {}).get("max_position_embeddings")
        if longest is not None and data.chunk_tokens > longest:
            raise ConfigError(
                f"data.chunk_tokens = {data.chunk_tokens}: more than the model's max_position_embeddings = {longest}."
            )
        self._sampler = self.train.sampler(recipe.colm.large_batch_size, recipe.colm.seed)
        self._best: float | None = None

    def identity(self) -> dict[str, dict[str, str]]:
        """See `TrainingTask.identity`: the store."""
        return {"data.store": {"place": self._recipe.data.store, "digest": self._digest}}

    def losses_of_data(self) -> list[str]:
        """See `TrainingTask.losses_of_data`: none, as a store is complete."""
        return []

    def begin_step(self, run: InTraining, step: int) -> dict[str, Any]:
        """See `TrainingTask.begin_step`: `epochs`, passes over each source up to this step."""
        if isinstance(self._sampler, WeightedSampler):
            epochs = self._sampler.epochs(step)
        else:
            epochs = [step * self._recipe.colm.large_batch_size / len(self.train)] * len(self.train.source_names)
        named = zip(self.train.source_names, epochs, strict=True)
        return {"epochs": {name: round(value, 6) for name, value in named}}

    def heldout(self, run: InTraining) -> dict[str, Any] | None:
        """See `TrainingTask.heldout`: nats per token and perplexity, overall by the mixture's shares."""
        if not len(self._heldout):
            return None
        if self._best is None:  # only now, after a new run has removed earlier weights
            best = _best_so_far(Path(self._recipe.output_dir)) if run.rank == 0 else math.inf
            self._best = float(run.exchange.broadcast(torch.tensor([best], dtype=torch.float64)))
        losses = measure_heldout_loss(run, self._heldout, self._recipe.evaluation.max_tokens)
        shares = {name: self.train.mixture_counts[name] for name in losses["per_source"]}
        total = sum(loss * shares[name] for name, loss in losses["per_source"].items())
        losses["overall"] = total / sum(shares.values())
        perplexity = {name: math.exp(min(loss, 700.0)) for name, loss in losses["per_source"].items()}
        losses["perplexity"] = {"overall": math.exp(min(losses["overall"], 700.0)), "per_source": perplexity}
        step = run.engine.step_count
        if self._recipe.keep_best and step > 0 and losses["overall"] < self._best:
            self._best = losses["overall"]
            self._keep_best(run, step, self._best)
        return losses

    def finish(self, run: InTraining) -> dict[str, Any]:
        """See `TrainingTask.finish`: step and loss of the best weights."""
        best = Path(self._recipe.output_dir) / BEST_MODEL / "best.json"
        return {"best": read_object(best)} if best.exists() else {}

    def describe(self) -> dict[str, Any]:
        """See `TrainingTask.describe`."""
        return {
            "num_heldout": len(self._heldout),
            "chunks": dict(zip(self.train.source_names, self.train.sizes, strict=True)),
            "heldout_chunks": dict(zip(self._heldout.source_names, self._heldout.sizes, strict=True)),
            "weights": self.train.weights,
            "store_digest": self._digest,
            "vocabulary_size": self._manifest["vocabulary_size"],
        }

    def _keep_best(self, run: InTraining, step: int, loss: float) -> None:
        """Replace the best weights atomically."""
        folder = Path(self._recipe.output_dir)
        aside = folder / f".{BEST_MODEL}"
        written = save_trained(run.engine, run.tokenizer, aside, is_main=run.rank == 0)
        if run.rank == 0:
            facts = {"step": step, "heldout_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            (written / "best.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
            before = folder / _BEFORE
            shutil.rmtree(before, ignore_errors=True)
            if (folder / BEST_MODEL).exists():
                os.replace(folder / BEST_MODEL, before)
            os.replace(written, folder / BEST_MODEL)
            shutil.rmtree(aside)
            shutil.rmtree(before, ignore_errors=True)


def _best_so_far(folder: Path) -> float:
    """Return the loss of the best weights of a resumed run, put back where a kill came while they were replaced."""
    before = folder / _BEFORE
    if before.exists() and not (folder / BEST_MODEL).exists():
        os.replace(before, folder / BEST_MODEL)
    try:
        return float(read_object(folder / BEST_MODEL / "best.json")["heldout_loss"])
    except (ValueError, KeyError, TypeError):
        return math.inf
