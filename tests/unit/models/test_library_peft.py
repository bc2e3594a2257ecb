"""PEFT's private classes and attributes that align uses to merge, shard and save adapters."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


class Stack(nn.Module):
    """The matrices of two experts in one parameter [E, O, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_EOI = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight_EOI @ x.T


class Model(nn.Module):
    """A linear layer, a stack and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.stack, self.router = nn.Linear(4, 6), Stack(), nn.Linear(4, 2)


@pytest.fixture
def wrapped() -> PeftModel:
    config = LoraConfig(
        r=3, target_modules=["linear"], target_parameters=["stack.weight_EOI"], modules_to_save=["router"], bias="none"
    )
    return get_peft_model(Model(), config, autocast_adapter_dtype=True)


def test_the_classes_form_the_hierarchy_that_merging_walks() -> None:
    assert issubclass(ParamWrapper, LoraLayer)
    assert issubclass(LoraLayer, BaseTunerLayer)
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)


def test_an_adapter_has_the_attributes_that_merging_reads(wrapped: PeftModel) -> None:
    layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    assert {type(layer) is ParamWrapper for layer in layers} == {True, False}
    for layer in layers:
        assert layer.active_adapters == ["default"]
        assert not layer.disable_adapters
        assert not layer.merged
        assert "default" in layer.lora_A
        assert "default" not in layer.lora_variant
        assert layer.scaling["default"] == pytest.approx(8 / 3)  # lora_alpha / r
        assert isinstance(layer.base_layer, nn.Module)
        layer.get_delta_weight("default")


def test_the_factors_of_a_stack_have_these_shapes_and_order(wrapped: PeftModel) -> None:
    """A is [E r, I], one expert after another. B is [O, r E], where the expert index varies fastest."""
    (layer,) = (module for module in wrapped.modules() if isinstance(module, ParamWrapper))
    assert (layer.parameter_name, layer.num_experts) == ("weight_EOI", 2)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((6, 4), (5, 6))
    with torch.no_grad():
        b.normal_()
    by_hand = torch.stack([b[:, expert::2] @ a[3 * expert : 3 * expert + 3] for expert in range(2)]) * 8 / 3
    torch.testing.assert_close(layer.get_delta_weight("default"), by_hand)


def test_a_trained_copy_is_found_under_these_names(wrapped: PeftModel) -> None:
    (wrapper,) = (module for module in wrapped.modules() if isinstance(module, ModulesToSaveWrapper))
    assert not wrapper.disable_adapters
    assert wrapper.active_adapters == ["default"]
    assert wrapper.modules_to_save["default"] is not wrapper.original_module


def test_parameter_names_carry_the_prefixes_that_are_stripped(wrapped: PeftModel) -> None:
    names = {name for name, _ in wrapped.named_parameters()}
    assert "base_model.model.router.modules_to_save.default.weight" in names
    assert "base_model.model.router.original_module.weight" in names
    assert any(".base_layer." in name for name in names)
    assert all(name.startswith("base_model.model.") for name in names)


def test_the_methods_that_are_called_exist() -> None:
    for name in ("get_base_model", "save_pretrained", "add_adapter", "get_parameter"):
        assert callable(getattr(PeftModel, name))
    assert "state_dict" not in inspect.signature(PeftModel.save_pretrained).parameters  # it is one of **kwargs
    assert "state_dict" in inspect.getsource(PeftModel.save_pretrained)


def test_adapters_of_a_shared_expert_are_put_there() -> None:
    """By itself PEFT moves them to the routed experts of this family, whose checkpoints have a `gate_proj` each."""
    from align.config.lora import Lora
    from align.models.family import family_of
    from align.models.lora.adapters import add_lora
    from tests.tiny_families import tiny_config

    config = tiny_config("deepseek_v3")
    model = add_lora(family_of(config).policy(config), Lora(rank=2, attention=False, experts=False), task="CAUSAL_LM")
    names = {name for name, parameter in model.named_parameters() if "lora_A" in name}
    # A dense layer, and the shared expert of two layers; three matrices each.
    assert sum(".mlp.shared_experts." in name for name in names) == 6
    assert len(names) == 9
    assert not any(".mlp.experts." in name for name in names)
