"""Recipes: one YAML file per run, strict keys, `key=value` overrides, paths relative to the recipe or to here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from colm_ds.config.colm import CoLMSection
from colm_ds.config.section import Section, validate_section
from colm_ds.data.records import HUB
from colm_ds.errors import ConfigError, Problems
from colm_ds.recipes.choices import ChoiceDataConfig, ClusterConfig

PACKAGE_PREFIX = "package:"


class ModelConfig(Section):
    """Which model is trained."""

    name_or_path: str | None = Field(
        None, description="folder, hub name, or package:NAME for files inside an installed Python package"
    )
    gguf_file: str | None = Field(None, description="GGUF file in that folder to load weights and tokenizer from")
    config: dict[str, Any] | None = Field(
        None, description="build from this Hugging Face configuration with random weights instead (needs model_type)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="precision of weights and compute")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, one more forward")
    vocabulary_multiple: int = Field(8, ge=1, description="with config: round the tokenizer's vocabulary up to this")


class LoraConfig(Section):
    """LoRA; leave the section out to train all parameters."""

    rank: int = Field(128, ge=1, description="rank of the adapters")
    alpha: float = Field(512, gt=0, description="scale: updates are multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout in front of the adapters while training")
    targets: Literal["auto"] | list[str] = Field("auto", description="adapted modules; auto: the family's")


class DataConfig(Section):
    """What is trained on and what is held out."""

    train: str | list[str] = Field(description="file, folder, hub:NAME:CONFIG:SPLIT or list: .json, .jsonl, .gz, .zst")
    heldout: str | list[str] | None = Field(None, description="held-out file, folder or hub:NAME:CONFIG:SPLIT")
    holdout_per_source: int = Field(0, ge=0, description="without a held-out file: examples of each source to hold out")
    max_length: int = Field(512, ge=2, description="tokens of an example at most; longer ones are truncated")
    source_key: str | None = Field("source", description="key that names a record's source; null: one source")
    limit: int | None = Field(None, ge=1, description="use at most this many examples, drawn at random")
    cache_dir: str | None = Field("~/.cache/colm_ds/tokens", description="where tokens are kept; null: nowhere")


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="beta1 and beta2, also of the selection's geometry")
    eps: float = Field(1e-8, gt=0, description="eps, also of the selection's geometry")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")


class LrScheduleConfig(Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising rate")
    final_fraction: float = Field(0.0, ge=0, le=1, description="rate at the end, relative to the peak")


class HeldoutConfig(Section):
    """When held-out examples are looked at."""

    every: int = Field(0, ge=0, description="held-out loss every n steps; 0: at the start and the end only")
    max_tokens: int = Field(16384, ge=1, description="padded tokens of one evaluation batch at most")


class EvaluationConfig(HeldoutConfig):
    """What is measured on held-out examples."""

    exact_match: bool = Field(False, description="greedy answers compared with the gold ones, at the end")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")


class BaseRecipe(Section):
    """What defines a run, whatever it trains on; each kind of recipe adds its data."""

    data_paths: ClassVar[tuple[str, ...]] = ()
    """Keys of the `data` section that name files or folders."""

    name: str = Field("run", description="name in reports")
    output_dir: str = Field(description="folder that the run is written to; relative to the working folder")
    overwrite: bool = Field(False, description="start anew, replacing a run that is already there, finished or not")
    steps: int = Field(ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="seeds weights, data order and every choice")
    micro_batch_size: int = Field(4, ge=1, description="examples per device and backward pass: the lever on memory")
    model: ModelConfig
    tokenizer: str | None = Field(None, description="tokenizer folder or hub name; default: the model's")
    lora: LoraConfig | None = Field(None, description="LoRA; leave out to train all parameters")
    colm: CoLMSection
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    deepspeed: str | dict[str, Any] = Field(description="DeepSpeed configuration: JSON file or mapping")
    evaluation: HeldoutConfig = HeldoutConfig()
    save_every: int = Field(0, ge=0, description="checkpoint every n steps and after the last; 0: only when stopped")
    keep_last: int = Field(2, ge=1, description="how many checkpoints stay; 2 leave one if the newest turns out broken")
    resume: str = Field(
        "auto",
        description="auto: go on from the newest whole checkpoint in output_dir; never; or the path of a checkpoint",
    )
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = Field(
        [], description="also write numbers there while training, into output_dir/monitor; a resumed run goes on in it"
    )
    verbose: bool = Field(False, description="show DeepSpeed's own log messages")

    @property
    def tokenizer_place(self) -> str | None:
        """Folder or hub name of the tokenizer."""
        return self.tokenizer or self.model.name_or_path

    @property
    def colm_values(self) -> dict[str, Any]:
        """The `"colm"` section; without sources to choose by the first steps are plain."""
        values = self.colm.model_dump()
        clusters: ClusterConfig | None = getattr(self, "clusters", None)
        if clusters is not None:
            values["schedule"]["start_step"] = max(self.colm.schedule.start_step, clusters.first_selection())
        return values

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        model = self.model
        if (model.name_or_path is None) == (model.config is None):
            problems.add("model", model.name_or_path, "give either name_or_path or config", "One says what to load.")
        if model.config is not None and "model_type" not in model.config:
            problems.add("model.config", model.config, "has no model_type", "For example model_type: llama.")
        if model.config is not None and self.tokenizer_place is None:
            problems.add("tokenizer", None, "a model built from its config brings none", "Name a tokenizer folder.")


class Recipe(BaseRecipe):
    """A run on instruction data."""

    data_paths: ClassVar[tuple[str, ...]] = ("train", "heldout")

    task: Literal["instructions"] = Field("instructions", description="what is trained on")
    data: DataConfig
    clusters: ClusterConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        super().check(problems)
        data, evaluation = self.data, self.evaluation
        if self.clusters is not None:
            self.clusters.check(self.steps, self.colm, problems)
        if data.heldout is not None and data.holdout_per_source:
            key = "data.holdout_per_source"
            problems.add(key, data.holdout_per_source, "there is a held-out file", "Remove one of both.")
        heldout = data.heldout is not None or data.holdout_per_source > 0
        if not heldout and (evaluation.every or evaluation.exact_match):
            key = "every" if evaluation.every else "exact_match"
            value = getattr(evaluation, key)
            problems.add(f"evaluation.{key}", value, "nothing is held out", "Set data.holdout_per_source.")


class ChoiceRecipe(BaseRecipe):
    """A run on a classification task; the loss is a cross-entropy over the candidates of every example."""

    data_paths: ClassVar[tuple[str, ...]] = ("folder", "train", "heldout")

    task: Literal["choices"] = Field(description="what is trained on")
    data: ChoiceDataConfig
    clusters: ClusterConfig | None = None

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        super().check(problems)
        self.data.check(problems)
        if self.clusters is not None:
            self.clusters.check(self.steps, self.colm, problems)
        if self.evaluation.every and self.data.train is not None and self.data.heldout is None:
            problems.add("evaluation.every", self.evaluation.every, "nothing is held out", "Set data.heldout.")
        share = self.colm.probe.token_sample
        if share != 1.0:
            problems.add("colm.probe.token_sample", share, "candidates are compared as wholes", "Remove it.")


class ChunkDataConfig(Section):
    """Pretraining data."""

    store: str = Field(description="folder that pretrain/prepare.py writes; relative to the working folder")
    chunk_tokens: int = Field(1024, ge=2, description="tokens of a chunk: the sequence length")
    weights: dict[str, float] | None = Field(
        None, description="shares of the chunks by source, of any sum; leave out for natural proportions"
    )


class PrepareConfig(Section):
    """What pretrain/prepare.py makes of the files."""

    tokenizer: str | None = Field(
        None, description="SentencePiece .model, Hugging Face folder or hub name; default: train one on the mixture"
    )
    vocabulary_size: int = Field(32000, ge=300, description="of a tokenizer that is trained (with byte fallback)")
    sample_mb: float = Field(32.0, gt=0, description="megabytes of text that it is trained on, by the weights")
    holdout: float = Field(0.01, ge=0, lt=1, description="share of every source's documents to hold out")
    skip_other_sources: bool = Field(False, description="leave out documents of sources without a weight")
    max_bad_fraction: float = Field(1e-4, ge=0, le=1, description="share of bad lines to put up with")
    seed: int = Field(0, ge=0, description="decides which documents are held out and sampled")


class PerplexityConfig(HeldoutConfig):
    """When perplexity is measured, and on what."""

    chunks_per_source: int | None = Field(None, ge=1, description="held-out chunks of each source at most; null: all")


class PretrainingRecipe(BaseRecipe):
    """A run on chunks of text."""

    task: Literal["pretraining"] = Field(description="what is trained on")
    data: ChunkDataConfig
    prepare: PrepareConfig = PrepareConfig()
    evaluation: PerplexityConfig = PerplexityConfig()
    keep_best: bool = Field(True, description="keep the weights of the lowest held-out loss in best_model/")

    @property
    def tokenizer_place(self) -> str | None:
        """The store's tokenizer, unless another place of it is named."""
        return self.tokenizer or f"{self.data.store}/tokenizer"


RECIPES: dict[str, type[BaseRecipe]] = {
    "instructions": Recipe,
    "choices": ChoiceRecipe,
    "pretraining": PretrainingRecipe,
}
"""Kinds of recipes by their key `task`; without the key it is the first."""


def kind_of_recipe(values: Mapping[str, Any]) -> type[BaseRecipe]:
    """The kind that a recipe's key `task` names.

    Raises:
        ConfigError: if there is no such kind.
    """
    task = values.get("task", next(iter(RECIPES)))
    if task not in RECIPES:
        raise ConfigError(f"task = {task!r}: no such kind of recipe. Choose one of {', '.join(map(repr, RECIPES))}.")
    return RECIPES[task]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, needs_files: bool = True) -> BaseRecipe:
    """Read and check a recipe; its key `task` says of which kind.

    Args:
        path: the YAML file.
        overrides: `key=value` with dots for nested keys, for example `colm.coreset_size=8`; values are YAML.
        needs_files: whether data and packages named in it must be there.

    Raises:
        ConfigError: listing every problem found: a file that is missing or not YAML, unknown keys, wrong values,
            paths that do not exist.
    """
    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such recipe." + (f" In that folder: {near}." if near else "")) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_what_is_wrong(error)}. Write `key: value` lines.") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}. Write keys and values.")
    problems = Problems(str(path))
    for override in overrides:
        _override(loaded, override, problems)
    kind = kind_of_recipe(loaded)
    _resolve_paths(kind, loaded, path.parent, problems if needs_files else Problems(""))
    _resolve(loaded, "deepspeed", path.parent, problems, must_exist=True)
    recipe = validate_section(kind, loaded, "", problems)
    if isinstance(recipe, BaseRecipe):
        recipe.check(problems)
    problems.raise_if_any()
    assert isinstance(recipe, BaseRecipe)
    return recipe


def describe_keys(kind: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """One line per key of a recipe: name, default, what it does."""
    lines = []
    for name, field in kind.model_fields.items():
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in inner if isinstance(c, type) and issubclass(c, Section)), None)
        if section is not None:
            lines += describe_keys(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else repr(field.default)
            lines.append(f"  {prefix}{name} ({default}): {field.description}")
    return lines


def _what_is_wrong(error: Exception) -> str:
    """A parser's complaint on one line, with the line where it arose."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else str(error)


def _override(values: dict[str, Any], override: str, problems: Problems) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.add("override", override, "not of the form key=value", "For example steps=20 or colm.coreset_size=8.")
        return
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            problems.add("override", override, f"{parent} is not a section", "Override it whole.")
            return
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.add("override", override, "the value is not YAML", "Quote it.")
        return
    if isinstance(values[last], str):
        values[last] = _number(values[last])


def _number(text: str) -> str | float:
    """YAML 1.1 reads 2e-5 as a text; a recipe means the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _resolve_paths(kind: type[BaseRecipe], values: dict[str, Any], folder: Path, problems: Problems) -> None:
    """Make the paths of a recipe findable from anywhere: as written, else relative to the recipe."""
    _resolve(values, "tokenizer", folder, problems, must_exist=False)
    for section, keys in (("model", ("name_or_path",)), ("data", kind.data_paths)):
        inner = values.get(section)
        if isinstance(inner, dict):
            for key in keys:
                _resolve(inner, key, folder, problems, must_exist=section == "data", prefix=f"{section}.")


def _resolve(
    values: dict[str, Any], key: str, folder: Path, problems: Problems, *, must_exist: bool, prefix: str = ""
) -> None:
    value = values.get(key)
    if isinstance(value, list):
        values[key] = [_find(item, prefix + key, folder, problems, must_exist) for item in value]
    elif isinstance(value, str):
        values[key] = _find(value, prefix + key, folder, problems, must_exist)


def _find(value: Any, key: str, folder: Path, problems: Problems, must_exist: bool) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith(HUB):
        return value
    if value.startswith(PACKAGE_PREFIX):
        spec = importlib.util.find_spec(value.removeprefix(PACKAGE_PREFIX))
        if spec is None or spec.origin is None:
            name = value.removeprefix(PACKAGE_PREFIX).replace("_", "-")
            problems.add(key, value, "that Python package is not installed", f"Run pip install --no-deps {name}.")
            return value
        return str(Path(spec.origin).parent)
    given = Path(value).expanduser()
    for candidate in (given, folder / given):
        if candidate.exists():
            return str(candidate)
    if must_exist:
        problems.add(key, value, "no such file or folder", f"It is looked for here and in {folder}.")
    return value
