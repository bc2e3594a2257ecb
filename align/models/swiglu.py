"""The gated activation act(gate) * up, with an explicit backward pass for SiLU.

The operation is bound by memory bandwidth. silu(gate) is recomputed in the backward pass instead of stored. If gate and
up are halves of one tensor, their gradients are written into the halves of one tensor, which saves a concatenation.

Shapes: F width of gate, up and the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

Activation = Callable[[Tensor], Tensor]


def gated(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up."""
    return _GatedSilu.apply(gate, up) if _is_silu(act) and gate.dtype == up.dtype else act(gate) * up


def gated_halves(act: Activation, gate_up: Tensor) -> Tensor:
    """act(gate) * up [..., F]; `gate_up` [..., 2F] is gate and up, concatenated in the last dimension."""
    if _is_silu(act):
        product: Tensor = _GatedSiluOfHalves.apply(gate_up)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate) * up


def _is_silu(act: Activation) -> bool:
    return isinstance(act, SiLUActivation | nn.SiLU)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate).mul_(up)


def _write_gradients(grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write d_up = silu(gate) * grad and d_gate = silu'(gate) * up * grad; `d_up` first holds up * grad."""
    torch.mul(grad, up, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_up, gate, grad_input=d_gate)
    torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _write_gradients(grad, gate, up, d_gate, d_up)
        return d_gate, d_up


class _GatedSiluOfHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _product(*gate_up.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        _write_gradients(grad, *gate_up.chunk(2, dim=-1), *gradient.chunk(2, dim=-1))
        return gradient
