"""Placement of started servers on a run's GPUs, and the address at which servers reach the trainer."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.cli import parse
from align.config.rollout import Rollout
from align.errors import UserError
from align.launch.route import route_to
from align.recipes import ppo
from align.rollout import placement
from align.rollout.build import require_placement
from align.rollout.placement import Gpus, Placement, place_servers
from align.rollout.server import Server
from align.rollout.started_server import StartedServer
from align.rollout.sync.gpu_transfer import own_address

FOUR = ["4", "5", "6", "7"]


def started(servers: int = 1, **settings) -> Rollout:
    return Rollout(engine="remote", start_servers=servers, **settings)


def devices(rollout: Rollout, gpus: Gpus) -> list[list[str] | None]:
    return [place.devices for place in place_servers(rollout, gpus)]


def test_servers_take_the_last_gpus() -> None:
    assert devices(started(2), Gpus(FOUR, ranks=2)) == [["7"], ["6"]]
    assert devices(started(tensor_parallel_size=2), Gpus(FOUR)) == [["6", "7"]]
    assert devices(started(3), Gpus([])) == [None] * 3


def test_a_server_of_ipc_is_on_the_gpu_of_rank_0() -> None:
    """An IPC handle opens only on the GPU that created it, so this server cannot use the last GPU."""
    rollout = started(weight_transfer="ipc", cache_gib=4.0)
    assert place_servers(rollout, Gpus(FOUR, ranks=1)) == [Placement(["4"], nccl=False)]
    assert place_servers(rollout, Gpus(FOUR, ranks=4, own=2)) == [Placement(["6"], nccl=False)]


@pytest.mark.parametrize(
    ("rollout", "gpus"),
    [
        (started(), Gpus(FOUR, ranks=4)),
        (started(2), Gpus(FOUR, ranks=3)),
        (started(), Gpus(["0"])),
        (started(weight_transfer="ipc"), Gpus(FOUR)),
        (started(tensor_parallel_size=4), Gpus(FOUR)),
    ],
)
def test_a_server_beside_a_rank_needs_a_size_of_its_cache(rollout: Rollout, gpus: Gpus) -> None:
    with pytest.raises(UserError, match=r"^rollout\.cache_gib: GPU \d has a rank of the run and a server, which takes"):
        place_servers(rollout, gpus)
    sized = rollout.model_copy(update={"cache_gib": 8.0})
    assert len(place_servers(sized, gpus)) == rollout.start_servers


def test_nccl_needs_another_gpu_than_that_of_rank_0() -> None:
    """Another rank's GPU is fine: rank 0 and the server are the only members of the communicator."""
    rollout = started(weight_transfer="nccl", cache_gib=4.0)
    assert devices(rollout, Gpus(FOUR, ranks=4)) == [["7"]]
    every = started(4, cache_gib=4.0)
    assert [place.nccl for place in place_servers(every, Gpus(FOUR))] == [False] * 4  # one transport for all servers
    with pytest.raises(UserError, match=r"^rollout\.weight_transfer: nccl needs separate GPUs, but GPU 0 has rank 0"):
        place_servers(rollout, Gpus(["0"]))


@pytest.mark.parametrize(
    ("place", "flag"),
    [(Placement(["0"], nccl=False), "host"), (Placement(["7"]), None), (Placement(None), None)],
)
def test_weights_reach_a_server_on_the_gpu_of_rank_0_through_host_memory(tmp_path, place: Placement, flag) -> None:
    server = StartedServer(tmp_path, started(sleep=True), dtype="float32", seed=0, port=1, placement=place)
    options = vars(parse(server._command[3:]))
    server.close()
    assert options["weight_transfer"] == flag
    assert options["cache_gib"] is None


def test_a_run_with_a_rank_on_every_gpu_is_refused_before_a_model_is_loaded(monkeypatch) -> None:
    """With several ranks, `engine: vllm` starts a server. Unchecked, the run would fail in vLLM's own memory check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(placement, "world", lambda: (0, 8))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"^rollout\.cache_gib: GPU 7 has a rank of the run and a server"):
        require_placement(Rollout(), beside_ranks=True)
    require_placement(Rollout(cache_gib=8.0, sleep=True), beside_ranks=True)
    require_placement(Rollout(), beside_ranks=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    require_placement(Rollout(), beside_ranks=True)

    rollout = Rollout(engine="remote", start_servers=8)
    stage: Any = SimpleNamespace(init_from="sft", rollout=rollout)
    recipe = SimpleNamespace(dtype="bfloat16", parallel=None)
    context: Any = SimpleNamespace(checkpoint=lambda name: Path(name), recipe=recipe)
    with pytest.raises(UserError, match=r"^rollout\.cache_gib: GPU 0 has a rank"):
        ppo.run(stage, context)  # reading the missing checkpoint would raise another error


def test_the_address_for_servers_is_on_the_route_to_them(monkeypatch) -> None:
    """On Debian, a machine's own name resolves to 127.0.1.1, which other machines cannot reach."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    loopback, remote = Server("http://127.0.0.1:8001"), Server("http://gpu7:8001")
    asked: list[str] = []

    def fake_route(host: str, port: int):
        asked.append(host)
        return route_to("127.0.0.3", port)

    assert own_address([loopback]) == "127.0.0.1"
    monkeypatch.setattr("align.rollout.sync.gpu_transfer.route_to", fake_route)
    address = own_address([loopback, remote])
    assert asked == ["gpu7"]
    with socket.create_server((address, 0)) as listener:  # an address of this machine
        assert listener.getsockname()[0] == address
    assert address != "127.0.1.1"


def test_the_route_names_both_ends() -> None:
    assert route_to("127.0.0.2", 29500) == ("127.0.0.1", "127.0.0.2")
