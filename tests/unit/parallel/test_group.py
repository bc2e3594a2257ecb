"""Joining the process group on simulated GPUs: torch.cuda and torch.distributed are patched to record calls."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from align.errors import UserError
from align.launch.devices import own_gpu
from align.parallel import group
from align.train.device import training_device

HALF_AN_HOUR = timedelta(minutes=30)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Function that makes torch report `count` GPUs and returns the list of devices passed to `set_device`."""

    def show(count: int) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"uuid-{gpu.index}"))
        return current

    return show


@pytest.mark.parametrize(("visible", "local", "index"), [(8, "3", 3), (1, "3", 0), (1, "0", 0), (4, "3", 3)])
def test_a_rank_uses_the_gpu_of_its_number_or_the_only_one_that_it_sees(
    gpus, monkeypatch, visible: int, local: str, index: int
) -> None:
    """With Slurm's --gpus-per-task a rank sees one GPU. LOCAL_RANK, which the libraries read, is then set to 0."""
    current = gpus(visible)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", local)
    assert training_device() == torch.device("cuda", index)
    assert group.claim_gpu() == training_device() == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]
    assert dist.get_node_local_rank() == index
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(index)  # DeepSpeed requires the two variables to be equal


def test_a_process_without_a_launcher_uses_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_gpu(8) == own_gpu(1) == 0


@pytest.fixture
def joined(gpus, monkeypatch: pytest.MonkeyPatch):
    """Function that connects rank 3 of `ranks` and returns the calls that create groups and compare the ranks."""
    calls: list[tuple[str, Any]] = []

    def exchange(own: Any) -> list[Any]:
        calls.append(("exchange", own))
        return [own] if isinstance(own, dict) else ["uuid-0 of a", "uuid-1 of a", "uuid-0 of b", own]

    def connect(gpu: torch.device | None, ranks: int) -> list[tuple[str, Any]]:
        gpus(8)
        store = dist.HashStore()
        monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 3, ranks)]))
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: calls.append((backend, given)))
        for name in ("barrier", "destroy_process_group"):
            monkeypatch.setattr(dist, name, lambda: None)
        for name in ("choose_interface", "mark_joined"):
            monkeypatch.setattr(group, name, lambda *_: None)
        monkeypatch.setattr(group, "exchange", exchange)
        group.connect({"the recipe": "same"}, gpu)
        return calls

    return connect


def test_nccl_starts_with_its_device_and_a_time_limit_after_the_ranks_are_compared(joined) -> None:
    gpu = torch.device("cuda", 3)
    calls = joined(gpu, 4)
    assert [kind for kind, _ in calls] == ["gloo", "exchange", "exchange", "nccl"]
    assert calls[1][1]["the device (GPU or CPU)"] == "GPU"
    nccl = calls[-1][1]
    assert (nccl["device_id"], nccl["timeout"]) == (gpu, HALF_AN_HOUR)


def test_one_rank_needs_no_device_for_nccl(joined) -> None:
    """With `device_id`, torch would split NCCL's communicator for each new group, which needs a second rank."""
    assert joined(torch.device("cuda", 0), 1)[-1][1]["device_id"] is None


def test_gloo_has_no_device(joined) -> None:
    calls = joined(None, 4)
    assert [kind for kind, _ in calls] == ["gloo", "exchange", "gloo"]
    assert (calls[-1][1]["device_id"], calls[-1][1]["timeout"]) == (None, HALF_AN_HOUR)


def test_two_ranks_on_one_gpu_are_refused(joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group.socket, "gethostname", lambda: "a")
    with pytest.raises(UserError, match="ranks 1 and 3 both use the GPU uuid-1 of a; start at most one process"):
        joined(torch.device("cuda", 1), 4)


def test_groups_that_deepspeed_creates_have_the_same_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default time limit for NCCL is ten minutes, and DeepSpeed's `new_group` passes no time limit."""
    import deepspeed

    seen: list[Any] = []
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **given: seen.append(given["timeout"]))
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout=None: seen.append((ranks, timeout)))
    group.start_deepspeed("gloo")
    deepspeed.comm.new_group([0, 1])
    assert seen == [HALF_AN_HOUR, ([0, 1], HALF_AN_HOUR)]
