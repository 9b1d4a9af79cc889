"""Recipes: one YAML file per run, strict keys, `key=value` overrides, paths relative to the recipe or to here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from colm_ds.config.colm import HELD_OUT, CoLMSection
from colm_ds.config.section import Section, validate_section
from colm_ds.data.entries import as_entries
from colm_ds.data.formats import HUB
from colm_ds.errors import ConfigError, Problems
from colm_ds.recipes.adapter import with_adapter
from colm_ds.recipes.choices import ChoiceDataConfig, ClusterConfig
from colm_ds.recipes.packages import PACKAGE_PREFIX, package_folder, which_package
from colm_ds.recipes.sections import (
    ChunkDataConfig,
    DataConfig,
    EvaluationConfig,
    HeldoutConfig,
    LoraConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    PerplexityConfig,
    PrepareConfig,
)
from colm_ds.untrusted.yaml_text import parse_yaml, read_yaml

if TYPE_CHECKING:
    from colm_ds.config.resolve import ResolvedConfig


class BaseRecipe(Section):
    """Definition of a run, independent of its data; each kind of recipe adds its data."""

    reads_target: ClassVar[bool] = False
    """Whether a target's data can be read as the training data is."""

    name: str = Field("run", description="name in reports")
    made_by: str | None = Field(
        None, description="command that makes the files named here; said where they are missing"
    )
    output_dir: str = Field(description="folder that the run is written to; relative to the working folder")
    overwrite: bool = Field(False, description="start a new run, replacing one in output_dir, finished or not")
    steps: int = Field(0, ge=0, description="optimizer steps; or 'N epochs': see epochs")
    epochs: float | None = Field(
        None, gt=0, description="instead of steps: how often the large batches go through the data (rows inspected)"
    )
    seed: int = Field(
        0, ge=0, description="seeds weights and held-out rows, and data order and every choice unless colm.seed does"
    )
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
    keep_last: int = Field(2, ge=1, description="checkpoints to keep; 2 leave one if the newest turns out broken")
    resume: str = Field(
        "auto",
        description="auto: resume from the newest whole checkpoint in output_dir; never; or the path of a checkpoint",
    )
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = Field(
        [], description="also write numbers there while training, into output_dir/monitor; a resumed run continues it"
    )
    verbose: bool = Field(False, description="show DeepSpeed's own log messages")
    _file: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """Name in messages: its file, and DeepSpeed's where that is another."""
        own = self._file or self.name
        return f"{own} and {self.deepspeed}" if isinstance(self.deepspeed, str) else own

    @property
    def deepspeed_prefix(self) -> str:
        """Prefix of DeepSpeed's keys in messages, if they are written in the recipe itself."""
        return "" if isinstance(self.deepspeed, str) else "deepspeed."

    @property
    def tokenizer_place(self) -> str | None:
        """Folder or hub name of the tokenizer; None: the model's own."""
        return self.tokenizer

    @property
    def colm_of_run(self) -> CoLMSection:
        """The `"colm"` section that training follows: the steps before the first clusters are plain."""
        clusters: ClusterConfig | None = getattr(self, "clusters", None)
        if clusters is None:
            return self.colm
        schedule = self.colm.schedule
        later = schedule.model_copy(update={"start_step": max(schedule.start_step, clusters.first_selection())})
        return self.colm.model_copy(update={"schedule": later})

    @model_validator(mode="before")
    @classmethod
    def _read_epochs(cls, values: Any) -> Any:
        """Take `steps: 3 epochs` for `epochs: 3`."""
        if not isinstance(values, dict):
            return values
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*epochs?\s*", str(values.get("steps")))
        if match is None:
            return values
        return {**{key: value for key, value in values.items() if key != "steps"}, "epochs": match[1]}

    @model_validator(mode="before")
    @classmethod
    def _seed_choices(cls, values: Any) -> Any:
        """Take `seed` for `colm.seed`, unless that is written."""
        colm = values.get("colm") if isinstance(values, dict) else None
        if not isinstance(colm, dict) or "seed" in colm or not isinstance(values.get("seed"), int):
            return values
        return {**values, "colm": {**colm, "seed": values["seed"]}}

    def with_steps(self, steps_per_epoch: int) -> Self:
        """Return the recipe with its number of steps, which `epochs` leaves open until the data is read.

        Args:
            steps_per_epoch: large batches in one pass over the data.

        Raises:
            ConfigError: if something else does not fit that number.
        """
        if self.epochs is None:
            return self
        recipe = self.model_copy(update={"steps": max(1, round(self.epochs * steps_per_epoch))})
        problems = Problems(self._file or self.name)
        recipe.check(problems)
        problems.raise_if_any()
        return recipe

    def resolve(self, world_size: int) -> ResolvedConfig:
        """Check the `"colm"` section with the DeepSpeed configuration, as a number of ranks would train by them.

        Raises:
            ConfigError: listing every problem found.
        """
        from colm_ds.config.resolve import resolve_config

        return resolve_config(self._whole_config(), world_size, where=self.where, prefix=self.deepspeed_prefix)

    def resolve_section(self) -> CoLMSection:
        """Return the `"colm"` section, b filled in, and checked as `resolve` does, whatever number of ranks will train.

        Raises:
            ConfigError: listing every problem found.
        """
        from colm_ds.config.resolve import resolve_config

        given = self._whole_config()
        if self.colm.coreset_size is not None or "train_batch_size" in given:
            given.pop("gradient_accumulation_steps", None)  # fits another number of ranks
        return resolve_config(given, 1, where=self.where, prefix=self.deepspeed_prefix).colm

    def _whole_config(self) -> dict[str, Any]:
        """Return the DeepSpeed configuration with this recipe's micro-batch and `"colm"` section."""
        from colm_ds.config.resolve import load_config
        from colm_ds.recipes.model import precision_sections

        loaded, where = load_config(self.deepspeed)
        precision_sections(self.model.dtype, loaded, where)  # refused here, before anything is started
        return {**loaded, "train_micro_batch_size_per_gpu": self.micro_batch_size, "colm": self.colm}

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        model = self.model
        if self.colm.needs_target and not self.reads_target:
            what = "compares with a target, which is read for task: instructions only"
            problems.add("colm.selector", self.colm.selector, what, "Choose another selector.")
        elif self.colm.needs_target and self.colm.target.data is None:
            what = f"{self.colm.selector!r} compares with a target"
            fix = "Name a file of records like those of data.train, or held_out."
            problems.add("colm.target.data", None, what, fix)
        if self.colm.needs_target and self.colm.target.data == HELD_OUT:
            data, evaluation = getattr(self, "data", None), getattr(self, "evaluation", None)
            if getattr(data, "heldout", None) is None and not getattr(data, "holdout_per_source", 0):
                what, fix = "nothing is held out", "Set data.holdout_per_source or data.heldout, or name a file."
                problems.add("colm.target.data", HELD_OUT, what, fix)
            if getattr(evaluation, "exact_match", False):
                what = "the questions of data.heldout hold the target's"
                problems.add("evaluation.exact_match", True, what, "Name a file as colm.target.data, or write false.")
        if self.epochs is None and self.steps == 0:
            problems.add("steps", self.steps, "neither steps nor epochs", "For example 200, or 3 epochs.")
        if (model.name_or_path is None) == (model.config is None):
            problems.add("model", model.name_or_path, "give either name_or_path or config", "Exactly one is needed.")
        if model.config is not None and "model_type" not in model.config:
            problems.add("model.config", model.config, "has no model_type", "For example model_type: llama.")
        if model.config is not None and (self.tokenizer_place or model.name_or_path) is None:
            problems.add("tokenizer", None, "a model built from its config brings none", "Name a tokenizer folder.")
        model.check(problems)
        if self.lora is not None:
            self.lora.check(problems)
        self._check_quantization(problems)

    def _check_quantization(self, problems: Problems) -> None:
        model = self.model
        if model.quantization != "4bit":
            for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
                if (value := getattr(model, key)) != ModelConfig.model_fields[key].default:
                    problems.add(f"model.{key}", value, "for quantization: 4bit only", "Remove it.")
        if model.quantization is None:
            return
        key = "model.quantization"
        if self.lora is None:
            problems.add(key, model.quantization, "quantized weights are not trained", "Add a lora section.")
        if model.config is not None:
            problems.add(key, model.quantization, "a model from random weights has to be trained whole", "Remove it.")
        if model.gguf_file is not None:
            problems.add(key, model.quantization, "bitsandbytes reads no GGUF files", "Name a folder of safetensors.")


class Recipe(BaseRecipe):
    """A run on instructions, conversations, prompts with completions, or texts."""

    reads_target: ClassVar[bool] = True

    task: Literal["instructions"] = Field("instructions", description="what is trained on")
    data: DataConfig
    clusters: ClusterConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        super().check(problems)
        data, evaluation = self.data, self.evaluation
        if self.clusters is not None and self.steps:
            self.clusters.check(self.steps, self.colm, problems)
        data.check(problems)
        if self.clusters is not None and any(entry.weight is not None for entry in as_entries(data.train)):
            problems.add(
                "data.train", "weight", "clusters take the place of the sources", "Remove weights or clusters."
            )
        heldout = data.heldout is not None or data.holdout_per_source > 0
        if not heldout and (evaluation.every or evaluation.exact_match):
            key = "every" if evaluation.every else "exact_match"
            value = getattr(evaluation, key)
            problems.add(f"evaluation.{key}", value, "nothing is held out", "Set data.holdout_per_source.")
        elif evaluation.exact_match and data.heldout is None:
            problems.add(
                "evaluation.exact_match", True, "asks the rows of data.heldout", "Name a file of held-out rows there."
            )


class ChoiceRecipe(BaseRecipe):
    """A run on a classification task; the loss is a cross-entropy over the candidates of every example."""

    task: Literal["choices"] = Field(description="what is trained on")
    data: ChoiceDataConfig
    clusters: ClusterConfig | None = None

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        super().check(problems)
        self.data.check(problems)
        if self.clusters is not None and self.steps:
            self.clusters.check(self.steps, self.colm, problems)
        if self.evaluation.every and self.data.train is not None and self.data.heldout is None:
            problems.add("evaluation.every", self.evaluation.every, "nothing is held out", "Set data.heldout.")
        share = self.colm.probe.token_sample
        if share != 1.0:
            problems.add("colm.probe.token_sample", share, "candidates are compared as wholes", "Remove it.")


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
    """Return the kind of recipe that the key `task` names.

    Raises:
        ConfigError: if there is no such kind.
    """
    task = values.get("task", next(iter(RECIPES)))
    if task not in RECIPES:
        raise ConfigError(f"task = {task!r}: no such kind of recipe. Choose one of {', '.join(map(repr, RECIPES))}.")
    return RECIPES[task]


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, needs_files: bool = True, auto_dtype: str | None = None
) -> BaseRecipe:
    """Read and check a recipe; the key `task` gives its kind, `extends` names a recipe to inherit from.

    Args:
        path: the YAML file.
        overrides: `key=value` with dots for nested keys, for example `colm.coreset_size=8`; values are YAML. Of steps
            and epochs the later one counts.
        needs_files: whether data and packages named in it must exist.
        auto_dtype: what `model.dtype: auto` stands for; default: this machine's.

    Raises:
        ConfigError: listing every problem found: a file that is missing or not YAML, unknown keys, wrong values,
            paths that do not exist.
    """
    path = Path(path)
    loaded = read_values(path)
    problems = Problems(str(path))
    if loaded.get("steps") and loaded.get("epochs"):
        problems.add("epochs", loaded["epochs"], "written beside steps", "Write one of the two.")
    for override in overrides:
        _override(loaded, override, problems)
    model = loaded.get("model")
    if auto_dtype is not None and isinstance(model, dict) and model.get("dtype") == "auto":
        loaded["model"] = {**model, "dtype": auto_dtype}
    kind = kind_of_recipe(loaded)
    _expand_paths(loaded, problems)
    _resolve_paths(loaded, path.parent, problems, needs_files)
    if problems.messages and loaded.get("made_by"):
        problems.notes.append(f"The files of this recipe are made by: {loaded['made_by']}")
    _take_adapter(loaded, problems)
    recipe = validate_section(kind, loaded, "", problems)
    if isinstance(recipe, BaseRecipe):
        recipe.check(problems)
    problems.raise_if_any()
    assert isinstance(recipe, BaseRecipe)
    recipe._file = str(path)
    return recipe


def read_values(path: Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys and values of a recipe file, those of the recipe that it extends included.

    `extends: OTHER.yaml` inherits all of the other recipe; a key or section written here replaces the other's entirely.
    Paths of the other recipe are relative to that one.

    Raises:
        ConfigError: if a file is missing, is not YAML or no mapping, or recipes extend each other in a cycle.
    """
    try:
        loaded = read_yaml(path)
    except FileNotFoundError:
        raise no_such_file(path, "recipe") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder. Name the recipe's YAML file.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}. Write `key: value` lines.") from None
    if not isinstance(loaded, dict):
        held = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(f"{path}: holds {held}. Write keys and values.")
    other = loaded.pop("extends", None)
    if other is None:
        return loaded
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends = {other!r}: not a path. Name one recipe file, relative to this one.")
    place = path.parent / Path(other).expanduser()
    if place.resolve() in (*_above, path.resolve()):
        raise ConfigError(f"{path}: extends = {other!r}: that recipe extends this one. Remove one of the two.")
    inherited = read_values(place, (*_above, path.resolve()))
    _resolve_paths(inherited, place.parent, Problems(""))  # missing files are reported with the whole recipe
    return {**_without_length(inherited, loaded), **loaded}


_LENGTHS = ("steps", "epochs")
"""Keys that say how long a run is, of which what is written later replaces both."""


def _without_length(values: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out how long a run is, if that is said again."""
    again = any(later.get(key) for key in _LENGTHS)
    return {key: value for key, value in values.items() if not again or key not in _LENGTHS}


def no_such_file(path: Path, kind: str) -> ConfigError:
    """Return the error for a YAML file that is missing; it names those that are there."""
    near = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
    return ConfigError(f"{path}: no such {kind}." + (f" In that folder: {near}." if near else ""))


def _keys_of(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a recipe with its field; sections stand for their keys."""
    for name, field in kind.model_fields.items():
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in inner if isinstance(c, type) and issubclass(c, Section)), None)
        if section is not None:
            yield from _keys_of(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def key_names(kind: type[Section]) -> list[str]:
    """Return every key of a recipe, those of sections with dots."""
    return [name for name, _ in _keys_of(kind)]


def describe_keys(kind: type[Section] = Recipe) -> list[str]:
    """Return one line per key of a recipe: name, default, description."""
    lines = []
    for name, field in _keys_of(kind):
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        lines.append(f"  {name} ({default}): {field.description}")
    return lines


def change_of(key: str, text: str | Path) -> str:
    """Return the change `key=value` that gives a key a text, quoted where YAML would read it as something else."""
    text = str(text)
    try:
        is_plain = parse_yaml(text) == text
    except ValueError:
        is_plain = False
    return f"{key}={text if is_plain else json.dumps(text, ensure_ascii=False)}"


def expanded(path: str | Path) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced, as in a recipe."""
    return os.path.expanduser(os.path.expandvars(path))


def _override(values: dict[str, Any], override: str, problems: Problems) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.add("override", override, "not of the form key=value", "For example steps=20 or colm.coreset_size=8.")
        return
    whole = values
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
        values[last] = parse_yaml(text)
    except ValueError as error:
        problems.add("override", override, f"the value is not YAML: {error}", "Quote it.")
        return
    if isinstance(values[last], str):
        values[last] = _number(values[last])
    if key in _LENGTHS and values[last]:
        for other in _LENGTHS:
            if other != key:
                whole.pop(other, None)


def _number(text: str) -> str | float:
    """Convert a text such as 2e-5, which YAML 1.1 does not read as a number, to the number."""
    try:
        return float(text)
    except ValueError:
        return text


class _Looked(Enum):
    """Tell where a path of a recipe is looked for: as written, and next to the recipe."""

    NOWHERE = "made by the run, in the working folder"
    IF_THERE = "or it is a name of a hub"
    MUST_EXIST = "else it is a problem, unless the recipe is only planned with"
    ALWAYS = "else it is a problem"


_PATHS = {
    "deepspeed": _Looked.ALWAYS,
    "output_dir": _Looked.NOWHERE,
    "resume": _Looked.NOWHERE,
    "tokenizer": _Looked.IF_THERE,
    "prepare.tokenizer": _Looked.IF_THERE,
    "model.name_or_path": _Looked.IF_THERE,
    "lora.adapter": _Looked.IF_THERE,
    "data.train": _Looked.MUST_EXIST,
    "data.heldout": _Looked.MUST_EXIST,
    "data.folder": _Looked.MUST_EXIST,
    "data.chat_template": _Looked.MUST_EXIST,
    "data.subset": _Looked.MUST_EXIST,
    "data.store": _Looked.NOWHERE,
    "data.cache_dir": _Looked.NOWHERE,
    "colm.target.data": _Looked.MUST_EXIST,
    "colm.options.table": _Looked.MUST_EXIST,
}
"""Keys that hold paths, of every kind of recipe."""


def _path_keys(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, _Looked]]:
    """Yield the section, the key in it, the whole key and the way to look for every path that a recipe has."""
    for whole, looked in _PATHS.items():
        *sections, key = whole.split(".")
        inner: Any = values
        for name in sections:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and key in inner:
            yield inner, key, whole, looked


def _expand_paths(values: dict[str, Any], problems: Problems) -> None:
    """Replace `~`, `$NAME` and `${NAME}` in paths."""

    def expand(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [expand(each, key) for each in value]
        if isinstance(value, dict):
            return {**value, "path": expand(value["path"], f"{key}.path")} if "path" in value else value
        if not isinstance(value, str):
            return value
        path = expanded(value)
        if unknown := re.search(r"\$(\w+|\{\w+\})", path):
            problems.add(key, value, f"there is no environment variable {unknown.group(1)}", "Export it.")
        return path

    for section, key, whole, _ in _path_keys(values):
        section[key] = expand(section[key], whole)


def _resolve_paths(values: dict[str, Any], folder: Path, problems: Problems, needs_files: bool = True) -> None:
    """Make the paths of a recipe findable from anywhere: as written, else relative to the recipe."""
    for section, key, whole, looked in _path_keys(values):
        if looked == _Looked.NOWHERE or (whole == "colm.target.data" and section[key] == HELD_OUT):
            continue
        value, must_exist = section[key], looked == _Looked.ALWAYS or (needs_files and looked == _Looked.MUST_EXIST)
        if isinstance(value, list):
            section[key] = [_find(item, whole, folder, problems, must_exist, needs_files) for item in value]
        else:
            section[key] = _find(value, whole, folder, problems, must_exist, needs_files)


def _take_adapter(values: dict[str, Any], problems: Problems) -> None:
    """Fill the `lora` section with the settings of the adapter that it starts from."""
    lora = values.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("adapter"), str):
        values["lora"] = with_adapter(lora, problems)


def _find(value: Any, key: str, folder: Path, problems: Problems, must_exist: bool, needs_packages: bool) -> Any:
    if isinstance(value, dict) and "path" in value:  # an entry of the data
        path = _find(value["path"], f"{key}.path", folder, problems, must_exist, needs_packages)
        return {**value, "path": path}
    if not isinstance(value, str):
        return value
    if value.startswith(HUB):
        return value
    if value.startswith(PACKAGE_PREFIX):
        folder_of_package = package_folder(value)
        if folder_of_package is None and needs_packages:
            problems.add(key, value, "that Python package is not installed", which_package(value))
        return folder_of_package or value
    given = Path(value).expanduser()
    for candidate in (given, folder / given):
        if candidate.exists():
            return str(candidate)
    if must_exist:
        problems.add(key, value, "no such file or folder", f"Looked for in the working folder and in {folder}.")
    return value
