"""Weights that bitsandbytes holds in 4 or 8 bits: find them, read them as floats, quantize fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.errors import Problems

_KINDS = ("Linear4bit", "Linear8bitLt")


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear map with quantized weights: one of bitsandbytes, or a plan's shape of one."""
    return getattr(type(module), "is_quantized", False) is True or _is_of_bitsandbytes(module)


def _is_of_bitsandbytes(module: nn.Module) -> bool:
    if type(module).__name__ not in _KINDS or not type(module).__module__.startswith("bitsandbytes."):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and type(weight).__name__ in ("Params4bit", "Int8Params")


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's quantized linear maps with their names."""
    yield from ((name, module) for name, module in model.named_modules() if is_quantized(module))


def rounds_inputs(module: nn.Module) -> bool:
    """Return whether a linear map rounds its inputs too, as those of 8 bits do, so that no slope can be measured."""
    return _is_of_bitsandbytes(module) and type(module).__name__ == "Linear8bitLt"


def float_weight(module: Any) -> Tensor:
    """Return the weight of a linear map, `[out, in]`: a quantized one as the floats that it computes with."""
    if not _is_of_bitsandbytes(module):
        weight: Tensor = module.weight
        return weight
    import bitsandbytes

    if type(module.weight).__name__ == "Params4bit":
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    held = module.state.CB if module.state.CB is not None else module.weight.data
    return bitsandbytes.functional.int8_vectorwise_dequant(held, scales)


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights for inference, and unpack those that it has packed.

    On CPUs with AVX512-BF16 the first pass in evaluation mode changes a weight's layout for a kernel that computes in
    bfloat16 and has no gradient, so later training steps would lose the gradients of everything below it in silence.
    Unpacked weights have scales that bitsandbytes rounded to bfloat16.
    """
    for _, module in quantized_linears(model):
        if type(module).__name__ != "Linear4bit":
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def float_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point weight; float32 if it has none."""
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)


def fused_experts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights `[experts, out, in]` of a model with their owners: tensors, no linear maps."""
    experts = []
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if "expert" in type(module).__name__.lower() and value.dim() == 3 and value.is_floating_point():
                experts.append((module, name))
    return experts


def quantize_experts(model: nn.Module, quant_type: str, double_quant: bool) -> int:
    """Hold fused experts in 4 bits, which transformers leaves as they are; they are made floats as they are used.

    Args:
        model: a model whose linear maps are quantized already.
        quant_type: "nf4" or "fp4".
        double_quant: quantize the scales too.

    Returns:
        Number of tensors.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    experts = fused_experts(model)
    for module, name in experts:
        if torch.cuda.is_available():  # where the scales stay, which are not moved with the module
            getattr(module, name).data = getattr(module, name).data.to(torch.cuda.current_device())
        replace_parameter_4bit(module, name, compress_statistics=double_quant, quant_type=quant_type)
        module.parametrizations[name].original.requires_grad_(False)  # type: ignore[index,union-attr]
    return len(experts)


def dequantize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace quantized weights by the floats that they stand for, in place, and return the model."""
    for name, module in list(quantized_linears(model)):
        weight = float_weight(module).to(dtype)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module.bias, Tensor):
            plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            value = getattr(module, name).detach().to(dtype)
            nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(flag, None)
    return model


@contextmanager
def without_quantized_state(model: nn.Module) -> Iterator[None]:
    """Leave weights that are not trained, and the scales beside them, out of the model's state dict in the block.

    Nothing is changed for a model without quantized weights.
    """
    if not has_quantized(model):
        yield
        return
    kept = {name for name, value in model.named_parameters() if value.requires_grad}
    kept |= {name for name, _ in model.named_buffers()}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.removeprefix(prefix) not in kept]:
            del state[name]

    handle = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def has_quantized(model: nn.Module) -> bool:
    """Return whether any weight of a model is quantized, as linear map or as tensor of experts."""
    return any(is_quantized(module) or "Bnb4bitParametrization" in type(module).__name__ for module in model.modules())


def adapts_tensor(module: nn.Module) -> bool:
    """Return whether a module is PEFT's wrapper of a tensor that is no module (`target_parameters`)."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def check_adapters(model: nn.Module, stage: int) -> None:
    """Raise for combinations of quantized or adapted weights that training cannot work with.

    Args:
        model: as given by the user, before DeepSpeed sees it.
        stage: ZeRO stage.

    Raises:
        ConfigError: listing them.
    """
    problems = Problems("the model and its DeepSpeed configuration")
    key = "zero_optimization.stage"
    if has_quantized(model):
        if stage == 3:
            why = "it partitions weights, and bitsandbytes needs whole ones beside scales that are not partitioned"
            problems.add(key, 3, why, "Use stage 0, 1 or 2 with model.quantization, or no quantization")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            why = "quantized weights are not trained, and the model has no other trained ones"
            problems.add("model", type(model).__name__, why, "Put LoRA on it (peft.get_peft_model, or a lora section)")
    if stage == 3 and any(adapts_tensor(module) for module in model.modules()):
        why = "it partitions the adapters of experts' tensors, which PEFT multiplies without running them as modules"
        problems.add(key, 3, why, "Use stage 0, 1 or 2 with target_parameters, or adapt linear modules only")
    for name, module in model.named_modules():
        inside: Any = getattr(module, "base_layer", None)
        if getattr(module, "lora_magnitude_vector", None) and inside is not None and rounds_inputs(inside):
            if inside.weight.device.type == "cpu":
                why = "PEFT's DoRA loses weights of 8 bits on a CPU"
                problems.add("use_dora", name, why, "Quantize to 4 bits, or use LoRA without DoRA")
            break
    problems.raise_if_any()
