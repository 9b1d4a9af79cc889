"""Find and load the model to evaluate: a base model, a run's result, an adapter or a merged model."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from colm_ds.errors import CheckpointError, ConfigError
from colm_ds.randomness import random_state, restore_random_state, seed_global_generators
from colm_ds.recipes.model import load_model, load_tokenizer
from colm_ds.recipes.packages import PACKAGE_PREFIX, package_folder, which_package
from colm_ds.recipes.sections import ModelConfig
from colm_ds.run_folder.contents import ADAPTER, CONFIG, MODEL
from colm_ds.run_folder.files import read_object

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class ModelSource:
    """Files of a model.

    Attributes:
        base: the model, without adapter.
        adapter: folder of a LoRA adapter for it.
        tokenizer: folder or hub name.
        seed: seed of the base's random weights, if its recipe builds it from a configuration.
        run: folder of the run that it is from.
    """

    base: ModelConfig
    adapter: Path | None
    tokenizer: str | None
    seed: int | None = None
    run: Path | None = None


@dataclass(frozen=True)
class _RunModel:
    """The base model of a run, as defined by its recipe.

    Attributes:
        model: the recipe's section.
        tokenizer: folder or hub name; None: the model's.
        seed: seed of random weights.
    """

    model: ModelConfig
    tokenizer: str | None
    seed: int | None


def find_model(
    name: str,
    *,
    gguf_file: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
) -> ModelSource:
    """Find the model that a name on the command line stands for, without loading it.

    Args:
        name: a run's folder (its `model/` or `adapter/` is taken), an adapter's, a model's, package:NAME or a hub name.
        gguf_file: GGUF file in the (base) model's folder.
        base: base model of an adapter, if it is not where the adapter or its run says.
        tokenizer: tokenizer, if not the model's.
        dtype: precision of weights and computation.

    Raises:
        ConfigError: if there is no such model.
    """
    folder = Path(name).expanduser()
    trained = _model_of_run(folder)
    adapter, run = None, folder if trained is not None else None
    if trained is not None:
        if (folder / ADAPTER).is_dir():
            adapter = folder / ADAPTER
        elif (folder / MODEL).is_dir():
            return ModelSource(_plain(str(folder / MODEL), None, dtype), None, tokenizer, run=folder)
        else:
            raise ConfigError(
                f"{name}: the run has not finished: it has no adapter/ or model/. "
                f"Write a checkpoint's weights with: colm-ds export {name}"
            )
    elif (folder / "adapter_config.json").is_file():
        adapter = folder
        run = next((above for above in list(folder.resolve().parents)[:2] if _model_of_run(above) is not None), None)
        trained = _model_of_run(run) if run is not None else None
    elif base is not None:
        raise ConfigError(f"--base {base}: {name} is no adapter. Leave --base out.")
    if adapter is None:
        return ModelSource(_plain(name, gguf_file, dtype), None, tokenizer)
    tokenizer = tokenizer or (str(adapter) if _has_tokenizer(adapter) else None)
    if base is None and trained is not None:
        model = trained.model.model_copy(update={"dtype": dtype, "activation_checkpointing": False})
        if gguf_file is not None:
            model = model.model_copy(update={"gguf_file": gguf_file})
        return ModelSource(model, adapter, tokenizer or trained.tokenizer, trained.seed, run)
    base = base or read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter}: adapter_config.json names no base model. Give it with --base.")
    return ModelSource(_plain(base, gguf_file, dtype), adapter, tokenizer, run=run)


@dataclass
class LoadedTokenizer:
    """The tokenizer of a model, loaded when it is first asked for.

    Attributes:
        source: files of the model.
    """

    source: ModelSource

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; a ConfigError if it cannot be loaded."""
        return load_its_tokenizer(self.source)


def load(source: ModelSource, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load the model in eval mode, on the CPU, and the tokenizer.

    Args:
        source: from `find_model`.
        tokenizer: the tokenizer, where it is loaded already.

    Raises:
        ConfigError: if the model or tokenizer cannot be loaded.
        CheckpointError: if the adapter does not fit the model.
    """
    tokenizer = tokenizer or load_its_tokenizer(source)
    state = random_state()
    try:
        seed_global_generators(source.seed or 0)
        model: Any = load_model(source.base, None, tokenizer)
    finally:
        restore_random_state(state)
    if source.adapter is not None:
        model = _with_adapter(model, source.adapter)
    return model.eval(), tokenizer


def load_its_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer alone.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    return load_tokenizer(source.base, source.tokenizer)


def _with_adapter(model: Any, adapter: Path) -> Any:
    import peft

    advice = "Is it an adapter of this base model? Give the right one with --base."
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, str(adapter))
        held = {name for name in peft.load_peft_weights(str(adapter), device="cpu") if ".lora_" in name}
    except Exception as error:  # whatever a library makes of a broken file
        reason = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(f"{adapter}: cannot be applied to {model.config.model_type}: {reason} {advice}") from None
    known = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)  # True and auto may ask the hub
    left_over = sorted(held - known.keys())  # PEFT ignores these silently
    if left_over:
        name = f"{left_over[0]} and {len(left_over) - 1} more"
        raise CheckpointError(f"{adapter}: {model.config.model_type} has no place for {name}. {advice}")
    return adapted


def describe(source: ModelSource, model: Any = None) -> dict[str, Any]:
    """Return facts that identify a model, so that its answers are not mixed with another's.

    Weight files are identified by size and samples of their content: 64 blocks of 64 KiB of each.

    Args:
        source: from `find_model`.
        model: the loaded model, for the revision of a hub name.
    """
    base = source.base
    values: dict[str, Any] = {"base": base.name_or_path, "gguf_file": base.gguf_file, "dtype": base.dtype}
    if base.quantization is not None:
        values["quantization"] = base.quantization
    if base.config is not None:
        values |= {"config": base.config, "seed": source.seed}
    elif Path(str(base.name_or_path)).is_dir():
        values["base_weights"] = weights_fingerprint(Path(str(base.name_or_path)), base.gguf_file)
    else:
        values["revision"] = getattr(getattr(model, "config", None), "_commit_hash", None)
    values["adapter"] = None if source.adapter is None else str(source.adapter)
    if source.adapter is not None:
        values["adapter_weights"] = weights_fingerprint(source.adapter)
    return values


def weights_fingerprint(folder: Path, gguf_file: str | None = None) -> str:
    """Return a short hash of the weights in a folder: names, sizes and samples of the content of its files.

    Args:
        folder: folder of the files.
        gguf_file: the only file to read, in a GGUF folder.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        wanted = file.name == gguf_file if gguf_file else file.suffix in WEIGHT_SUFFIXES or file.name == "config.json"
        if not wanted or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            step = max(_SAMPLE_BYTES, (size - _SAMPLE_BYTES) // _SAMPLES)
            for start in range(0, size, step):
                content.seek(start)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _plain(name: str, gguf_file: str | None, dtype: str) -> ModelConfig:
    path: str | None = name
    if name.startswith(PACKAGE_PREFIX) and (path := package_folder(name)) is None:
        raise ConfigError(f"{name}: that Python package is not installed. {which_package(name)}")
    assert path is not None
    folder = Path(path).expanduser()
    if folder.is_dir():
        if gguf_file is None and not (folder / "config.json").is_file():
            held = sorted(file.name for file in folder.glob("*.gguf"))
            advice = f"Give --gguf-file {held[0]}" if held else "Give the folder of a run, an adapter or a model"
            raise ConfigError(f"{name}: has no config.json. {advice}.")
        path = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{name}: no such folder.")
    return ModelConfig.model_validate({"name_or_path": path, "gguf_file": gguf_file, "dtype": dtype})


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe that a run recorded; empty if there is none."""
    values = read_object(folder / CONFIG).get("recipe")
    return values if isinstance(values, dict) else {}


def _model_of_run(folder: Path) -> _RunModel | None:
    """Read the sections of a run's recipe that define its base model; None if there is no run."""
    values = read_recipe(folder)
    if not values:
        return None
    try:
        model = ModelConfig.model_validate(values.get("model"))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'}: its recipe's model cannot be read: {reason}.") from None
    return _RunModel(model, values.get("tokenizer"), values.get("seed"))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
