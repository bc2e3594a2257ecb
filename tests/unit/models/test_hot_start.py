"""A hot-started MoE model computes the function of its dense source, and its experts diverge in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.lora import Lora
from align.errors import UserError
from align.models.hot_start import cache_dir, hot_start, load_dense
from align.models.lora.adapters import add_lora, merge_lora
from align.models.upcycling import upcycle
from tests.near import assert_near


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


@pytest.mark.parametrize(("experts", "top_k", "width"), [(4, 1, None), (4, 2, 24), (8, 1, 6), (6, 1, 16)])
def test_the_function_is_unchanged(dense, experts, top_k, width) -> None:
    grown = hot_start(dense, experts=experts, top_k=top_k, expert_width=width, seed=0)
    ids = torch.randint(0, 64, (2, 20))
    assert_near(grown(ids).logits, dense(ids).logits)


def test_experts_share_out_the_neurons_and_the_router_is_random(dense) -> None:
    """Four experts of 12 neurons use each of the 48 neurons once, in a different order per layer.

    Eight experts of 12 neurons use each neuron twice.
    """
    grown = hot_start(dense, experts=4, top_k=1, expert_width=12, seed=0)
    orders = []
    for layer, source in zip(grown.model.layers, dense.model.layers, strict=True):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        rows = (gate.flatten(0, 1)[:, None] == source.mlp.gate_proj.weight).all(-1).nonzero()
        assert rows[:, 0].tolist() == list(range(48))
        assert sorted(rows[:, 1].tolist()) == list(range(48))
        assert torch.equal(up.flatten(0, 1), source.mlp.up_proj.weight[rows[:, 1]])
        assert layer.mlp.experts.down_proj.count_nonzero() == 0
        assert layer.mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)
        orders.append(rows[:, 1].tolist())
    assert orders[0] != orders[1] != list(range(48))
    twice = hot_start(dense, experts=8, top_k=1, expert_width=12, seed=0).model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(twice[:4].flatten().sort().values, twice[4:].flatten().sort().values)


def test_experts_diverge_and_share_the_load(dense) -> None:
    grown = hot_start(dense, experts=4, top_k=1, expert_width=12, seed=0).train()
    optimizer = torch.optim.AdamW(grown.parameters(), lr=3e-3)
    data = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    for _ in range(50):
        output = grown(data, labels=data, output_router_logits=True)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, load in zip(grown.model.layers, output.router.load):
        down = layer.mlp.experts.down_proj
        assert load.min() > 0.05, load
        for a in range(4):
            assert down[a].norm() > 0.05
            for b in range(a):
                cosine = torch.nn.functional.cosine_similarity(down[a].flatten(), down[b].flatten(), dim=0)
                assert cosine < 0.9, (a, b, cosine)


def test_a_width_that_does_not_divide_is_refused(dense) -> None:
    with pytest.raises(UserError, match="expert_width 13 does not divide"):
        hot_start(dense, experts=4, top_k=1, expert_width=13, seed=0)


@pytest.mark.parametrize(
    "lora", [Lora(rank=2, train_router=True), Lora(rank=2, experts=False, train_router=True), Lora(rank=2)]
)
def test_merged_adapters_compute_what_the_wrapped_model_computes(dense, lora) -> None:
    model = add_lora(hot_start(dense, experts=4, top_k=1, expert_width=12, seed=0), lora, task="CAUSAL_LM")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(0, 64, (2, 20))
    wrapped = model.eval()(ids).logits
    with model.disable_adapter():
        assert_near(model(ids).logits, dense(ids).logits)
    assert (wrapped - dense(ids).logits).abs().max() > 1e-3
    assert_near(merge_lora(model)(ids).logits, wrapped)


def test_a_llama_without_biases_is_read_from_its_folder(dense, tmp_path) -> None:
    dense.save_pretrained(tmp_path)
    assert torch.equal(load_dense(tmp_path).lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"mlp_bias": True}, {"model_type": "mistral"}])
def test_another_dense_model_is_refused(dense, tmp_path, change) -> None:
    dense.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match="or a Llama model without biases"):
        load_dense(tmp_path)


@pytest.fixture
def qwen(tmp_path):
    from tests.tiny_families import save_tiny

    return save_tiny("qwen3", tmp_path / "qwen")


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (6, 3)])
def test_an_upcycled_qwen3_computes_the_same_function(qwen, experts, top_k) -> None:
    grown = upcycle(qwen, experts=experts, top_k=top_k, expert_width=None, seed=0)
    ids = torch.randint(5, 500, (2, 20))
    assert_near(grown(ids).logits, qwen(ids).logits)
    routers = [layer.mlp.gate.weight for layer in grown.model.layers]
    assert not torch.equal(routers[0], routers[1])
    assert routers[0].std().item() == pytest.approx(0.1, rel=0.2)


def test_the_experts_of_an_upcycled_qwen3_diverge(qwen) -> None:
    grown = upcycle(qwen, experts=4, top_k=2, expert_width=None, seed=0)
    grown(torch.randint(5, 500, (2, 20))).logits.logsumexp(-1).sum().backward()
    gradient = grown.model.layers[0].mlp.experts.down_proj.grad
    assert all((gradient[0] - other).abs().max() > 1e-6 for other in gradient[1:])
    assert grown.model.layers[0].mlp.gate.weight.grad.abs().max() == pytest.approx(
        0, abs=1e-5
    )  # equal experts at first


def test_qwen3_is_found_by_its_checkpoint(qwen, tmp_path) -> None:
    assert type(load_dense(tmp_path / "qwen")).__name__ == "Qwen3ForCausalLM"


def test_the_cache_folder_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", "~/converted")
    assert cache_dir() == Path.home() / "converted"
    monkeypatch.setenv("ALIGN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/align")
