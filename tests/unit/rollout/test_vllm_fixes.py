"""vLLM's own layers compute what transformers computes; each test fails without one correction of `vllm_fixes`."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload, record_metadata_for_reloading
from vllm.model_executor.models.transformers.base import Base
from vllm.platforms import current_platform

from align.rollout import vllm_fixes
from align.rollout.vllm_fixes import (
    apply,
    copy_apart,
    is_copied_apart,
    name_partial_loaders,
    weights_for_loaders,
)

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="the correction is of vLLM's CPU build")


@pytest.fixture(autouse=True)
def fixed() -> None:
    apply()
    apply()  # a no-op


def test_the_transformers_backend_leaves_transformers_classes_alone() -> None:
    class Decoder(nn.Module):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None) -> int:
            return 1

    before = dict(vars(Decoder))
    backend = Base.__new__(Base)
    nn.Module.__init__(backend)
    object.__setattr__(backend, "_pre_trained_model_classes", SimpleNamespace(decoder=Decoder))
    backend._decorate_for_torch_compile()
    assert dict(vars(Decoder)) == before
    assert Decoder()() == 1


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_routers_choose_by_biased_scores(scores: str) -> None:
    """The bias moves the choice from the experts 3 and 2 to 0 and 3; weights are the unbiased scores."""
    logits = torch.tensor([[0.0, 0.5, 1.0, 2.0]])
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    router = CPURouter(top_k=2, global_num_experts=4, scoring_func=scores, e_score_correction_bias=bias)
    weights, experts = router._compute_routing(torch.zeros(1, 8), logits, None)
    chosen = dict(zip(experts[0].tolist(), weights[0].tolist()))
    probabilities = logits.softmax(-1)[0] if scores == "softmax" else 1 / (1 + torch.exp(-logits[0]))
    total = float(probabilities[0] + probabilities[3])
    assert chosen == pytest.approx({0: float(probabilities[0]) / total, 3: float(probabilities[3]) / total})


@on_cpu
@pytest.mark.parametrize("neox", [True, False])
def test_parts_of_heads_are_rotated(neox: bool) -> None:
    tokens, heads, size = 5, 3, 32
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        rope = get_rope(
            size,
            64,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            is_neox_style=neox,
            dtype=torch.float32,
        )
    # Latent attention rotates a part of each head, which is not contiguous.
    query, positions = torch.randn(tokens, heads, size), torch.arange(tokens)
    expected = query.clone()
    for token in range(tokens):
        for pair in range(size // 2):
            a, b = (pair, pair + size // 2) if neox else (2 * pair, 2 * pair + 1)
            angle = torch.tensor(token * 100.0 ** (-2 * pair / size))
            x, y = query[token, :, a], query[token, :, b]
            expected[token, :, a] = x * angle.cos() - y * angle.sin()
            expected[token, :, b] = y * angle.cos() + x * angle.sin()
    rotated, key = rope.forward_cpu(positions, part_of_wider(query), part_of_wider(query[:, :1]))
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key, expected[:, :1], rtol=1e-5, atol=1e-5)
    flat, _ = rope.forward_cpu(positions, query.flatten(1).clone(), query[:, 0].clone())
    torch.testing.assert_close(flat.view_as(query), expected, rtol=1e-5, atol=1e-5)


def part_of_wider(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a part of a tensor whose last dimension is twice as large."""
    return torch.cat((torch.zeros_like(tensor), tensor), -1)[..., tensor.shape[-1] :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_has_parameters_of_the_models_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
            activation = XIELU()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (activation.alpha_p.dtype, activation.alpha_n.dtype, activation.beta.dtype) == (dtype,) * 3


def test_a_reload_accepts_loaders_that_are_partial_functions() -> None:
    layer = nn.Linear(2, 3)
    layer.weight.weight_loader = functools.partial(lambda param, loaded_weight, scale: None, scale=2)
    record_metadata_for_reloading(layer)
    name_partial_loaders(layer)
    initialize_layerwise_reload(layer)
    assert layer.weight.is_meta


def test_experts_of_gpt_oss_are_sent_one_by_one() -> None:
    stack = torch.arange(24.0).view(2, 3, 4)
    name = "model.layers.7.mlp.experts.gate_up_proj"
    found = dict(weights_for_loaders("gpt_oss", name, stack))
    assert list(found) == [f"model.layers.7.mlp.experts.{expert}.gate_up_proj" for expert in (0, 1)]
    assert torch.equal(torch.stack(list(found.values())), stack)
    router = "model.layers.7.mlp.router.weight"
    assert [n for n, _ in weights_for_loaders("gpt_oss", router, stack)] == [router]
    assert [n for n, _ in weights_for_loaders("qwen3_moe", name, stack)] == [name]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_copies_the_sinks_of_its_heads(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: rank)
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.sinks = nn.Parameter(torch.zeros(2), requires_grad=False)
    layers = nn.ModuleDict({"3": model})
    assert is_copied_apart("gpt_oss", "3.self_attn.sinks")
    assert not is_copied_apart("llama", "3.self_attn.sinks")
    copy_apart(layers, "3.self_attn.sinks", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert model.attn.sinks.tolist() == [[1.0, 2.0], [3.0, 4.0]][rank]


def test_corrections_call_vllms_own_methods_once() -> None:
    assert not hasattr(CPURouter.__init__.align_original, "align_original")
    assert {"apply", "use_router_bias"} <= set(vars(vllm_fixes))
