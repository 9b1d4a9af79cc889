"""Measure the activation memory of a micro-batch by running the engine's own code on tensors without data.

Two and three layers are run and the difference is extrapolated: layers are alike, so the result is that of the whole
model in a fraction of a second, for every family, attention, LoRA and kind of checkpointing that the code supports.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ConfigError, ProbeError
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.patch import eval_mode
from colm_ds.planner.choice_rows import choice_micro_batch
from colm_ds.planner.live_tensors import (
    LiveBytes,
    gpu_dropout,
    grouped_products,
    make_dataless,
    one_expert_at_a_time,
    rows_packed,
    stage3_linear,
)
from colm_ds.planner.quantized_weights import is_packed, num_elements, quantize_shapes
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.spsa import spsa_coefficients
from colm_ds.probe.tail import run_trunk, tail_losses
from colm_ds.recipes.model import add_lora, attention_for
from colm_ds.recipes.sections import LoraConfig

_FEW = 2

_LOGITS = 1 << 24
"""More logits than the loss computes at a time: a smaller vocabulary with this many needs the same memory."""


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model that determine its memory.

    Attributes:
        config: Hugging Face configuration.
        dtype: dtype of weights and compute.
        attention: implementation; flash attention keeps what sdpa keeps.
        lora: adapters, or None for full training.
        checkpointing: whether activations are recomputed in the backward pass.
        device_type: `cuda` or `cpu`: dropout keeps different masks on each.
        quantization: "4bit" or "8bit", of the frozen linear maps; None for none.
        double_quant: whether the scales of 4 bits are quantized too.
    """

    config: Any
    dtype: torch.dtype
    attention: str = "sdpa"
    lora: LoraConfig | None = None
    checkpointing: bool = False
    device_type: str = "cuda"
    quantization: str | None = None
    double_quant: bool = True

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the decoder: all of it but for models of several kinds."""
        return self.config.get_text_config(decoder=True)


@dataclass(frozen=True)
class Rows:
    """Size of a micro-batch: examples, their length, labelled tokens in total.

    Attributes:
        count: number of examples.
        length: tokens of each, padding included; for classification with the longest candidate.
        labels: labelled tokens in total.
        candidates: for classification, tokens of each candidate of an example.
        packed: whether a row holds several examples, which attention has to tell apart.
    """

    count: int
    length: int
    labels: int
    candidates: tuple[int, ...] = ()
    packed: bool = False


@dataclass(frozen=True)
class TrainingActivations:
    """Bytes beyond weights and gradients that a training micro-batch needs.

    Attributes:
        forward: peak of the forward.
        kept: bytes held between forward and backward.
        backward: peak of the backward.
    """

    forward: int
    kept: int
    backward: int


@dataclass(frozen=True)
class Parameters:
    """Elements by role.

    Attributes:
        total: all.
        trained: elements that get gradients.
        largest: elements of the largest trained tensor.
        layer: elements of one decoder layer.
        head: elements of the matrix that makes the logits.
        embedding: elements of the input embedding, which multiplies nothing; 0 if shared with the head.
        buffers: bytes of buffers.
        mlp: elements of a decoder layer's MLP.
        experts: elements of all experts among which tokens are routed; shared ones are not counted.
        layer_experts: those of one decoder layer.
        sizes: number of parameters by their elements.
        quantized: elements, of all, that are held in 4 or 8 bits.
        quantized_bytes: bytes of these with their scales.
    """

    total: int
    trained: int
    largest: int
    layer: int
    head: int
    embedding: int
    buffers: int
    mlp: int = 0
    experts: int = 0
    layer_experts: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    quantized: int = 0
    quantized_bytes: int = 0

    def weight_bytes(self, width: int) -> int:
        """Return the bytes of all weights; `width` is that of one that is not quantized."""
        return (self.total - self.quantized) * width + self.quantized_bytes

    def below(self, most: int) -> int:
        """Return the elements in parameters of at most `most` elements."""
        return sum(size * count for size, count in self.sizes if size <= most)


@dataclass
class Tracer:
    """Run shapes of one model; results are cached.

    Attributes:
        spec: the model.
        until: `time.thread_time()` after which no further pass begins: a TimeoutError instead.
    """

    spec: ModelSpec
    until: float = math.inf
    _models: dict[tuple[int, int], nn.Module] = field(default_factory=dict)
    _training: dict[tuple[Rows, bool, bool, bool], TrainingActivations] = field(default_factory=dict)
    _probes: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.spec.text_config.num_hidden_layers)

    def architecture(self, layer: str) -> Architecture:
        """Return the parts of the model of few layers; see `ProbeConfig.layer`."""
        return find_architecture(self._model(min(_FEW, self.num_layers)), layer)

    @cached_property
    def parameters(self) -> Parameters:
        """Elements by role, of the whole model.

        Raises:
            ConfigError: if its layers have different sizes, so that a few do not tell those of all.
        """
        few = min(_FEW, self.num_layers)
        small, large = self._model(few), self._model(few + 1)
        trained = [p.numel() for p in small.parameters() if p.requires_grad]

        def extended(count: Any) -> int:
            return count(small) + (self.num_layers - few) * (count(large) - count(small))

        self._check_alike(extended(_num_elements))
        head = find_loss_head(small)
        embedding = _base(small).get_input_embeddings().weight
        weight = None if head is None else head.weight
        return Parameters(
            total=extended(_num_elements),
            trained=extended(_num_trained),
            largest=max(trained, default=0),
            layer=_num_elements(large) - _num_elements(small),
            head=0 if not isinstance(weight, Tensor) else weight.numel(),
            embedding=0 if embedding is weight else embedding.numel(),
            buffers=extended(_buffer_bytes),
            mlp=_num_mlp_elements(small),
            experts=extended(_num_expert_elements),
            layer_experts=_num_expert_elements(large) - _num_expert_elements(small),
            sizes=tuple(
                (size, extended(lambda model, size=size: _sizes(model)[size])) for size in sorted(_sizes(large))
            ),
            quantized=extended(_num_quantized),
            quantized_bytes=extended(_quantized_bytes),
        )

    def training(
        self, rows: Rows, *, replay: bool = False, whole_logits: bool = False, stage3: bool = False
    ) -> TrainingActivations:
        """Return the activations of one micro-batch.

        Args:
            rows: the micro-batch.
            replay: whether it starts from the probe's hidden states (needs checkpointing).
            whole_logits: compute the loss from all logits at once.
            stage3: under ZeRO-3, where frozen linear maps keep their inputs too.
        """
        key = rows, replay, whole_logits, stage3 and self.spec.lora is not None
        if key not in self._training:
            with stage3_linear() if key[-1] else nullcontext():
                self._training[key] = self._extended(lambda layers: self._train(layers, rows, replay, whole_logits))
        return self._training[key]

    def probe(self, rows: Rows, estimator: str, num_probes: int, tail_dtype: torch.dtype, layer: str = "v_proj") -> int:
        """Return the peak bytes of probing one micro-batch; the trunk keeps nothing, so layers do not matter.

        Args:
            rows: the micro-batch of the probe.
            estimator: `spsa`, one that computes gradients (`exact`, `sketch`, `projection`), or `score`.
            num_probes: K.
            tail_dtype: dtype in which `spsa` runs the last layer and head.
            layer: probed part of the last layer.
        """
        key = rows, estimator, num_probes, tail_dtype, layer
        if key not in self._probes:
            self._probes[key] = self._probe(rows, estimator, min(num_probes, 2), tail_dtype, layer)
        return self._probes[key]

    def _check_alike(self, total: int) -> None:
        """Raise a ConfigError if layers of several kinds together have another size than `total`."""
        values = self.spec.text_config.to_dict()
        may_differ = any("expert" in key or "moe" in key for key in values)
        may_differ |= any(len(set(values.get(key) or ())) > 1 for key in ("layer_types", "mlp_layer_types"))
        if not may_differ or self.num_layers <= _FEW + 1:
            return
        self._check_time()
        model = build_dataless(self.spec, self.num_layers, int(self.spec.text_config.vocab_size), self._mode)
        whole = _num_elements(model)
        if whole != total:
            raise ConfigError(
                f"a model of type {self.spec.config.model_type!r} of {whole / 1e9:.3g}e9 parameters: its layers are of "
                "different sizes, as where only some have experts or attention, so it cannot be planned. Measure one."
            )

    def _extended(self, run: Any) -> TrainingActivations:
        if self.num_layers <= _FEW + 1:
            return run(self.num_layers)
        small, large = run(_FEW), run(_FEW + 1)
        more = self.num_layers - _FEW

        def extend(name: str) -> int:
            first, second = getattr(small, name), getattr(large, name)
            return int(first + more * (second - first))

        return TrainingActivations(extend("forward"), extend("kept"), extend("backward"))

    def _train(self, layers: int, rows: Rows, replay: bool, whole_logits: bool) -> TrainingActivations:
        self._check_time()
        shrinks = self.spec.lora is not None and not whole_logits and not self._trains_vocabulary
        vocabulary = self._vocabulary(rows) if shrinks else None
        model = self._model(layers, vocabulary)
        head = None if whole_logits else find_loss_head(model)
        last = find_architecture(model).last_layer if replay else None
        model.train()
        live, batch = LiveBytes(), self._micro_batch(rows)
        masked = rows.packed and not self.spec.attention.startswith("flash")
        with self._running(masked), _plain_layer(last):
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            with live:
                loss = example_loss_sums(model, head, batch).sum()
                forward, kept = live.peak, live.live
                self._check_time()
                live.restart()
                loss.backward()
        return TrainingActivations(forward, kept, live.peak)

    def _probe(self, rows: Rows, estimator: str, num_probes: int, tail_dtype: torch.dtype, layer: str) -> int:
        self._check_time()
        model = self._model(min(_FEW, self.num_layers), self._vocabulary(rows))
        architecture = find_architecture(model, layer)
        live, batch = LiveBytes(), self._micro_batch(rows)
        with self._running(), eval_mode(model), torch.no_grad(), live:
            tail = run_trunk(model, architecture, batch)
            if estimator == "spsa":
                directions: Any = _Directions(num_probes, architecture.num_coordinates)
                with one_expert_at_a_time(model):
                    spsa_coefficients(architecture, tail, directions, 1e-3, tail_dtype, self.spec.device_type)
            elif estimator != "score":
                gradient_factors(architecture, tail)
            else:
                tail_losses(architecture, tail)
        return live.peak

    def _model(self, layers: int, vocabulary: int | None = None) -> nn.Module:
        key = layers, vocabulary or int(self.spec.text_config.vocab_size)
        if key not in self._models:
            self._models[key] = build_dataless(self.spec, *key, self._mode)
        return self._models[key]

    @cached_property
    def _trains_vocabulary(self) -> bool:
        """True if any trained parameter has a row for every token, as a head in `modules_to_save` has."""
        size = int(self.spec.text_config.vocab_size)
        return any(size in p.shape for p in self._model(min(_FEW, self.num_layers)).parameters() if p.requires_grad)

    def _check_time(self) -> None:
        """Raise a TimeoutError if time is up: only between passes, as within one an exception may abort the process."""
        if time.thread_time() > self.until:
            raise TimeoutError("planning takes longer than it may")

    def _vocabulary(self, rows: Rows) -> int:
        """Return the smallest vocabulary for which a frozen head needs the memory of the full one."""
        needed = max(2048, -(-_LOGITS // rows.labels))
        return min(
            int(self.spec.text_config.vocab_size), 1 << (needed - 1).bit_length()
        )  # few sizes, as models are cached

    def _micro_batch(self, rows: Rows) -> MicroBatch:
        if rows.candidates:
            batch = choice_micro_batch(rows.count, rows.length, rows.candidates)
            return replace(_dataless(batch, self._mode), groups=_dataless(batch.groups, self._mode))
        with self._mode:
            places = torch.zeros(rows.labels, dtype=torch.int64)
            tokens = torch.zeros(rows.count, rows.length, dtype=torch.int64)
            batch = MicroBatch(tokens, places, places.clone(), places.clone(), torch.zeros(rows.count))
            return replace(batch, position_ids=tokens.clone(), packed=places.clone()) if rows.packed else batch

    @contextmanager
    def _running(self, packed: bool = False) -> Iterator[None]:
        try:
            with self._dataless(packed):
                yield
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ConfigError(
                f"a model of type {self.spec.config.model_type!r}: the memory of its activations depends on the data, "
                "as with experts that take the tokens routed to them, so it cannot be planned. Measure a step instead."
            ) from error

    @contextmanager
    def _dataless(self, packed: bool) -> Iterator[None]:
        with (
            self._mode,
            rows_packed(packed),
            grouped_products(),
            gpu_dropout() if self.spec.device_type == "cuda" else nullcontext(),
        ):
            yield


def build_dataless(spec: ModelSpec, num_layers: int, vocabulary: int, mode: FakeTensorMode) -> nn.Module:
    """Build a model of some layers without data.

    Raises:
        ConfigError: if its configuration cannot be built or LoRA does not fit it.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(spec.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size, text.pad_token_id, config.pad_token_id = num_layers, vocabulary, None, None
    vars(config).pop("quantization_config", None)
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := list(getattr(text, name, None) or ()):
            setattr(text, name, (kinds + kinds[-1:] * num_layers)[:num_layers])
    attention = attention_for(config, "eager" if spec.attention == "eager" else "sdpa")
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=spec.dtype, attn_implementation=attention)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"model: cannot be built from its configuration: {error}") from None
        if spec.quantization is not None:
            quantize_shapes(model, spec.quantization, spec.double_quant, spec.dtype)
        if spec.lora is not None:
            model = _with_lora(model, spec.lora)
    if spec.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    return make_dataless(model, mode, spec.dtype)


def _with_lora(model: Any, lora: LoraConfig) -> Any:
    """Add adapters to a model of few layers.

    Raises:
        ConfigError: if the adapters name layers, which the few have not, or do not fit the model.
    """
    if lora.layers_to_transform is not None:
        raise ConfigError(
            f"lora.layers_to_transform = {lora.layers_to_transform}: adapters in some of the layers cannot be planned, "
            "as a plan builds two and three layers and counts on from there. Training takes them; plan with "
            "lora.layers_to_transform=null for an upper bound."
        )
    return add_lora(model, lora)


class _Directions:
    """Directions of the right size, for shapes."""

    def __init__(self, num_probes: int, size: int) -> None:
        self.num_probes = num_probes
        self._size = size

    def direction(self, probe: int) -> Tensor:
        return torch.empty(self._size)


@contextmanager
def _plain_layer(layer: nn.Module | None) -> Iterator[None]:
    """Run the block without checkpointing a layer, as the last one under replay."""
    if layer is None:
        yield
        return
    saved = layer.__dict__.get("gradient_checkpointing")
    layer.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        layer.__dict__["gradient_checkpointing"] = saved


def _dataless(batch: Any, mode: FakeTensorMode) -> Any:
    """Return a dataclass with its tensors replaced by ones without data."""
    values = {name.name: getattr(batch, name.name) for name in fields(batch)}
    return replace(batch, **{name: mode.from_tensor(v) for name, v in values.items() if isinstance(v, Tensor)})


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _num_elements(model: nn.Module) -> int:
    return sum(num_elements(p) for p in model.parameters())


def _num_quantized(model: nn.Module) -> int:
    return sum(num_elements(p) for p in model.parameters() if is_packed(p))


def _quantized_bytes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if is_packed(p))


def _num_mlp_elements(model: nn.Module) -> int:
    """Elements of the MLP that the probe runs on labelled positions alone; 0 if it runs on all, as experts do.

    Also 0 for a model that cannot be probed, as of several kinds of layers: it may be chosen for by token vectors.
    """
    try:
        mlp = find_architecture(model, "v_proj").mlp
    except ProbeError:
        return 0
    return 0 if mlp is None else _num_elements(mlp)


def _num_expert_elements(model: nn.Module) -> int:
    return sum(num_elements(p) for name, p in model.named_parameters() if ".experts." in name)


def _num_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _sizes(model: nn.Module) -> Counter[int]:
    return Counter(num_elements(p) for p in model.parameters())


def _buffer_bytes(model: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for b in model.buffers())


def even_rows(count: int, length: int, label_share: float = 1.0) -> Rows:
    """Return examples of one length with labels at a share of the predicted tokens."""
    return Rows(count, length, max(1, round(count * (length - 1) * label_share)))


def choice_rows(count: int, length: int, candidates: tuple[int, ...]) -> Rows:
    """Return classification examples of one length, whose labels are their candidates."""
    return Rows(count, length, count * sum(candidates), candidates)
