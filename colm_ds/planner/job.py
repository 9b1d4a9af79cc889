"""A job to plan, from a recipe without weights or network, or from an engine that is running."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import load_config, resolve_config
from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.token_store import MANIFEST, TokenStore
from colm_ds.errors import ConfigError
from colm_ds.planner.activations import ModelSpec, Rows, choice_rows, even_rows
from colm_ds.planner.choice_rows import CANDIDATE_TOKENS, num_rows
from colm_ds.planner.zero_states import ZeroSettings, zero_settings
from colm_ds.recipes.model import DTYPES, load_tokenizer
from colm_ds.recipes.recipe import BaseRecipe, ChoiceRecipe, PretrainingRecipe, Recipe
from colm_ds.recipes.sections import LoraConfig
from colm_ds.types import LargeBatch, SourcedDataset

LENGTH_KEY, CHUNK_KEY = "data.max_length", "data.chunk_tokens"
"""What sets the length of examples in a recipe, and of a pretraining recipe's."""

KNOWN_MODELS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("known_models.json").read_text(encoding="utf-8")
)
"""Published shapes by the name in `model.name_or_path`, without what no size depends on, such as pad tokens."""


@dataclass(frozen=True)
class Job:
    """A run as far as memory and time depend on it.

    Attributes:
        spec: the model.
        zero: ZeRO, ranks, offload.
        colm: the `"colm"` section with `coreset_size` filled in.
        micro_batch: examples per rank and backward pass.
        length: tokens of the longest examples, which decide about peaks.
        mean_length: tokens computed for an example on average, for hidden states that are kept and for time.
        label_share: share of the tokens that have labels.
        steps: optimizer steps of the run.
        candidates: for classification, tokens of each candidate of an example; `length` is then that of the prompt
            with the longest one, and `label_share` says nothing.
        length_key: what sets `length` in a recipe.
    """

    spec: ModelSpec
    zero: ZeroSettings
    colm: CoLMSection
    micro_batch: int
    length: int
    mean_length: float
    label_share: float = 1.0
    steps: int = 1
    candidates: tuple[int, ...] = ()
    length_key: str = "data.max_length"

    @property
    def num_rows(self) -> int:
        """Sequences that are computed for an example."""
        return num_rows(self.candidates)

    @property
    def padded_length(self) -> int:
        """Tokens computed for one of the longest examples."""
        return self.num_rows * (self.length - 1) if self.candidates else self.length

    def rows(self, count: int) -> Rows:
        """A micro-batch of the longest examples."""
        if self.candidates:
            return choice_rows(count, self.length, self.candidates)
        return even_rows(count, self.length, self.label_share)

    @property
    def size(self) -> int:
        """b."""
        return self.colm.coreset_size or self.colm.large_batch_size

    @property
    def probes(self) -> bool:
        """Whether the selector needs a pass over the large batch."""
        return self.colm.probes_model

    @property
    def replays(self) -> bool:
        """Whether training starts from the probe's hidden states."""
        can = self.probes and self.spec.checkpointing and int(self.spec.config.num_hidden_layers) > 1
        return can and self.colm.replay != "off" and self.colm.probe.dtype == "auto"

    def plain(self, size: int) -> Job:
        """The same job trained plainly on batches of a size."""
        colm = self.colm.model_copy(update={"selector": "full", "large_batch_size": size, "coreset_size": size})
        return replace(self, colm=colm, micro_batch=min(self.micro_batch, math.ceil(size / self.zero.world_size)))

    def by_tokens(self) -> Job:
        """The same job with b of 4 b chosen by token embeddings, without a pass of the model."""
        section = {"large_batch_size": 4 * self.size, "coreset_size": self.size, "probe": {"estimator": "tokens"}}
        return replace(self, colm=CoLMSection.model_validate(section))

    def with_colm(self, **changes: object) -> Job:
        """The same job with other keys of the `"colm"` section."""
        return replace(self, colm=self.colm.model_copy(update=changes))


def job_of_recipe(
    recipe: BaseRecipe,
    world_size: int,
    *,
    mean_length: float | None = None,
    label_share: float = 1.0,
    candidate_tokens: int | None = None,
    on_gpu: bool = True,
    configuration: Any = None,
) -> Job:
    """What a recipe's run needs planning for.

    Args:
        recipe: the recipe.
        world_size: W.
        mean_length: tokens computed for an example on average; default: all as long as the recipe allows.
        label_share: share of the tokens that have labels.
        candidate_tokens: for classification, tokens of every candidate; default: `CANDIDATE_TOKENS`.
        on_gpu: plan for GPUs, or for this CPU.
        configuration: the model's Hugging Face configuration, where it is loaded.

    Raises:
        ConfigError: if the model's configuration is not at hand, or the recipe's numbers do not fit together.
    """
    candidates = _candidates(recipe, label_share, candidate_tokens)
    loaded, _ = load_config(recipe.deepspeed)
    resolved = resolve_config(
        {**loaded, "train_micro_batch_size_per_gpu": recipe.micro_batch_size, "colm": recipe.colm},
        world_size,
    )
    spec = ModelSpec(
        config=model_configuration(recipe) if configuration is None else configuration,
        dtype=DTYPES[recipe.model.dtype],
        attention=recipe.model.attention,
        lora=recipe.lora,
        checkpointing=recipe.model.activation_checkpointing,
        device_type="cuda" if on_gpu else "cpu",
    )
    key, length = _length(recipe)
    job = Job(
        spec,
        zero_settings(resolved.deepspeed, world_size, on_gpu=on_gpu),
        resolved.colm,
        resolved.micro_batch_size,
        length,
        length,
        label_share,
        recipe.steps,
        candidates,
        key,
    )
    most = getattr(spec.config, "max_position_embeddings", None)
    if isinstance(recipe, PretrainingRecipe) and most is not None and length > most:
        raise ConfigError(f"{key} = {length}: more than the model's max_position_embeddings = {most}.")
    return replace(job, mean_length=min(mean_length or job.padded_length, job.padded_length))


def job_of_data(
    recipe: BaseRecipe, data: SourcedDataset, world_size: int, *, on_gpu: bool, configuration: Any = None
) -> Job:
    """Return what a recipe's run needs planning for, with mean length and share of labels as in its data.

    Args:
        recipe: the recipe.
        data: its training examples.
        world_size: W.
        on_gpu: plan for GPUs, or for this CPU.
        configuration: the model's Hugging Face configuration, where it is loaded.

    Raises:
        ConfigError: as `job_of_recipe`.
    """
    share = 1.0 if isinstance(recipe, ChoiceRecipe) else float(data.num_label_tokens.sum() / data.lengths.sum())
    return job_of_recipe(
        recipe,
        world_size,
        mean_length=float(data.lengths.mean()),
        label_share=min(1.0, share),
        on_gpu=on_gpu,
        configuration=configuration,
    )


def _length(recipe: BaseRecipe) -> tuple[str, int]:
    """The key that says how long examples are at most, and its value."""
    if isinstance(recipe, PretrainingRecipe):
        return CHUNK_KEY, recipe.data.chunk_tokens
    assert isinstance(recipe, (Recipe, ChoiceRecipe))
    return LENGTH_KEY, recipe.data.max_length


def _candidates(recipe: BaseRecipe, label_share: float, tokens: int | None) -> tuple[int, ...]:
    """Tokens of each candidate of a classification example; none for other data."""
    if not isinstance(recipe, ChoiceRecipe):
        if tokens is not None:
            raise ConfigError(f"--candidate-tokens {tokens}: for task: choices only. Leave it out.")
        return ()
    if label_share != 1.0:
        raise ConfigError(f"--label-share {label_share:g}: classification learns from candidates only. Leave it out.")
    known = CANDIDATE_TOKENS[recipe.data.task]
    if tokens is None:
        return known
    if not 1 <= tokens < recipe.data.max_length:
        raise ConfigError(f"--candidate-tokens {tokens}: not from 1 to below data.max_length.")
    return (tokens,) * len(known)


def job_of_engine(engine: Any, batch: LargeBatch) -> Job:
    """What a running `CoLMEngine` needs planning for, with examples as those of a large batch.

    Args:
        engine: the engine.
        batch: its longest example counts, and their mean length.
    """
    module, config = engine.deepspeed_engine.module, engine.config
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    adapters = getattr(module, "peft_config", {})
    lora = None
    if adapters:
        found = next(iter(adapters.values()))
        lora = LoraConfig(
            rank=found.r,
            alpha=found.lora_alpha,
            dropout=found.lora_dropout,
            targets=sorted(found.target_modules),
        )
    device = engine.deepspeed_engine.device
    weight = next(parameter for parameter in base.parameters() if parameter.is_floating_point())
    spec = ModelSpec(
        config=base.config,
        dtype=weight.dtype,
        attention=str(base.config._attn_implementation),
        lora=lora,
        checkpointing=any(getattr(inner, "gradient_checkpointing", False) for inner in base.modules()),
        device_type=torch.device(device).type,
    )
    world_size = engine.deepspeed_engine.world_size
    zero = zero_settings(config.deepspeed, world_size, on_gpu=spec.device_type == "cuda")
    is_choice = batch.candidates is not None
    return Job(
        spec,
        zero,
        config.colm,
        config.micro_batch_size,
        int(batch.widths.max()) + is_choice,  # the last token of a candidate is not in its row
        float(batch.lengths.double().mean()),
        1.0 if is_choice else float(batch.num_label_tokens.sum() / batch.lengths.sum()),
        candidates=_candidate_tokens(batch) if is_choice else (),
        length_key=CHUNK_KEY if isinstance(engine.loader.dataset, ChunkDataset) else LENGTH_KEY,
    )


def _candidate_tokens(batch: LargeBatch) -> tuple[int, ...]:
    """Tokens of each candidate of the example with the most padded tokens, of those that this rank holds."""
    mine = list(batch.examples)
    example = batch.examples[mine[int(batch.padded_lengths[mine].argmax())]]
    assert example.candidates is not None
    parts = example.labels.split(list(example.candidates.lengths))
    return tuple(int((part != IGNORE_INDEX).sum()) for part in parts)


def model_configuration(recipe: BaseRecipe) -> Any:
    """The Hugging Face configuration of a recipe's model: its own, that of a folder, or a published one by name.

    Raises:
        ConfigError: if none is at hand.
    """
    from transformers import AutoConfig

    model = recipe.model
    if model.config is not None:
        values = dict(model.config)
        if "vocab_size" not in values:
            multiple = model.vocabulary_multiple
            values["vocab_size"] = -(-_vocabulary_size(recipe) // multiple) * multiple
    else:
        name = str(model.name_or_path)
        if (Path(name) / "config.json").is_file():
            return AutoConfig.from_pretrained(name, local_files_only=True)
        found = known_model(name)
        if found is None:
            try:
                return AutoConfig.from_pretrained(name, local_files_only=True)
            except (OSError, ValueError):
                raise ConfigError(
                    f"model.name_or_path = {name!r}: no config.json there, and not among the known models "
                    f"({', '.join(KNOWN_MODELS)}). Give a folder with config.json, or model.config."
                ) from None
        values = found
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.config: {error}") from None


def _vocabulary_size(recipe: BaseRecipe) -> int:
    """Tokens of the recipe's tokenizer: of a token store by its manifest, or as long as there is none by the recipe."""
    if not isinstance(recipe, PretrainingRecipe) or recipe.tokenizer is not None:
        return len(load_tokenizer(recipe.model, recipe.tokenizer_place))
    manifest = Path(recipe.data.store) / MANIFEST
    if manifest.is_file():
        return int(TokenStore(recipe.data.store).manifest["vocabulary_size"])
    if recipe.prepare.tokenizer is None:
        return recipe.prepare.vocabulary_size
    try:
        return len(load_tokenizer(recipe.model, recipe.prepare.tokenizer))
    except ConfigError as error:
        raise ConfigError(f"{error} Or set model.config.vocab_size: the plan then needs no tokenizer.") from None


def known_model(name: str) -> dict[str, Any] | None:
    """A published configuration by hub name or by the last part of a path, in any case; None if there is none."""
    last = name.rstrip("/").split("/")[-1].split(":")[-1].lower()
    for key, values in KNOWN_MODELS.items():
        if last == key.split("/")[-1].split(":")[-1].lower():
            return dict(values)
    return None
