"""`colm-ds export`: a run's trained weights as a PEFT adapter or a Hugging Face model, without launcher and GPU."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.weights import checkpoint_tensors, save_model, with_tied
from colm_ds.config.section import validate_section
from colm_ds.data.token_cache import describe_tokenizer
from colm_ds.errors import CheckpointError, CoLMError, ConfigError, Problems
from colm_ds.export.model_card import MERGED, write_model_card
from colm_ds.models.families import GENERIC_TOKENIZERS
from colm_ds.models.quantized import dequantize
from colm_ds.randomness import random_state, restore_random_state, seed_global_generators
from colm_ds.recipes.adapter import trained_names
from colm_ds.recipes.data_check import chat_template_of
from colm_ds.recipes.model import DTYPES, add_lora, load_model, load_tokenizer
from colm_ds.recipes.recipe import BaseRecipe, Recipe, kind_of_recipe
from colm_ds.recipes.sections import LoraConfig, ModelConfig
from colm_ds.run_folder.contents import ADAPTER, CHECKPOINTS, CONFIG, FINISHED, MODEL, NOT_EVALUATED, SUMMARY
from colm_ds.run_folder.files import read_object

logger = logging.getLogger(__name__)

_OTHER_BASE = "Give the base model that the run was trained from with --model"
_OTHER_RECIPE = "Name a run that was trained by this recipe, with its model and LoRA"

_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """Exported weights.

    Attributes:
        folder: their folder.
        kind: "adapter", "model" or "merged".
        source: folder of the original weights.
        step: optimizer steps behind the weights; None if the run does not say.
        dtype: dtype of the weights.
        num_tensors: number of trained tensors.
        passed_over: newer checkpoints that cannot be used, each with its reason.
    """

    folder: Path
    kind: str
    source: Path
    step: int | None
    dtype: str
    num_tensors: int
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Source of the weights: a checkpoint, or the weights that training wrote at its end."""

    path: Path
    step: int | None
    checkpoint: atomic.Checkpoint | None


def export_run(
    run: str | Path,
    *,
    tag: str | None = None,
    merge: bool = False,
    out: str | Path | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write a run's weights for use without colm_ds; they are checked before and after, and written atomically.

    Args:
        run: folder of the run.
        tag: name of a checkpoint; default: the weights from the end of training, else the newest whole checkpoint.
        merge: for LoRA, write the whole model with the adapter added to its weights.
        out: folder to write; default: `export/` in the run's folder, named after its kind and checkpoint.
        model: folder or hub name of the base model, if it is not where the recipe says.
        tokenizer: the same for the tokenizer.
        dtype: "float32", "bfloat16" or "float16"; default: the recipe's.

    Raises:
        ConfigError: if this is not a run, or the base model, the tokenizer or the folder to write cannot be used.
        CheckpointError: if there are no whole weights, they do not fit the base model, or cannot be written.
    """
    run = Path(run)
    recipe = _read_recipe(run)
    if merge and recipe.lora is None:
        raise ConfigError(f"{run}: --merge is for LoRA runs; this one trained all parameters. Leave --merge out.")
    kind = MODEL if recipe.lora is None else MERGED if merge else ADAPTER
    source = _find_source(run, tag, ADAPTER if recipe.lora else MODEL)
    name = f"{kind}_{source.path.name}" if source.checkpoint else kind
    target = Path(out) if out is not None else run / "export" / name
    if target.resolve() == Path.cwd():
        raise ConfigError(f"--out {out}: the folder that this runs in, which cannot be replaced. Name another.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists already. Choose another folder with --out, or remove this one.")
    base = _base_as_it_is_now(recipe.model, model, dtype)
    own = None if tokenizer else _tokenizer_of_run(run)
    loaded_tokenizer = _load_tokenizer(base, tokenizer or own or recipe.tokenizer_place)
    if own is None:
        _take_chat_template(loaded_tokenizer, recipe)
    if kind == MODEL and source.checkpoint is None:
        trained, num_tensors = _final_model(source.path, base.dtype)
    else:
        if kind == MERGED:
            assert recipe.lora is not None
            trained = _base_with_lora(base, recipe.lora, recipe.seed, loaded_tokenizer)
        else:
            trained = _skeleton(base, recipe.lora, loaded_tokenizer)
        num_tensors = _fill(trained, source, torch.float32 if kind == MERGED else DTYPES[base.dtype], kind)
    if kind == MERGED:
        trained = merge_adapter(trained, DTYPES[base.dtype])
    elif kind == ADAPTER:
        trained.peft_config["default"].base_model_name_or_path = base.name_or_path
    target = Path(os.path.abspath(target))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if kind == ADAPTER:
            trained.save_pretrained(partial, save_embedding_layers=False)
        else:
            save_model(trained, partial)
        loaded_tokenizer.save_pretrained(partial)
        _check_written(partial, trained, kind)
        tokenizer_class = _class_that_reads(partial, loaded_tokenizer)
        write_model_card(
            partial, run, kind=kind, step=source.step, base=base, dtype=base.dtype, tokenizer_class=tokenizer_class
        )
        os.replace(partial, target)
    except CoLMError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):  # as tokenizers says it
            raise
        raise CheckpointError(f"{target}: could not be written: {error}. No files are left there.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    passed_over = source.checkpoint.passed_over if source.checkpoint else ()
    return Exported(target, kind, source.path, source.step, base.dtype, num_tensors, passed_over)


def load_at(recipe: BaseRecipe, tokenizer: Any, at: str | Path | None) -> tuple[Any, str]:
    """Return a recipe's model as training builds it, or with the trained weights of a run, and their origin in words.

    Args:
        recipe: names the model, its LoRA and the seed of its fresh weights.
        tokenizer: from `load_tokenizer`.
        at: folder of a run of this recipe's model, or of one of its checkpoints; None: as training begins.

    Raises:
        ConfigError, CheckpointError: if it cannot be loaded.
    """
    model = load_at_start(recipe, tokenizer, fresh=at is not None)
    return model, put_weights_at(model, recipe, at)


def load_at_start(recipe: BaseRecipe, tokenizer: Any, *, fresh: bool = False) -> nn.Module:
    """Return a recipe's model as training builds it.

    Args:
        recipe: see `load_at`.
        tokenizer: see `load_at`.
        fresh: leave out the weights of an adapter trained before, as others will take their place.
    """
    seed_global_generators(recipe.seed)
    return load_model(recipe.model, recipe.lora, tokenizer, fresh=fresh)


def put_weights_at(model: nn.Module, recipe: BaseRecipe, at: str | Path | None) -> str:
    """Put the trained weights of a run of the recipe into its model; None: leave it. Return their origin in words."""
    if at is None:
        return "as training begins"
    path, step = put_trained(model, recipe.lora, at, recipe.model.dtype)
    return f"from {path}" + ("" if step is None else f", after step {step:,}")


def put_trained(model: Any, lora: LoraConfig | None, place: str | Path, dtype: str) -> tuple[Path, int | None]:
    """Put the trained weights of a run into its model, as it was built for training.

    Args:
        model: from `load_model`, with LoRA if the run has it.
        lora: the run's section.
        place: folder of the run, or of one of its checkpoints.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16".

    Returns:
        The folder of the weights, and the optimizer steps behind them if the run says.

    Raises:
        ConfigError: if there is no such folder.
        CheckpointError: if there are no whole weights, or they do not fit the model.
    """
    place = Path(place)
    if not place.is_dir():
        names = sorted(path.name for path in place.parent.glob("*") if path.is_dir() and path.name[0] != ".")
        there = place.parent.name == CHECKPOINTS and names
        advice = f"There are: {', '.join(names)}" if there else "Give the output folder of a run, or of a checkpoint"
        raise ConfigError(f"{place}: no such folder. {advice}.")
    run, tag = (place.parent.parent, place.name) if place.parent.name == CHECKPOINTS else (place, None)
    kind = MODEL if lora is None else ADAPTER
    source = _find_source(run, tag, kind)
    if kind == MODEL and source.checkpoint is None:
        final, _ = _final_model(source.path, dtype)
        wanted = {name: value.shape for name, value in model.named_parameters()}
        held = {name: list(value.shape) for name, value in final.named_parameters()}
        _compare_shapes(source.path, wanted, held, _OTHER_RECIPE)
        model.load_state_dict(final.state_dict())
    else:
        _fill(model, source, DTYPES[dtype], kind, _OTHER_RECIPE)
        if kind == MODEL:
            model.tie_weights()
    return source.path, source.step


def _read_recipe(run: Path) -> BaseRecipe:
    """Read the recipe that a run recorded."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder. Give the output folder of a run, which holds config.json.")
    values = read_object(run / CONFIG).get("recipe")
    if not isinstance(values, dict):
        raise ConfigError(f"{run / 'config.json'}: is missing or holds no recipe. Give the output folder of a run.")
    problems = Problems(str(run / CONFIG))
    recipe = validate_section(kind_of_recipe(values), values, "recipe", problems)
    problems.raise_if_any()
    assert isinstance(recipe, BaseRecipe)
    return recipe


def _find_source(run: Path, tag: str | None, final: str) -> _Source:
    """Find the weights to export; `final` is the name of the folder that training writes at its end."""
    folder = run / CHECKPOINTS
    summary = read_object(run / SUMMARY)
    finished = summary.get("status") in (FINISHED, NOT_EVALUATED)
    if tag is None and finished and (run / final).is_dir():
        return _Source(run / final, summary.get("steps"), None)
    if tag is not None and not (folder / tag).is_dir():
        names = sorted(path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
        raise CheckpointError(f"{folder / tag}: no such checkpoint. There are: {', '.join(names) or 'none'}.")
    checkpoint = atomic.find(folder, tag)
    if checkpoint is None:
        state = f"finished, but its {final}/ is missing" if finished else "not finished"
        raise CheckpointError(
            f"{run}: nothing to export. The run is {state}, and checkpoints/ holds no checkpoint. "
            "Let it finish, or train with save_every=N."
        )
    trained = checkpoint.facts.get("trained")
    shapes = list(trained.values()) if isinstance(trained, dict) else []
    has_shapes = all(isinstance(shape, list) and all(isinstance(size, int) for size in shape) for shape in shapes)
    if not shapes or not has_shapes or checkpoint.facts.get("stage") not in (0, 1, 2, 3):
        raise CheckpointError(f"{checkpoint.path}: its manifest names no trained tensors. Take another checkpoint.")
    return _Source(checkpoint.path, checkpoint.step, checkpoint)


def _base_as_it_is_now(model: ModelConfig, path: str | None, dtype: str | None) -> ModelConfig:
    """Return a run's base model at its current place and in the requested precision, without needing a GPU."""
    changes: dict[str, Any] = {"attention": "eager", "activation_checkpointing": False}
    if path is not None:
        gguf = model.gguf_file
        kept = gguf if gguf and (Path(path) / gguf).is_file() else None
        changes |= {"name_or_path": path, "config": None, "gguf_file": kept}
    if dtype is not None:
        changes["dtype"] = dtype
    return model.model_copy(update=changes)


def _tokenizer_of_run(run: Path) -> str | None:
    """Find the tokenizer that a run wrote beside its trained weights."""
    beside = (run / name for name in (ADAPTER, MODEL) if (run / name / "tokenizer_config.json").is_file())
    return next((str(path) for path in beside), None)


def _load_tokenizer(model: ModelConfig, place: str | None) -> Any:
    try:
        return load_tokenizer(model, place)
    except ConfigError as error:
        raise ConfigError(f"{error} If it has moved, give its folder with --tokenizer.") from None


def _take_chat_template(tokenizer: Any, recipe: BaseRecipe) -> None:
    """Give a tokenizer the chat template that the run was trained with, if its recipe names one."""
    if not isinstance(recipe, Recipe):
        return
    try:
        template = chat_template_of(recipe)
    except ConfigError as error:
        logger.warning("%s The chat template of the base model is exported in its place.", error)
        return
    if template is not None:
        tokenizer.chat_template = template


def _class_that_reads(folder: Path, tokenizer: Any) -> str:
    """Return the class of transformers that loads a folder's tokenizer as it was in training; warn if not the usual."""
    from transformers import AutoTokenizer

    try:
        is_usual = describe_tokenizer(AutoTokenizer.from_pretrained(folder)) == describe_tokenizer(tokenizer)
    except Exception:  # whatever a library makes of a model type of which it knows no tokenizer
        is_usual = False
    if is_usual or type(tokenizer).__name__ not in GENERIC_TOKENIZERS:
        return "AutoTokenizer"
    logger.warning(
        "AutoTokenizer reads the tokenizer of this model type by other rules than those of training. Load it with "
        "PreTrainedTokenizerFast.from_pretrained, as README.md there does."
    )
    return "PreTrainedTokenizerFast"


def _base_config(model: ModelConfig) -> dict[str, Any]:
    """Load the configuration of the base model, without its weights."""
    from transformers import AutoConfig

    gguf = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    try:
        values: dict[str, Any] = AutoConfig.from_pretrained(model.name_or_path, **gguf).to_dict()
    except Exception as error:  # whatever a library makes of a broken file
        raise ConfigError(_not_loaded(model, str(error))) from None
    values.pop("quantization_config", None)
    return values


def _not_loaded(model: ModelConfig, reason: str) -> str:
    first = reason.strip().split("\n")[0]
    return f"base model {model.name_or_path}: cannot be loaded: {first} If it has moved, give its folder with --model."


def _skeleton(model: ModelConfig, lora: LoraConfig | None, tokenizer: Any) -> Any:
    """Build the model of a run with all names and shapes but without weights."""
    shape = model
    if model.config is None:
        values = {"config": _base_config(model), "name_or_path": None, "gguf_file": None, "quantization": None}
        shape = model.model_copy(update=values)
    with torch.device("meta"):
        skeleton: Any = load_model(shape, lora, tokenizer, fresh=True)
    if model.config is None and lora is None:
        _take_generation_config(skeleton, str(model.name_or_path))
    return skeleton


def _take_generation_config(model: Any, path: str) -> None:
    """Give a model its base's generation configuration, if the base has one."""
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception:  # whatever is wrong with it: the weights do not need it
        return


def _base_with_lora(model: ModelConfig, lora: LoraConfig, seed: int, tokenizer: Any) -> Any:
    """Load the base model with its weights and LoRA; random weights are as in training, from the run's seed.

    Quantized weights become the floats that training computed with.
    """
    state = random_state()
    try:
        seed_global_generators(seed)
        return add_lora(dequantize(load_model(model, None, tokenizer), torch.float32), lora)
    except ConfigError as error:
        raise ConfigError(_not_loaded(model, str(error))) from None
    finally:
        restore_random_state(state)


def _final_model(folder: Path, dtype: str) -> tuple[Any, int]:
    """Load the model that full training wrote at its end."""
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # whatever a library makes of a broken file
        raise CheckpointError(_final_broken(folder, str(error).strip().split("\n")[0])) from None
    _raise_for_report(folder, report)
    _check_values(folder, model.named_parameters())
    return model, len(list(model.parameters()))


def _final_broken(folder: Path, reason: str) -> str:
    return f"{folder}: cannot be read: {reason}. Choose a checkpoint of the run with --checkpoint."


def _final_adapter(folder: Path, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapter that LoRA training wrote at its end, by the model's names; raise if names differ."""
    saved_as = {saved: name for name, saved in trained_names(model).items()}
    file = folder / _ADAPTER_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            _compare_names(file, set(saved_as), set(tensors.keys()))
            for saved, name in saved_as.items():
                yield name, tensors.get_tensor(saved).to(dtype)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_final_broken(file, str(error))) from None


def _fill(model: Any, source: _Source, dtype: torch.dtype, kind: str, advice: str = _OTHER_BASE) -> int:
    """Copy the trained weights into a model; raise unless all are there, fit, and are finite."""
    shapes = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    buffers: list[str] = []
    if kind == MODEL:
        persistent = model.state_dict().keys()
        buffers = [name for name, _ in model.named_buffers() if name in persistent]
    if source.checkpoint is not None:
        _compare_shapes(source.path, shapes, source.checkpoint.facts["trained"], advice)
        tensors = checkpoint_tensors(source.checkpoint, buffers, dtype)
    else:
        tensors = _final_adapter(source.path, model, dtype)
    state = {}
    for name, value in _checked(source.path, tensors):
        if name in shapes and value.shape != shapes[name]:
            _compare_shapes(source.path, shapes, {name: list(value.shape)} | _as_lists(shapes, name), advice)
        state[name] = value
    if kind == MODEL:
        state = with_tied(model, state)
    model.load_state_dict(state, strict=False, assign=True)
    return len(shapes)


def _as_lists(shapes: Mapping[str, torch.Size], without: str) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items() if name != without}


def _compare_shapes(
    where: Path, wanted: Mapping[str, torch.Size], held: Mapping[str, list[int]], advice: str = _OTHER_BASE
) -> None:
    """Raise if the shapes of a run's weights are not those of the model."""
    _compare_names(where, set(wanted), set(held), advice)
    wrong = [name for name in wanted if list(wanted[name]) != list(held[name])]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} of {len(wanted)} tensors do not fit the model: {wrong[0]} has shape "
            f"{list(held[wrong[0]])} there and {list(wanted[wrong[0]])} in the model. "
            f"{advice}."
        )


def _compare_names(where: Path, wanted: set[str], held: set[str], advice: str = _OTHER_BASE) -> None:
    for names, what in ((wanted - held, "are missing"), (held - wanted, "are not known to the model")):
        if names:
            raise CheckpointError(
                f"{where}: {len(names)} tensors {what}, the first is {min(names)}. "
                f"{advice}, or take another checkpoint."
            )


def _checked(where: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors; raise if one is empty or not finite."""
    for name, value in tensors:
        if value.numel() == 0:
            raise CheckpointError(f"{where}: {name} is empty. Take another checkpoint.")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite. Take an earlier checkpoint.")
        yield name, value


def _check_values(where: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for _ in _checked(where, tensors):
        pass


def merge_adapter(model: Any, dtype: torch.dtype) -> nn.Module:
    """Add the adapter to the weights, one layer at a time in float32, and remove LoRA from the model.

    Modules that were trained whole replace the base's. A head that was tied to the embeddings is not any more then.

    Args:
        model: a `PeftModel` whose base is not quantized.
        dtype: dtype of the merged weights.

    Raises:
        ConfigError: if an adapted weight is shared with another module.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        if any(len(owners[id(parameter)]) > 1 for parameter in layer.get_base_layer().parameters()):
            raise ConfigError(f"{name}: its weight is tied to another's, so LoRA cannot be merged. Leave --merge out.")
    for _, layer in layers:
        layer.float()
        layer.merge()
        layer.to(dtype)
    merged: Any = model.unload().to(dtype)
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        merged.config.tie_word_embeddings = False
    return merged


def _check_written(folder: Path, model: Any, kind: str) -> None:
    """Read back names and shapes of the written weights, as the libraries that load them will."""
    if kind == ADAPTER:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        wanted = {saved: shapes[name] for name, saved in trained_names(model).items()}
        with safe_open(folder / _ADAPTER_FILE, framework="pt") as tensors:
            held = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        _compare_shapes(folder, wanted, held)
        return
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
    _raise_for_report(folder, report)


def _raise_for_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise if transformers reports weights that are missing, unexpected or of other shapes."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(key):
            raise CheckpointError(
                f"{folder}: {key.replace('_', ' ')}: {min(map(str, report[key]))}. "
                "Export a checkpoint of the run with --checkpoint."
            )
