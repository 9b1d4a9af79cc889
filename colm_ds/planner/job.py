"""Make a job to plan, from a recipe without weights or network, or from a running engine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from colm_ds.batching.collate import IGNORE_INDEX
from colm_ds.config.colm import CoLMSection
from colm_ds.config.deepspeed import resolve_auto
from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.token_store import MANIFEST, TokenStore
from colm_ds.errors import ConfigError
from colm_ds.models.quantized import quantized_linears, rounds_inputs
from colm_ds.planner.activations import ModelSpec, Rows, choice_rows, even_rows
from colm_ds.planner.choice_rows import CANDIDATE_TOKENS, num_rows
from colm_ds.planner.zero_states import ZeroSettings, zero_settings
from colm_ds.probe.replay import RATES_IN_LAYERS
from colm_ds.recipes.adapter import section_of
from colm_ds.recipes.model import DTYPES, load_tokenizer
from colm_ds.recipes.recipe import BaseRecipe, ChoiceRecipe, PretrainingRecipe, Recipe
from colm_ds.recipes.sections import LoraConfig
from colm_ds.types import LargeBatch, SourcedDataset

_RATES_OUTSIDE = ("dropout", "layerdrop", "embd_pdrop", "embedding_dropout", "residual_dropout")
"""Keys of a model's configuration for dropout that is no module within its layers."""

_BUCKET = "zero_optimization.reduce_bucket_size"
LENGTH_KEY, CHUNK_KEY = "data.max_length", "data.chunk_tokens"
"""Keys that set the length of examples in a recipe and in a pretraining recipe."""

KNOWN_MODELS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("known_models.json").read_text(encoding="utf-8")
)
"""Published shapes by the name in `model.name_or_path`, without keys that affect no size, such as pad tokens."""


@dataclass(frozen=True)
class Job:
    """Properties of a run that determine memory and time.

    Attributes:
        spec: the model.
        zero: ZeRO, ranks, offload.
        colm: the `"colm"` section with `coreset_size` filled in.
        micro_batch: examples per rank and backward pass, no more than a rank has in a step.
        length: tokens of the longest examples, which determine peaks.
        mean_length: mean tokens computed for an example, for stored hidden states and for time.
        label_share: share of the tokens that have labels.
        steps: optimizer steps of the run.
        candidates: for classification, tokens of each candidate of an example; `length` is then that of the prompt
            with the longest one, and `label_share` is unused.
        length_key: key that sets `length` in a recipe.
        bucket_key: key of the elements that are reduced together: in the recipe, or in its DeepSpeed file.
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
    bucket_key: str = _BUCKET

    @property
    def num_rows(self) -> int:
        """Sequences that are computed for an example."""
        return num_rows(self.candidates)

    @property
    def padded_length(self) -> int:
        """Tokens computed for one of the longest examples."""
        return self.num_rows * (self.length - 1) if self.candidates else self.length

    @property
    def row_tokens(self) -> int:
        """Tokens of a row that training computes: of one of the longest examples, or of a packed row."""
        packing = self.colm.packing
        return max(self.padded_length, packing) if isinstance(packing, int) else self.padded_length

    @property
    def packs(self) -> bool:
        """Return whether training packs examples into rows."""
        return self.colm.packing != "off"

    @property
    def rows_of_step(self) -> int:
        """Rows that a rank trains on in a step: examples of the mean length if they are packed, without a gap."""
        share = math.ceil(self.size / self.zero.world_size)
        return min(share, math.ceil(share * self.mean_length / self.row_tokens)) if self.packs else share

    def training_rows(self, count: int) -> Rows:
        """Return a training micro-batch of the longest examples, as few as fit, or of full packed rows."""
        if not self.packs:
            return self.rows(self.rows_at_once(count))
        if not self.candidates:
            return replace(even_rows(count, self.row_tokens, self.label_share), packed=True)
        examples = count * math.ceil(self.row_tokens / self.padded_length)
        return Rows(count, self.row_tokens, examples * sum(self.candidates), packed=True)

    def rows_at_once(self, count: int) -> int:
        """Return the rows of a training micro-batch of `count`, fewer if `micro_batch_tokens` says so."""
        most = self.colm.micro_batch_tokens
        return count if most is None or self.packs else min(count, max(1, most // self.padded_length))

    def rows(self, count: int) -> Rows:
        """Return a micro-batch of the longest examples."""
        if self.candidates:
            return choice_rows(count, self.length, self.candidates)
        return even_rows(count, self.length, self.label_share)

    @property
    def size(self) -> int:
        """b."""
        return self.colm.coreset_size or self.colm.large_batch_size

    @property
    def probes(self) -> bool:
        """Return whether the selector needs a pass over the large batch."""
        return self.colm.probes_model

    @property
    def replays(self) -> bool:
        """Return whether training starts from the probe's hidden states."""
        several = int(self.spec.text_config.num_hidden_layers) > 1
        can = self.probes and not self.packs and self.spec.checkpointing and several and not self._drops_unrepeatably
        return can and self.colm.replay != "off" and self.colm.probe.dtype == "auto"

    @property
    def _drops_unrepeatably(self) -> bool:
        """Return whether dropout keeps training from a replay, as `why_not_replay` sees it from the model."""
        lora, config = self.spec.lora, self.spec.text_config
        if lora is not None and lora.use_dora and lora.dropout > 0:
            return True
        return any(float(getattr(config, name, 0.0) or 0.0) > 0 for name in (*RATES_IN_LAYERS, *_RATES_OUTSIDE))

    def plain(self, size: int) -> Job:
        """Return the same job trained plainly on batches of a size."""
        colm = self.colm.model_copy(update={"selector": "full", "large_batch_size": size, "coreset_size": size})
        return replace(self, colm=colm, micro_batch=min(self.micro_batch, math.ceil(size / self.zero.world_size)))

    def by_tokens(self) -> Job:
        """Return the same job with b of 4 b chosen by token embeddings, without a pass of the model."""
        section: dict[str, Any] = {"large_batch_size": 4 * self.size, "coreset_size": self.size}
        section |= {"probe": {"estimator": "tokens"}, **self.colm.model_dump(include={"packing", "micro_batch_tokens"})}
        return replace(self, colm=CoLMSection.model_validate(section))

    def with_colm(self, **changes: object) -> Job:
        """Return the same job with other keys of the `"colm"` section."""
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
    """Make the job of a recipe's run.

    Args:
        recipe: the recipe.
        world_size: W.
        mean_length: mean tokens computed for an example; default: the maximum that the recipe allows.
        label_share: share of the tokens that have labels.
        candidate_tokens: for classification, tokens of every candidate; default: `CANDIDATE_TOKENS`.
        on_gpu: plan for GPUs instead of this CPU.
        configuration: the model's Hugging Face configuration, if already loaded.

    Raises:
        ConfigError: if the model's configuration is not available, or the recipe's numbers contradict each other.
    """
    candidates = _candidates(recipe, label_share, candidate_tokens)
    resolved = recipe.resolve(world_size)
    spec = ModelSpec(
        config=model_configuration(recipe) if configuration is None else configuration,
        dtype=DTYPES[recipe.model.dtype],
        attention=recipe.model.attention,
        lora=recipe.lora,
        checkpointing=recipe.model.activation_checkpointing,
        device_type="cuda" if on_gpu else "cpu",
        quantization=recipe.model.quantization,
        double_quant=recipe.model.bnb_4bit_use_double_quant,
    )
    hidden_size = getattr(spec.config, "hidden_size", None)
    deepspeed = resolve_auto(resolved.deepspeed, hidden_size=hidden_size, dtype=spec.dtype, where=recipe.where)
    if recipe.optimizer.torch_adam:
        deepspeed |= {"optimizer": {"params": {"torch_adam": True}}}
    zero = zero_settings(deepspeed, world_size, on_gpu=on_gpu)
    if spec.quantization is not None and zero.stage == 3:
        raise ConfigError(
            f"model.quantization = {spec.quantization!r}: ZeRO-3 partitions weights, and bitsandbytes needs whole "
            "ones. Use a deepspeed configuration of stage 0, 1 or 2."
        )
    key, length = _length(recipe)
    job = Job(
        spec,
        zero,
        resolved.colm,
        resolved.micro_batch_size,
        length,
        length,
        label_share,
        recipe.steps,
        candidates,
        key,
        bucket_key(recipe),
    )
    most = getattr(spec.config, "max_position_embeddings", None)
    if isinstance(recipe, PretrainingRecipe) and most is not None and length > most:
        raise ConfigError(f"{key} = {length}: more than the model's max_position_embeddings = {most}.")
    job = replace(job, mean_length=min(mean_length or job.padded_length, job.padded_length))
    return replace(job, micro_batch=min(job.micro_batch, job.rows_of_step))


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
    """Return the key of the maximum length of examples, and its value."""
    if isinstance(recipe, PretrainingRecipe):
        return CHUNK_KEY, recipe.data.chunk_tokens
    assert isinstance(recipe, (Recipe, ChoiceRecipe))
    return LENGTH_KEY, recipe.data.max_length


def _candidates(recipe: BaseRecipe, label_share: float, tokens: int | None) -> tuple[int, ...]:
    """Return the tokens of each candidate of a classification example; none for other data."""
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


def bucket_key(recipe: BaseRecipe) -> str:
    """Return where a recipe's `reduce_bucket_size` is written: a key of its own, or of its DeepSpeed file."""
    prefix = recipe.deepspeed_prefix or f"{recipe.deepspeed}: "
    return f"{prefix}{_BUCKET}"


def job_of_engine(engine: Any, batch: LargeBatch, recipe: BaseRecipe | None = None) -> Job:
    """Make the job of a running `CoLMEngine`, with examples like those of a large batch.

    Args:
        engine: the engine.
        batch: large batch, for its longest example and mean length.
        recipe: the recipe that the engine was made by, if there is one.
    """
    module, config = engine.deepspeed_engine.module, engine.config
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    adapters = getattr(module, "peft_config", {})
    lora = None
    if adapters:
        lora = LoraConfig.model_validate(section_of(next(iter(adapters.values())).to_dict()))
    device = engine.deepspeed_engine.device
    weight = next(parameter for parameter in base.parameters() if parameter.is_floating_point())
    spec = ModelSpec(
        config=base.config,
        dtype=weight.dtype,
        attention=str(base.config._attn_implementation),
        lora=lora,
        checkpointing=any(getattr(inner, "gradient_checkpointing", False) for inner in base.modules()),
        device_type=torch.device(device).type,
        quantization=_quantization(base),
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
        bucket_key=_BUCKET if recipe is None else bucket_key(recipe),
    )


def _quantization(model: torch.nn.Module) -> str | None:
    linears = [module for _, module in quantized_linears(model)]
    return None if not linears else "8bit" if rounds_inputs(linears[0]) else "4bit"


def _candidate_tokens(batch: LargeBatch) -> tuple[int, ...]:
    """Return the tokens of each candidate of this rank's example with the most padded tokens."""
    mine = list(batch.examples)
    example = batch.examples[mine[int(batch.padded_lengths[mine].argmax())]]
    assert example.candidates is not None
    parts = example.labels.split(list(example.candidates.lengths))
    return tuple(int((part != IGNORE_INDEX).sum()) for part in parts)


def model_configuration(recipe: BaseRecipe) -> Any:
    """Return the Hugging Face configuration of a recipe's model: its own, that of a folder, or a published one by name.

    Raises:
        ConfigError: if none is available.
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
            try:
                return AutoConfig.from_pretrained(name, local_files_only=True)
            except Exception as error:  # whatever a library makes of a broken file
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                advice = "Name a whole model folder, or give model.config"
                raise ConfigError(f"{name}/config.json: cannot be used: {reason}. {advice}.") from None
        known = known_model(name)
        if known is None:
            try:
                return AutoConfig.from_pretrained(name, local_files_only=True)
            except (OSError, ValueError):
                raise ConfigError(
                    f"model.name_or_path = {name!r}: no config.json there, and not among the known models "
                    f"({', '.join(KNOWN_MODELS)}). Give a folder with config.json, or model.config."
                ) from None
        values = known
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.config: {error}") from None


def _vocabulary_size(recipe: BaseRecipe) -> int:
    """Return the size of the recipe's tokenizer: by the token store's manifest if it exists, else by the recipe."""
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
    """Return a published configuration by hub name or last part of a path, ignoring case; None if unknown."""
    last = name.rstrip("/").split("/")[-1].split(":")[-1].lower()
    for key, values in KNOWN_MODELS.items():
        if last == key.split("/")[-1].split(":")[-1].lower():
            return dict(values)
    return None
