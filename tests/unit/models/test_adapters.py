"""LoRA adapters: no reference copy by TRL's DPO trainer, experts' factors as PEFT saves them, adapters by row."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import ParamWrapper

from align.config.parts import Lora
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import AnyModel, add_lora, is_lora_weight, without_reference_adapter
from align.models.lora.experts import ExpertAdapter, adapt_by_row, delta, peft_shape

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def build() -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(**SIZES, num_key_value_heads=1, num_experts=1))


def test_no_second_adapter_is_added() -> None:
    """TRL would add an adapter `ref` and copy the values of `default` into it, parameter by parameter."""
    model: AnyModel = add_lora(build(), Lora(rank=2, experts=False), task="CAUSAL_LM")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with without_reference_adapter(model):
        model.add_adapter("ref", model.peft_config["default"])
        assert model.get_parameter(name.replace("default", "ref")) is model.get_parameter(name)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(AttributeError):
        model.get_parameter(name.replace("default", "ref"))
    model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == ["default", "ref"]


def test_a_plain_model_is_left_alone() -> None:
    model = build()
    with without_reference_adapter(model):
        assert "get_parameter" not in vars(model)
        assert "add_adapter" not in vars(model)


def test_factors_of_experts_are_written_as_peft_reads_them() -> None:
    """PEFT computes the expected delta. Its factors are unchanged after conversion to our shapes and back."""
    model = HunYuanForCausalLM(HunYuanConfig(**SIZES | {"intermediate_size": 6}, num_key_value_heads=1, num_experts=3))
    wrappers = [m for m in add_lora(model, Lora(rank=2), task="CAUSAL_LM").modules() if type(m) is ParamWrapper]
    assert len(wrappers) == 2  # gate and up projections are one stacked parameter
    for wrapper in wrappers:
        written = [factor["default"].weight for factor in (wrapper.lora_A, wrapper.lora_B)]
        for weight in written:
            torch.nn.init.normal_(weight)
        expected = wrapper.get_delta_weight("default")
        adapter = ExpertAdapter(wrapper)
        a_ErI, b_EOr = adapter.factors()
        torch.testing.assert_close(delta(adapter, "default", a_ErI, b_EOr), expected)
        assert torch.equal(peft_shape("experts.lora_A.default.weight", a_ErI), written[0])
        assert torch.equal(peft_shape("experts.lora_B.default.weight", b_EOr), written[1])


def test_adapters_applied_by_row_give_pefts_outputs_and_can_be_disabled() -> None:
    config = HunYuanConfig(**SIZES | {"intermediate_size": 6}, num_key_value_heads=1, num_experts=3, moe_topk=2)
    plain = HunYuanForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        base = plain(ids).logits
        model = add_lora(plain, Lora(rank=2), task="CAUSAL_LM").eval()
        for name, factor in model.named_parameters():
            if is_lora_weight(name):
                factor.normal_(std=0.5)
        expected = model(ids).logits
        adapt_by_row(model)
        torch.testing.assert_close(model(ids).logits, expected)
        assert (expected - base).abs().max() > 0.01
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, base)
