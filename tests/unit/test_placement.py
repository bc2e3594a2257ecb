"""Every pass on a pretend GPU: no operation mixes devices, the host seldom waits, the values are those of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.models import routing
from align.train.learner import clip_and_step
from tests import pretend_passes
from tests.near import assert_near
from tests.pretend_device import CUDA, Counted, PretendDevice, PretendTensor
from tests.pretend_passes import PASSES, count
from tests.unit.parallel.started import run_ranks

DTYPES = [torch.float32, torch.bfloat16]
LAYERS = 2
SYNCS = dict.fromkeys(("policy update, expert capacity", "SFT, expert capacity"), 1 + LAYERS)
"""Waits of the host in bf16: one for the metrics, and one per layer whose free slots are drawn at random."""
RESULTS = {"policy, before the update": 2, "reference": 1, "critic, before the update": 1, "reward model": 1}
"""Copies of results to the host in a pass without an update."""


# --- the pretend device itself ----------------------------------------------------------------------------------------


def counted_in(run: Any) -> Counted:
    """Counts of run(device)."""
    with PretendDevice() as device, device.counting() as counted:
        run(device)
    return counted


def test_a_tensor_says_that_it_is_on_the_gpu() -> None:
    with PretendDevice():
        for tensor in (torch.ones(2, device="cuda"), torch.arange(3).to(CUDA), torch.tensor([1.0], device=CUDA)):
            assert isinstance(tensor, PretendTensor)
            assert tensor.device == CUDA
            assert tensor.is_cuda
            assert torch.zeros_like(tensor).is_cuda
            assert tensor.new_zeros(3).is_cuda
            assert not tensor.cpu().is_cuda
        assert not torch.ones(2).is_cuda


def test_pinned_uploads_are_counted_after_a_cpu_worker_of_vllm_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces `Tensor.pin_memory` for the whole process."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    counted = counted_in(lambda device: torch.ones(3).pin_memory().to(CUDA, non_blocking=True)).totals()
    assert counted["uploads"] == 1
    assert not counted["blocking_uploads"]


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("mixes", lambda x: x + torch.ones(3)),
        ("mixes", lambda x: torch.cat([x, torch.ones(())[None]])),
        ("mixes", lambda x: torch.ones(3).index_select(0, x.long())),
        ("mixes", lambda x: x.index_select(0, torch.zeros(1, dtype=torch.long))),
        ("syncs", lambda x: x.sum().item()),
        ("syncs", lambda x: x.tolist()),
        ("syncs", lambda x: bool(x.sum() > 0)),
        ("syncs", lambda x: x[x > 0]),
        ("syncs", lambda x: x.cpu()),
        ("syncs", lambda x: torch.ones(3).copy_(x)),
        ("syncs", lambda x: x.long().repeat_interleave(x.long())),
        ("uploads", lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True)),
        ("uploads and blocking_uploads", lambda x: torch.ones(3).to(CUDA)),
        ("uploads and blocking_uploads", lambda x: torch.ones(3).to(CUDA, non_blocking=True)),
        ("uploads and blocking_uploads", lambda x: x.copy_(torch.ones(3))),
        ("uploads and blocking_uploads", lambda x: x[torch.tensor([0, 1])]),
    ],
)
def test_each_kind_is_counted(kind: str, run: Any) -> None:
    counted = counted_in(lambda device: run(device.tensor(torch.ones(3)))).totals()
    del counted["launches"]
    expected = dict.fromkeys(counted, 0) | dict.fromkeys(kind.split(" and "), 1)
    assert counted == expected


def test_what_a_gpu_accepts_is_not_counted() -> None:
    """Scalars beside tensors, an expansion of known length, a mask that selects nothing, and the backward pass."""

    def run(device: PretendDevice) -> None:
        x = nn.Parameter(device.tensor(torch.ones(3)))
        y = torch.where(x > 0, x * torch.tensor(2.0), 0.0) + 1
        y.detach()[x > 5] = 0.0
        y.repeat_interleave(torch.full((3,), 2, device=CUDA), output_size=6).sum().backward()
        assert isinstance(x.grad, PretendTensor)
        assert x.grad.values_on_cpu.tolist() == [4.0, 4.0, 4.0]

    totals = counted_in(run).totals()
    assert totals.pop("launches") > 5
    assert set(totals.values()) == {0}


def test_launches_are_operations_that_compute() -> None:
    def run(device: PretendDevice) -> None:
        x = device.tensor(torch.ones(4, 4))
        (x.T[1:] @ x).view(-1).add_(1)  # views launch nothing
        torch.empty_like(x)

    assert counted_in(run).totals()["launches"] == 2


# --- the passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_no_operation_mixes_devices(name: str, dtype: torch.dtype) -> None:
    counted = count(PASSES[name], dtype, LAYERS)
    assert not counted.mixes
    assert counted.launches.total() > 100
    assert not counted.blocking_uploads
    if dtype == torch.bfloat16:
        assert counted.syncs.total() == SYNCS.get(name, RESULTS.get(name, 1)), counted.syncs
    else:  # the loop over experts needs the token counts on the host
        assert counted.syncs.total() <= SYNCS.get(name, RESULTS.get(name, 1)) + LAYERS, counted.syncs


@pytest.mark.slow
@pytest.mark.distributed
def test_expert_parallelism_mixes_no_devices_and_waits_once_per_layer(tmp_path: Path) -> None:
    run_ranks("pretend_ranks.py", 2, tmp_path, forks=True)
    for rank in range(2):
        for found in json.loads((tmp_path / f"rank-{rank}.json").read_text()):
            assert found["mixes"] == []
            assert found["totals"]["syncs"] == found["layers"] + 2  # the metrics, and their sum over the ranks


def gradients(build: Any, dtype: torch.dtype, device: Any) -> list[Tensor]:
    """Gradients of a policy update."""
    models: list[nn.Module] = []
    module = device.module
    device.module = lambda model: models.append(module(model)) or models[-1]
    run = build(device, dtype, LAYERS)
    torch.manual_seed(1)
    run()
    found = [p.grad for p in models[0].parameters() if p.grad is not None]
    return [grad.values_on_cpu if isinstance(grad, PretendTensor) else grad for grad in found]


class Cpu:
    """Stand-in for the pretend device that leaves everything on the CPU."""

    def module(self, module: nn.Module) -> nn.Module:
        return module


@pytest.mark.parametrize("name", [name for name in PASSES if "update" in name and "before" not in name])
def test_gradients_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal gradients show that the whole pass runs on the pretend device. Its attention and, in bf16, its grouped
    matrix products take the CUDA branches, so the gradients differ by rounding."""
    with PretendDevice() as device:
        found = gradients(PASSES[name], torch.float32, device)
    monkeypatch.setattr(pretend_passes, "CUDA", torch.device("cpu"))
    expected = gradients(PASSES[name], torch.float32, Cpu())
    assert len(found) == len(expected) > 10
    for gradient, wanted in zip(found, expected, strict=True):
        assert_near(gradient, wanted, units=2048)


def test_an_optimizer_step_waits_once() -> None:
    """The host waits for the gradient norm, which decides whether the step is made."""

    def run(device: PretendDevice) -> None:
        model = device.module(nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters())
        model(device.tensor(torch.ones(1, 3))).sum().backward()
        assert clip_and_step(model, optimizer, 0.5) == pytest.approx(8**0.5)  # six weights and two biases

    assert counted_in(run).totals()["syncs"] == 1


# --- faults that the passes notice ------------------------------------------------------------------------------------


def test_a_tensor_left_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    report = routing.report_routing
    monkeypatch.setattr(
        "align.models.hunyuan.modeling.report_routing",
        lambda routings, mask: report(routings, torch.ones(len(mask))),
    )
    assert count(PASSES["policy update"], torch.bfloat16, LAYERS).mixes


def test_indices_left_on_the_cpu_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.models.packing.indices_to_device", lambda indices, device: indices)
    assert count(PASSES["policy update"], torch.bfloat16, LAYERS).mixes


def test_lengths_on_the_gpu_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.data.experience.ON_THE_HOST", ())
    counted = count(PASSES["reward model"], torch.bfloat16, LAYERS)
    assert counted.syncs.total() > RESULTS["reward model"]
