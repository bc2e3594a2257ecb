"""Shards of parameters by rank.

Under ZeRO and expert parallelism alike a shard is a range of consecutive elements of the flattened full tensor: a
rank's experts are a slice of the stack, and ZeRO 3 partitions a tensor into equal ranges. Loading, saving and resuming
at another world size only need these ranges.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class ExpertShard(NamedTuple):
    """Marks a parameter that is one rank's shard of a stack of experts.

    experts: number of experts in the full stack.
    ranks: number of ranks in the expert-parallel group.
    """

    experts: int
    ranks: int


def expert_shard(parameter: Any) -> ExpertShard | None:
    """The `ExpertShard` of a parameter that is sharded by expert; None for any other parameter."""
    return getattr(parameter, "expert_shard", None)


class Shard(NamedTuple):
    """Elements `start` to `start + size` of a flattened tensor, held by `rank`."""

    rank: int
    start: int
    size: int


def world() -> tuple[int, int]:
    """(rank of this process, number of ranks); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the unsharded parameter."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    shard = expert_shard(parameter)
    return (shard.experts, *shape[1:]) if shard else shape


def shards(parameter: Any) -> list[Shard]:
    """Shards that cover a parameter exactly once; a shard that several ranks hold is listed with the lowest of them."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    size = math.prod(shape)
    _, processes = world()
    by_expert = expert_shard(parameter)
    groups = by_expert.ranks if by_expert else 1
    partition = parameter.ds_tensor.ds_numel if is_partitioned(parameter) else size
    found = []
    for rank in range(processes):
        # Consecutive ranks form an expert-parallel group; each rank of a group belongs to a different ZeRO group.
        zero_rank, group_rank = divmod(rank, groups)
        start = zero_rank * partition
        if start < size:
            found.append(Shard(rank, group_rank * size + start, min(partition, size - start)))
    return found


def is_partitioned(parameter: Any) -> bool:
    """True for a parameter that ZeRO 3 has partitioned."""
    return getattr(parameter, "ds_tensor", None) is not None


def local_shard(parameter: Any) -> Shard | None:
    """This rank's entry in `shards`; None if its shard is empty or if a lower rank holds the same shard."""
    rank, _ = world()
    return next((shard for shard in shards(parameter) if shard.rank == rank), None)


def local_values(parameter: Any) -> Tensor:
    """The rank-local tensor of a parameter; changing it in place changes the parameter."""
    values: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter
    return values


def shard_values(parameter: Any, shard: Shard) -> Tensor:
    """The elements of `shard`, which must be this rank's: flat, in the dtype of the forward pass."""
    return local_values(parameter).detach().flatten()[: shard.size]
