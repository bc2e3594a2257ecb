"""Parameters of a model with its LoRA adapters (PEFT) merged, one at a time, without changing the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align.models.quantized import Quantized


@torch.no_grad()
def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, tensor) of every parameter, with adapters added.

    The result is that of `merge_and_unload`, but only one merged matrix exists at a time and the model is unchanged.
    Handles LoRA on modules and on parameters (`target_parameters`) and `modules_to_save`; disabled and
    already merged adapters are not added. Weights in 4 bits are dequantised. Shared parameters appear once.
    """
    for name, parameter, adapters in plain_parameters(model):
        merged = parameter.detach()
        for adapter in adapters:
            merged = _add(merged, adapter)
        yield name, merged


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Any]]]:
    """(name in the plain model, parameter, LoRA layers that add to it) of every parameter; a shared parameter once."""
    from peft import PeftModel

    yield from _walk(model.get_base_model() if isinstance(model, PeftModel) else model, "", set())


def plain_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, tensor) of every buffer that belongs to a checkpoint.

    A module that an adapter trains in full has two copies, whose buffers have the same name here.
    """
    from align.models.lora.adapters import plain_name

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield plain_name(name), tensor


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Parameter, list[Any]]]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    adapters: list[LoraLayer] = []
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        if isinstance(module, LoraLayer):
            # Adapters on several parameters of one module are nested.
            adapters.append(module)
            module = module.base_layer
        elif isinstance(module, ModulesToSaveWrapper):
            module = _saved_module(module)
        else:
            raise NotImplementedError(f"cannot merge a {type(module).__name__}: only LoRA and modules_to_save")
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if isinstance(module, Quantized) and name in module.quantized:
            parameter = nn.Parameter(module.dense(name), requires_grad=False)
        yield prefix + name, parameter, [a for a in adapters if getattr(a, "parameter_name", "weight") == name]
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _saved_module(wrapper: Any) -> nn.Module:
    """The trained copy, or the original module while the adapter is disabled."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        original: nn.Module = wrapper.original_module
        return original
    trained: nn.Module = wrapper.modules_to_save[wrapper.active_adapters[0]]
    return trained


def _add(weight: Tensor, adapter: Any) -> Tensor:
    from peft.tuners.lora.variants import DoraLinearVariant

    if adapter.disable_adapters or adapter.merged:
        return weight
    for name in adapter.active_adapters:
        if name not in adapter.lora_A:
            continue
        variant = adapter.lora_variant.get(name)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise NotImplementedError(f"cannot merge {type(variant).__name__} on the fly")
        weight = weight + adapter.get_delta_weight(name)
        if variant is not None:
            magnitudes = adapter.lora_magnitude_vector[name].weight
            weight = weight * (magnitudes / weight.norm(dim=1)).view(-1, 1)
    return weight
