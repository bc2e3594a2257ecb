"""GPUs of the rollout servers that a run starts on rank 0's machine, beside the run's ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from align.config.rollout import Rollout
from align.errors import UserError
from align.parallel.sharding import world


@dataclass(frozen=True)
class Gpus:
    """The GPUs that rank 0 sees.

    names: names as in CUDA_VISIBLE_DEVICES; empty without a GPU.
    ranks: number of GPUs, counted from the first, that have a rank of the run.
    own: index of rank 0's GPU.
    """

    names: list[str]
    ranks: int = 1
    own: int = 0


@dataclass(frozen=True)
class Placement:
    """GPUs of one started server.

    devices: value of CUDA_VISIBLE_DEVICES, one name per entry; None without a GPU.
    nccl: False if one of the servers is on rank 0's GPU, which excludes NCCL for all servers.
    """

    devices: list[str] | None
    nccl: bool = True


def visible_gpus() -> Gpus:
    """The GPUs of this process, which is rank 0 or the only one."""
    if not torch.cuda.is_available():
        return Gpus([])
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(i) for i in range(torch.cuda.device_count())]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world()[1] > 1 else 1
    return Gpus(names, min(ranks, len(names)), torch.cuda.current_device())


def place_servers(rollout: Rollout, gpus: Gpus) -> list[Placement]:
    """The GPUs of each server to start, counted from the last GPU; for `weight_transfer: ipc`, rank 0's GPU.

    Raises `UserError` for too few GPUs, and for settings that do not allow a GPU shared with a rank.
    """
    size, count = rollout.tensor_parallel_size, rollout.start_servers
    if not gpus.names or not count:
        return [Placement(None)] * count
    needed = count * size
    if needed > len(gpus.names):
        raise UserError(
            f"rollout.start_servers: {count} servers of {size} GPU{'s' * (size > 1)} each need {needed} GPUs, but "
            f"{len(gpus.names)} are visible. Lower rollout.start_servers or rollout.tensor_parallel_size."
        )
    if rollout.weight_transfer == "ipc":
        places = [[gpus.own]]  # a handle of CUDA IPC opens only on the GPU that made it
    else:
        ends = [len(gpus.names) - server * size for server in range(count)]
        places = [list(range(end - size, end)) for end in ends]
    shared = sorted({index for place in places for index in place if index < gpus.ranks or index == gpus.own})
    if shared and rollout.cache_gib is None:
        raise UserError(
            f"rollout.cache_gib: GPU {gpus.names[shared[0]]} has a rank of the run and a server, which takes 92 % of a "
            "GPU by default. Set rollout.cache_gib (and rollout.sleep: true, to free the memory between rollouts), or "
            "leave more GPUs without a rank."
        )
    if rollout.weight_transfer == "nccl" and gpus.own in shared:
        raise UserError(
            f"rollout.weight_transfer: nccl needs separate GPUs, but GPU {gpus.names[gpus.own]} has rank 0 and a "
            "server. Set rollout.weight_transfer: auto, or leave more GPUs without a rank."
        )
    return [Placement([gpus.names[index] for index in place], gpus.own not in shared) for place in places]
