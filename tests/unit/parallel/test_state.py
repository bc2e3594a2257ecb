"""Resuming creates AdamW's state before the first step; it must look like the state that AdamW itself creates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from align.config.parts import Optimizer
from align.parallel.state import set_adam_steps
from align.train.optimizer import build_optimizer


def optimizer_on(device: str) -> tuple[Any, nn.Parameter]:
    model = nn.Module()
    model.flat = nn.Parameter(torch.zeros(7, device=device))
    return build_optimizer(model, Optimizer()), model.flat


def layout(state: dict[str, Any]) -> dict[str, Any]:
    return {name: (value.device, value.dtype, tuple(value.shape)) for name, value in state.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("attribute", ["fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", None])
def test_a_resumed_state_has_the_layout_of_a_stepped_one(device: str, attribute: str | None) -> None:
    """Fake tensors have a device but no memory, so this needs no GPU."""
    with FakeTensorMode():
        stepped, flat = optimizer_on(device)
        flat.grad = torch.zeros_like(flat)
        stepped.step()
        expected = layout(stepped.state[flat])

        resumed, flat = optimizer_on(device)
        zero = SimpleNamespace(optimizer=resumed, **{attribute: [flat]}) if attribute else resumed
        set_adam_steps(SimpleNamespace(optimizer=zero), 5)
        assert layout(resumed.state[flat]) == expected
    assert expected["step"][0].type == device
