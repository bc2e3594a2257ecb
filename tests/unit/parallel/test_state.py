"""The training state of sharded runs: the AdamW state that a resume creates, and the files of a checkpoint."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from align.config.parts import Optimizer
from align.parallel.state import set_adam_steps, write_parts
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
    """AdamW creates its state in its first step. Fake tensors have a device but no memory, so this needs no GPU."""
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


def test_a_file_holds_what_was_written_and_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """safetensors itself reads the file."""
    expected = {f"weight:{'x' * n}@{n}": torch.randn(n) for n in (1, 2, 5, 1000)} | {"empty": torch.empty(0)}
    alive: list[weakref.ref[numpy.ndarray]] = []

    def read(name: str) -> Tensor:
        assert [copy for copy in alive if copy() is not None] == []
        copy = expected[name].numpy().copy()
        alive.append(weakref.ref(copy))  # the tensor's memory belongs to the array
        return torch.from_numpy(copy)

    write_parts(tmp_path / "state", [(name, len(t), lambda n=name: read(n)) for name, t in expected.items()])
    assert int.from_bytes((tmp_path / "state").read_bytes()[:8], "little") % 8 == 0  # the first tensor is aligned
    found = load_file(tmp_path / "state")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert len(alive) == len(expected)
    write_parts(tmp_path / "none", [])
    assert load_file(tmp_path / "none") == {}


def test_views_of_other_types_are_written_as_flat_float32(tmp_path: Path) -> None:
    values = torch.arange(8.0, dtype=torch.bfloat16, requires_grad=True)
    write_parts(tmp_path / "state", [("strided", 4, lambda: values[::2])])
    assert load_file(tmp_path / "state")["strided"].tolist() == [0.0, 2.0, 4.0, 6.0]
    with pytest.raises(ValueError, match="'short' has 8 elements instead of 4"):
        write_parts(tmp_path / "state", [("short", 4, lambda: values)])
