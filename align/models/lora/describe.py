"""Describe an adapter on disk: its parameters by group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from align.models.lora.folder import Change, Skeleton, Whole


class GroupRow(NamedTuple):
    """One group of an adapter.

    tensors: Number of parameters of the base that change.
    rank: Ranks of the factors, such as `8` or `4-16`; `full` for parameters that are trained in full.
    parameters: Number of stored values.
    """

    group: str
    tensors: int
    rank: str
    parameters: int


def group_rows(found: Mapping[str, Change], base: Skeleton) -> list[GroupRow]:
    """The groups that an adapter changes."""
    members: dict[str, list[Change]] = {}
    for name, change in found.items():
        members.setdefault(base.group(name), []).append(change)
    return [GroupRow(group, len(all_), _ranks(all_), sum(map(_values, all_))) for group, all_ in members.items()]


def _ranks(members: list[Change]) -> str:
    ranks = sorted({change.rank for change in members if not isinstance(change, Whole)})
    if not ranks:
        return "full"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _values(change: Change) -> int:
    if isinstance(change, Whole):
        return math.prod(change.tensor.shape)
    stored = [change.a, change.b] + ([change.magnitude] if change.magnitude else [])
    return sum(math.prod(tensor.shape) for tensor in stored)
