"""Sections of recipes: model, LoRA, optimizer, learning rate, and data and evaluation of each kind of run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from colm_ds.config.section import Section
from colm_ds.data.entries import Places, RowReading, as_entries
from colm_ds.errors import Problems

Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The model: where it is loaded from, or the configuration that it is built from, and its precision."""

    name_or_path: str | None = Field(
        None, description="folder, hub name, or package:NAME for files inside an installed Python package"
    )
    gguf_file: str | None = Field(None, description="GGUF file in that folder to load weights and tokenizer from")
    config: dict[str, Any] | None = Field(
        None, description="build from this Hugging Face configuration with random weights instead (needs model_type)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="precision of weights and compute; auto: bfloat16 where the machine computes in it (GPUs, CPUs "
        "with AMX or AVX512-BF16), else float32",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, one more forward")
    vocabulary_multiple: int = Field(8, ge=1, description="with config: round the tokenizer's vocabulary up to this")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="hold the frozen weights of linear maps in 4 or 8 bits by bitsandbytes; needs a lora section"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4bit: the sixteen values of a weight")
    bnb_4bit_use_double_quant: bool = Field(
        True, description="4bit: quantize the scales too (0.52 bytes a weight instead of 0.56)"
    )

    @field_validator("dtype")
    @classmethod
    def _decide(cls, dtype: str) -> str:
        """Replace `auto` by the machine's precision, so that a run's config.json records it."""
        return native_dtype() if dtype == "auto" else dtype

    def check(self, problems: Problems) -> None:
        """Add a GGUF file that is not named, or not in the model's folder."""
        folder = Path(self.name_or_path or "")
        if self.name_or_path is None or not folder.is_dir():
            return
        held = sorted(file.name for file in folder.glob("*.gguf"))
        is_other = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if self.gguf_file is None and held and not is_other:
            what = f"the weights in {folder} are a GGUF file"
            problems.add("model.gguf_file", None, what, f"Write model.gguf_file={' or '.join(held)}.")
        if self.gguf_file is not None and not (folder / self.gguf_file).is_file():
            named = f"It holds {', '.join(held)}." if held else "It holds no GGUF file: remove the key."
            problems.add("model.gguf_file", self.gguf_file, f"no such file in {folder}", named)


def native_dtype() -> Literal["float32", "bfloat16"]:
    """Return the precision in which this machine computes fastest without losing float32's range."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supported = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bfloat16" if any(getattr(torch.cpu, name, bool)() for name in supported) else "float32"


class LoraConfig(Section):
    """LoRA; leave the section out to train all parameters. Keys that PEFT has are called as there."""

    rank: int = Field(128, ge=1, description="rank of the adapters")
    alpha: float = Field(512, gt=0, description="scale: updates are multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout in front of the adapters while training")
    targets: str | list[str] = Field(
        "auto",
        description="adapted modules: auto (the family's), all-linear (all but the head), a list of names, or a "
        "regular expression",
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    use_dora: bool = Field(False, description="train the length of every row beside its direction (DoRA); slower")
    layers_to_transform: list[int] | None = Field(None, description="adapt these decoder layers only, from 0")
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="other ranks, by name or regular expression of the module"
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="other alphas, by name or regular expression of the module"
    )
    target_parameters: list[str] = Field(
        default_factory=list,
        description="adapted tensors that are no modules, as fused experts: mlp.experts.gate_up_proj; needs dropout 0",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules trained whole beside the adapters, such as lm_head or norm"
    )
    adapter: str | None = Field(
        None,
        description="folder of a trained adapter to start from; every other key but dropout is then the adapter's",
    )

    @field_validator("rank_pattern")
    @classmethod
    def _positive_ranks(cls, ranks: dict[str, int]) -> dict[str, int]:
        if any(rank < 1 for rank in ranks.values()):
            raise ValueError("ranks must be at least 1")
        return ranks

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        if self.target_parameters and self.dropout:
            problems.add("lora.dropout", self.dropout, "target_parameters change weights, not outputs", "Write 0.")
        if self.target_parameters and self.use_dora:
            problems.add("lora.use_dora", True, "DoRA does not exist for target_parameters", "Remove one of the two.")
        if not self.targets and not self.target_parameters:
            problems.add("lora.targets", self.targets, "nothing would be adapted", "Write auto or name modules.")


class DataConfig(RowReading):
    """Rows to train on and to hold out, and how they become tokens."""

    train: Places = Field(
        description="file, folder, hub:NAME:CONFIG:SPLIT, {path: ..., name: ..., weight: ...}, or a list of these: "
        "docs/DATA.md"
    )
    heldout: Places | None = Field(None, description="what the held-out loss is measured on, written as train")
    holdout_per_source: int = Field(0, ge=0, description="without a held-out file: examples of each source to hold out")
    max_length: int = Field(512, ge=2, description="maximum tokens of an example; longer ones are truncated")
    train_on: Literal["all", "last"] = Field("all", description="turns of the assistant in a conversation with a loss")
    chat_template: str | None = Field(None, description="Jinja file; default: the tokenizer's own chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="further variables of the chat template, such as {enable_thinking: false}"
    )
    source_key: str | None = Field(
        "source", description="key that names a row's source; rows without it are of the file's name; null: one source"
    )
    limit: int | None = Field(None, ge=1, description="use at most this many examples, drawn at random")
    subset: str | None = Field(
        None, description="index file of colm-ds select: train on these of the examples, held-out ones taken out before"
    )
    cache_dir: str | None = Field("~/.cache/colm_ds/tokens", description="where tokens are kept; null: nowhere")
    num_processes: int = Field(0, ge=0, description="processes that tokenise; 0: as many as there are cores, up to 16")

    @model_validator(mode="before")
    @classmethod
    def _complete_entries(cls, values: Any) -> Any:
        """Let entries inherit schema, prompt and source_key where they do not give them."""
        if not isinstance(values, dict):
            return values
        shared = {key: values[key] for key in ("schema", "prompt", "source_key") if key in values}

        def complete(given: Any) -> Any:
            if isinstance(given, list):
                return [complete(one) for one in given]
            return {**shared, **given} if isinstance(given, dict) else given

        return {**values, **{key: complete(values[key]) for key in ("train", "heldout") if key in values}}

    def check(self, problems: Problems) -> None:
        """Add what does not fit together."""
        if self.heldout is not None and self.holdout_per_source:
            key = "data.holdout_per_source"
            problems.add(key, self.holdout_per_source, "there is a held-out file", "Remove one of the two.")
        weighted = [entry.weight is not None for entry in as_entries(self.train)]
        if any(weighted) and not all(weighted):
            missing = as_entries(self.train)[weighted.index(False)].path
            problems.add("data.train", missing, "has no weight, but others have", "Give every entry one, or none.")
        if self.heldout is not None and any(entry.weight is not None for entry in as_entries(self.heldout)):
            problems.add("data.heldout", "weight", "held-out examples are all measured", "Remove the weights.")


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(2e-5, gt=0, allow_inf_nan=False, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="beta1 and beta2, also of the selection's geometry")
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="eps, also of the selection's geometry")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="decoupled weight decay")
    torch_adam: bool = Field(
        False, description="on GPUs PyTorch's AdamW, not DeepSpeed's kernel, which nvcc compiles at its first use"
    )


class LrScheduleConfig(Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps with a rising rate")
    final_fraction: float = Field(0.0, ge=0, le=1, description="rate at the end, relative to the peak")


class HeldoutConfig(Section):
    """Held-out loss: interval between measurements, and batch size."""

    every: int = Field(0, ge=0, description="held-out loss every n steps; 0: at the start and the end only")
    max_tokens: int = Field(16384, ge=1, description="maximum padded tokens of one evaluation batch")


class EvaluationConfig(HeldoutConfig):
    """Held-out loss of a run on instruction data, and exact match."""

    exact_match: bool = Field(False, description="greedy answers compared with the gold ones, at the end")
    max_new_tokens: int = Field(64, ge=1, description="maximum tokens of an answer")


class ChunkDataConfig(Section):
    """Pretraining data: a store of tokens, cut into chunks."""

    store: str = Field(description="folder that pretrain/prepare.py writes; relative to the working folder")
    chunk_tokens: int = Field(1024, ge=2, description="tokens of a chunk: the sequence length")
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="shares of the chunks by source, of any sum; leave out for natural proportions"
    )


class PrepareConfig(Section):
    """Settings of pretrain/prepare.py: the tokenizer, held-out documents, tolerated bad lines."""

    tokenizer: str | None = Field(
        None, description="SentencePiece .model, Hugging Face folder or hub name; default: train one on the mixture"
    )
    vocabulary_size: int = Field(32000, ge=300, description="size of a newly trained tokenizer (with byte fallback)")
    sample_mb: float = Field(32.0, gt=0, description="megabytes of text to train the tokenizer on, by the weights")
    holdout: float = Field(0.01, ge=0, lt=1, description="share of every source's documents to hold out")
    skip_other_sources: bool = Field(False, description="leave out documents of sources without a weight")
    max_bad_fraction: float = Field(1e-4, ge=0, le=1, description="share of bad lines to tolerate")
    seed: int = Field(0, ge=0, description="decides which documents are held out and sampled")


class PerplexityConfig(HeldoutConfig):
    """Held-out loss of a run on chunks of text."""

    chunks_per_source: int | None = Field(None, ge=1, description="maximum held-out chunks of each source; null: all")
