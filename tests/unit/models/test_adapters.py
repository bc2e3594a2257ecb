"""LoRA adapters: no reference copy by TRL's DPO trainer, experts' factors as PEFT saves them, adapters by row."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file

from align.config.lora import Lora
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import (
    AnyModel,
    add_lora,
    is_lora_weight,
    merge_lora,
    plain_name,
    without_reference_adapter,
)
from align.models.lora.experts import ExpertAdapter, adapt_by_row, delta, peft_shape
from align.models.weights import published_weights
from align.parallel.export import save_sharded_adapter
from align.train.checkpoint import load_policy, load_scorer
from tests.tiny_families import save_tiny

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
    wrappers = [m for m in add_lora(model, Lora(rank=2), task="CAUSAL_LM").modules() if isinstance(m, ParamWrapper)]
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


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_embeddings_stay_tied_and_are_merged_and_published(tmp_path, kind, tied, dtype):
    save_tiny(kind, tmp_path / "model", tie_word_embeddings=tied)
    name = str(dtype).removeprefix("torch.")
    plain = load_policy(tmp_path / "model", name).eval()
    model = load_policy(tmp_path / "model", name, lora=Lora(rank=2, dropout=0.0, train_embeddings=True)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(model(ids).logits.float(), plain(ids).logits.float(), **near)
        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
        logprobs = model.get_output_embeddings()(hidden[0, :-1], ids[0, 1:], 1.0).logprobs_N
        expected = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert hidden.dtype == dtype
    torch.testing.assert_close(logprobs, expected, **near)
    trained = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {name for name in trained if ".mlp." not in name} == (
        {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    )
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logprobs.sum().backward()
    optimizer.step()
    changed = dict(published_weights(model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for tensor in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        assert not torch.equal(changed[tensor].float(), stored[tensor].to(dtype).float()), tensor
    assert ("lm_head.weight" in changed) != tied
    if dtype == torch.float32:
        after = model(ids).logits.detach()
        merge_lora(model).save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load_policy(tmp_path / "merged", name).eval()(ids).logits, after, **near)


def test_a_scorer_trains_its_input_embeddings(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = load_scorer(tmp_path / "model", "float32", lora=Lora(rank=2, train_embeddings=True))
    trained = {plain_name(name) for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"model.embed_tokens.weight", "score.weight"}


def test_a_sharded_adapter_has_both_names_of_tied_embeddings(tmp_path):
    save_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    model = load_policy(tmp_path / "model", "float32", lora=Lora(rank=2, train_embeddings=True))
    save_sharded_adapter(model, tmp_path / "sharded")
    model.save_pretrained(tmp_path / "usual")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sharded", "usual"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
