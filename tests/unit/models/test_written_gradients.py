"""Explicit backward passes against the formulas under autograd, and against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from align.models import short_attention
from align.models.hunyuan.norm import RMSNorm, _RmsNorm, _UnitRms, unit_rms
from align.models.hunyuan.rope import _Rotation, rotate, rotation_tables
from align.models.short_attention import LONGEST, _ShortAttention, causal_attention
from align.models.swiglu import _GatedSilu, _GatedSiluOfHalves, gated, gated_halves
from tests.near import assert_near

EPS = 1e-3
"""Large enough to change the results visibly."""


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    ).requires_grad_()


def test_norm_gradients_equal_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x: _UnitRms.apply(x, EPS), (doubles(2, 3, 5),))
    assert torch.autograd.gradcheck(lambda x, weight: _RmsNorm.apply(x, weight, EPS), (doubles(2, 3, 5), doubles(5)))


def test_rotation_gradients_equal_finite_differences() -> None:
    cos, sin = (t.double() for t in tables(torch.float32))
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cos, sin), (doubles(2, 3, 4, 6),))


def test_gated_silu_gradients_equal_finite_differences() -> None:
    assert torch.autograd.gradcheck(_GatedSilu.apply, (doubles(2, 3, 5), doubles(2, 3, 5) + 1))
    assert torch.autograd.gradcheck(_GatedSiluOfHalves.apply, (doubles(3, 6),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated_activations_equal_autograds_bit_for_bit(dtype, act) -> None:
    gate_up = doubles(7, 10).detach().to(dtype).requires_grad_()
    upstream = doubles(2, 7, 5).detach()[0].to(dtype)
    act = ACT2FN[act]
    gate, up = gate_up.chunk(2, dim=-1)
    found = []
    for product in (act(gate) * up, gated_halves(act, gate_up), gated(act, gate, up)):
        (gradient,) = torch.autograd.grad(product, gate_up, upstream)
        found.append((product, gradient))
    for product, gradient in found[1:]:
        assert torch.equal(product, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_short_attention_gradients_equal_finite_differences() -> None:
    query, key, value = doubles(2, 4, 5, 3), doubles(2, 2, 5, 3) + 1, doubles(2, 2, 5, 3) - 1
    assert torch.autograd.gradcheck(lambda *x: _ShortAttention.apply(*x, 0.7), (query, key, value))


@pytest.mark.parametrize("tokens", [1, 7, LONGEST, LONGEST + 1])
def test_attention_is_causal_grouped_attention(tokens) -> None:
    """Short sequences use our backward pass, longer ones torch's kernel."""
    heads, kv_heads, size = 4, 2, 8
    # As in `Packing`, the tensors have the token dimension before the head dimension in memory.
    shapes = [(2, tokens, h, size) for h in (heads, kv_heads, kv_heads)]
    query, key, value = ((doubles(*shape).detach() + i).float() for i, shape in enumerate(shapes))
    query.requires_grad_()
    found = causal_attention(*(x.transpose(1, 2) for x in (query, key, value)), scaling=0.3, dropout=0.0)
    assert ("_ShortAttention" in type(found.grad_fn).__name__) == (tokens <= LONGEST)
    for head in range(heads):
        own = (x[:, :, h].double() for x, h in ((query, head), (key, head // 2), (value, head // 2)))
        q, k, v = own
        scores = 0.3 * torch.einsum("bqd,bkd->bqk", q, k)
        hidden = torch.ones(tokens, tokens).triu(1).bool()
        expected = torch.einsum("bqk,bkd->bqd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        assert_near(found[:, head], expected)


@pytest.mark.parametrize(
    ("device", "dtype", "grouped"),
    [
        ("meta", torch.float32, False),
        ("meta", torch.bfloat16, True),
        ("cpu", torch.float32, True),
        ("cpu", torch.bfloat16, True),
    ],
)
def test_key_heads_are_repeated_in_float32_off_the_cpu(monkeypatch, device, dtype, grouped) -> None:
    """The meta device stands for a GPU, where torch would store the T x T weights for float32 with `enable_gqa`."""
    calls = []

    def kernel(query, key, value, **options):
        calls.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(short_attention, "scaled_dot_product_attention", kernel)
    shapes = [(2, heads, LONGEST + 1, 8) for heads in (6, 2, 2)]
    found = causal_attention(
        *(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes), scaling=1, dropout=0
    )
    assert found.shape == shapes[0]
    assert calls == [(2, 2, True) if grouped else (6, 6, False)]


def test_repeated_key_heads_are_those_of_their_group(monkeypatch) -> None:
    query, key, value = (doubles(1, heads, LONGEST + 1, 4).detach().float() + heads for heads in (4, 2, 2))
    grouped = causal_attention(query, key, value, scaling=0.3, dropout=0.0)
    monkeypatch.setattr(short_attention, "repeats_heads", lambda query: True)
    assert_near(causal_attention(query, key, value, scaling=0.3, dropout=0.0), grouped, units=32)


def tables(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 7]])
    return rotation_tables(torch.tensor([1.0, 0.3, 0.01]), positions, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_formula(dtype) -> None:
    x, weight = (doubles(*shape).detach().to(dtype).requires_grad_() for shape in ((2, 3, 8), (8,)))
    wide = x.double()
    unit = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    module = RMSNorm(8, EPS).to(dtype)
    module.weight.data.copy_(weight.data)
    for found, expected in ((unit_rms(x, EPS), unit), (module(x), unit * weight.double())):
        assert found.dtype == dtype
        assert_near(found, expected, units=8)
    d_x, d_weight = torch.autograd.grad((module(x).float() * 2).square().sum(), (x, module.weight))
    e_x, e_weight = torch.autograd.grad((unit * weight.double() * 2).square().sum(), (x, weight))
    assert_near(d_x, e_x, units=16)
    assert_near(d_weight, e_weight, units=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_is_a_multiplication_by_a_complex_number(dtype) -> None:
    x = doubles(2, 3, 4, 6).detach().to(dtype)
    angles = torch.tensor([[0.0, 1, 2, 3], [0, 1, 0, 7]])[:, None, :, None] * torch.tensor([1.0, 0.3, 0.01])
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles.double()), angles.double())
    found = rotate(x, *tables(dtype))
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert_near(found, expected, units=8)
