"""vLLM's kernels, called as the vLLM model calls them, against the formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("vllm")

from vllm import _custom_ops as kernels
from vllm.platforms import current_platform

from align.models.hunyuan import HunYuanConfig
from align.models.hunyuan.rope import inverse_frequencies
from align.models.hunyuan.vllm_kernels import (
    BLOCK,
    RMSNorm,
    Rotation,
    fused_experts,
    has_fused_experts,
    in_rows,
    rms_norm,
)
from tests.near import assert_near

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="kernels of vLLM's CPU build")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    current_platform.import_kernels()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 96), (3, 32, 32)])
def test_experts_are_stored_in_the_kernels_order(dtype, shape) -> None:
    matrices = normal(*shape).to(dtype)
    stored = torch.empty_like(matrices)
    in_rows(stored).copy_(matrices.unflatten(1, (-1, BLOCK)))
    assert torch.equal(stored, kernels.cpu_prepack_moe_weight(matrices, "vec"))
    assert torch.equal(in_rows(stored).flatten(1, 2), matrices)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (300, 1)])
def test_fused_experts_are_the_weighted_sum_of_each_tokens_experts(tokens, top_k) -> None:
    experts, hidden, width = 4, 32, 64
    gate_up, down = normal(experts, 2 * width, hidden) * 0.2, normal(experts, hidden, width) * 0.2
    stored = [torch.empty_like(m) for m in (gate_up, down)]
    for target, matrices in zip(stored, (gate_up, down), strict=True):
        in_rows(target).copy_(matrices.unflatten(1, (-1, BLOCK)))
    x, weights = normal(tokens, hidden), normal(tokens, top_k).sigmoid()
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    found = fused_experts(x, chosen, weights, *stored)
    for token in range(tokens):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            expected += weight * (down[expert].double() @ (silu(gate) * up))
        assert_near(found[token], expected)


def test_the_kernel_is_used_for_the_shapes_that_it_supports() -> None:
    config = HunYuanConfig(hidden_size=64, num_attention_heads=2)
    assert has_fused_experts(config, 32)
    assert not has_fused_experts(config, 48)
    assert not has_fused_experts(HunYuanConfig(hidden_size=48, num_attention_heads=2), 32)
    assert not has_fused_experts(HunYuanConfig(hidden_size=64, num_attention_heads=2, hidden_act="gelu"), 32)


def test_norms_take_parts_of_rows_and_add_in_place() -> None:
    rows = normal(5, 96)
    part, weight = rows[:, 16:80].unflatten(1, (2, 32)), normal(32)
    wide = part.double()
    unit = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_near(rms_norm(part, None, 1e-3), unit)
    assert_near(rms_norm(part, weight, 1e-3), unit * weight.double())
    norm = RMSNorm(96, 1e-3)
    norm.weight.data.copy_(normal(96))
    x, residual = normal(5, 96) + 1, rows.clone()
    total = (x.double() + rows.double()).float()
    found = norm.add(x, residual)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(found, norm(total))


def test_rotation_is_a_multiplication_by_a_complex_number() -> None:
    config = HunYuanConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    rows, positions = normal(5, 32 * 3 + 7), torch.tensor([0, 3, 1, 11, 3])
    query, key = rows[:, 3:67], rows[:, 67:99]
    before = rows.clone().double()
    Rotation(config, 12, torch.float32)(positions, query, key)
    turn = torch.polar(torch.ones(5, 16), positions[:, None] * inverse_frequencies(config)).to(torch.complex128)
    for first in (3, 35, 67):
        low, high = before[:, first : first + 32].chunk(2, dim=1)
        turned = torch.complex(low, high) * turn
        expected = torch.cat((turned.real, turned.imag), dim=1)
        assert_near(rows[:, first : first + 32], expected)
    untouched = [0, 1, 2, *range(99, 103)]
    assert torch.equal(rows[:, untouched].double(), before[:, untouched])


def test_the_engines_head_computes_fp32_logits_from_bf16() -> None:
    """Each logit is a sum of 64 exact products. Rounding it to bf16 would cause a relative error of up to 0.4 %."""
    from align.models.hunyuan.vllm import LiveHead

    hidden, weight = normal(3, 64).bfloat16(), normal(700, 64).bfloat16()
    logits = LiveHead().apply(SimpleNamespace(weight=weight), hidden)
    assert logits.dtype == torch.float32
    assert_near(logits, hidden.double() @ weight.double().T, units=8)
