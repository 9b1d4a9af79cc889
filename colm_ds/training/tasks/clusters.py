"""A task whose sources are clusters of the model's hidden states, made while it trains or taken from a proxy."""

from __future__ import annotations

import time
from typing import Any

import torch

from colm_ds.data.clusters import cluster_together, hidden_features
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.distributed.agreement import together
from colm_ds.errors import ConfigError
from colm_ds.evaluation.model_source import find_model, load, load_its_tokenizer
from colm_ds.models.example_loss import find_loss_head
from colm_ds.randomness import derive_seed
from colm_ds.recipes.choices import ClusterConfig
from colm_ds.recipes.recipe import BaseRecipe
from colm_ds.training.tasks.base import InTraining, TrainingTask
from colm_ds.types import SourcedDataset

_MAX_TOKENS, _MAX_TOKENS_CPU = 16384, 2048
"""Padded tokens of a batch; larger ones leave a CPU's caches (benchmarks/README.md)."""


class ClusteredTask:
    """Implements `TrainingTask` around another one."""

    def __init__(self, task: TrainingTask, recipe: BaseRecipe, clusters: ClusterConfig, tokenizer: Any) -> None:
        """Check what can be checked before training.

        Raises:
            ConfigError: for more clusters than examples, or a proxy that does not exist or has another tokenizer.
        """
        self._task = task
        self._config = clusters
        self._seed = recipe.seed
        self._steps = clusters.steps(recipe.steps)
        most = clusters.num if isinstance(clusters.num, int) else clusters.num[1]
        if most >= len(task.train):
            raise ConfigError(f"clusters.num = {clusters.num}: must be less than the {len(task.train)} examples.")
        self._proxy = find_model(clusters.features_from, dtype=recipe.model.dtype) if clusters.uses_proxy else None
        if self._proxy is not None:
            theirs, ours = describe_tokenizer(load_its_tokenizer(self._proxy)), describe_tokenizer(tokenizer)
            if theirs != ours:
                raise ConfigError(
                    f"clusters.features_from = {clusters.features_from}: its tokenizer is not the recipe's. "
                    "Take a proxy of the same model."
                )

    @property
    def train(self) -> SourcedDataset:
        """See `TrainingTask.train`: with the sources of the data; the engine knows the clusters."""
        return self._task.train

    @property
    def target(self) -> SourcedDataset | None:
        """See `TrainingTask.target`."""
        return self._task.target

    def identity(self) -> dict[str, dict[str, str]]:
        """See `TrainingTask.identity`."""
        return self._task.identity()

    def losses_of_data(self) -> list[str]:
        """See `TrainingTask.losses_of_data`."""
        return self._task.losses_of_data()

    def begin_step(self, run: InTraining, step: int) -> dict[str, Any]:
        """See `TrainingTask.begin_step`; makes the clusters when they are due."""
        facts = self._task.begin_step(run, step)
        if step - 1 in self._steps:
            facts |= {"clusters": self._make(run, step)}
        return facts

    def heldout(self, run: InTraining) -> dict[str, Any] | None:
        """See `TrainingTask.heldout`."""
        return self._task.heldout(run)

    def finish(self, run: InTraining) -> dict[str, Any]:
        """See `TrainingTask.finish`."""
        return self._task.finish(run)

    def describe(self) -> dict[str, Any]:
        """See `TrainingTask.describe`."""
        return {**self._task.describe(), "clusters_made_after_steps": self._steps}

    def _make(self, run: InTraining, step: int) -> dict[str, Any]:
        """Cluster, set the engine's sources accordingly, and return entries for the metrics."""
        started = time.perf_counter()
        with run.engine.watchdog.watching(f"the clusters before step {step}"):
            features = self._features(run)
            seed = derive_seed(self._seed, "clusters", step)
            made = cluster_together(features, len(self.train), self._config.num, seed, run.exchange)
        names = [f"cluster {number}" for number in range(len(made.counts))]
        run.engine.set_sources(names, made.labels)
        return {
            "counts": dict(zip(names, made.counts, strict=True)),
            "small": [names[source] for source in run.engine.coreset_selector.small],
            "silhouettes": {str(number): score for number, score in made.silhouettes.items()},
            "time_s": time.perf_counter() - started,
        }

    def _features(self, run: InTraining) -> torch.Tensor:
        model: Any = run.engine.deepspeed_engine.module
        if self._proxy is not None:
            source = self._proxy
            model = together(lambda: load(source)[0], run.device).to(run.device)
        head = find_loss_head(model)
        if head is None:
            raise ConfigError("clusters: the hidden states of a model of this type are not known. Leave clusters out.")
        max_tokens = self._config.max_tokens
        if max_tokens == "auto":
            max_tokens = _MAX_TOKENS_CPU if run.device.type == "cpu" else _MAX_TOKENS
        return hidden_features(
            model,
            model,
            head,
            self.train,
            device=run.device,
            exchange=run.exchange,
            rank=run.rank,
            max_tokens=max_tokens,
        )
