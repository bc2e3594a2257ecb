"""Which elements of a tensor each rank holds.

Whatever ZeRO and expert parallelism do, a rank holds a run of consecutive elements of the flattened whole: its experts
are a run of the stack, and ZeRO 3 cuts what a group shares into equal runs. Loading, saving and resuming at another
world size need no more than these runs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Share(NamedTuple):
    """A parameter that is one rank's share of a stack of `experts`, spread over `ranks`."""

    experts: int
    ranks: int


def expert_share(parameter: Any) -> Share | None:
    """None for a parameter that is not spread."""
    return getattr(parameter, "expert_share", None)


class Piece(NamedTuple):
    """Elements `start` to `start + size` of a flattened tensor, which `rank` holds."""

    rank: int
    start: int
    size: int


def world() -> tuple[int, int]:
    """(this process's rank, processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the parameter as one process would hold it."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    share = expert_share(parameter)
    return (share.experts, *shape[1:]) if share else shape


def pieces(parameter: Any) -> list[Piece]:
    """The runs that cover a parameter, each with one rank that holds it (the first, where several do)."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    size = math.prod(shape)
    _, processes = world()
    share = expert_share(parameter)
    groups = share.ranks if share else 1
    partition = parameter.ds_tensor.ds_numel if is_partitioned(parameter) else size
    found = []
    for rank in range(processes):
        # Ranks with consecutive numbers form an expert-parallel group; each of them is in a ZeRO group of its own.
        zero_rank, group_rank = divmod(rank, groups)
        start = zero_rank * partition
        if start < size:
            found.append(Piece(rank, group_rank * size + start, min(partition, size - start)))
    return found


def is_partitioned(parameter: Any) -> bool:
    """True for a parameter that ZeRO 3 has cut up."""
    return getattr(parameter, "ds_tensor", None) is not None


def own_piece(parameter: Any) -> Piece | None:
    """This rank's run, None where it holds nothing that another does not hold before it."""
    rank, _ = world()
    return next((piece for piece in pieces(parameter) if piece.rank == rank), None)


def held_values(parameter: Any) -> Tensor:
    """The memory in which this rank has its part of a parameter."""
    held: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter
    return held


def own_values(parameter: Any, piece: Piece) -> Tensor:
    """The elements of this rank's run, flat, in the precision of the forward pass."""
    return held_values(parameter).detach().flatten()[: piece.size]
