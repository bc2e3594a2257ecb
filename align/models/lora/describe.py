"""Describe an adapter by its groups: of parameters on disk, or of a model that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from align.models.lora.adapters import plain_name
from align.models.lora.folder import Change, Skeleton, Whole, skeleton
from align.models.quantized import quantized_weights


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
    return _span({change.rank for change in members if not isinstance(change, Whole)})


def _span(ranks: set[int]) -> str:
    if not ranks:
        return "full"
    return str(*ranks) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}"


def _values(change: Change) -> int:
    if isinstance(change, Whole):
        return math.prod(change.tensor.shape)
    stored = [change.a, change.b] + ([change.magnitude] if change.magnitude else [])
    return sum(math.prod(tensor.shape) for tensor in stored)


class WeightRow(NamedTuple):
    """The weights of one group of a model with weights in 4 bits.

    quantized, kept, trained: Numbers of values in 4 bits, frozen in the model's dtype, and trained.
    bytes: Memory of all of them, without gradients and optimizer states.
    """

    group: str
    quantized: int
    kept: int
    trained: int
    bytes: int


def weight_rows(model: Any) -> list[WeightRow]:
    """The groups of a model with weights in 4 bits; none for a model without them. A group that is trained in full also
    has the frozen weights that its copy started from."""
    quantized = quantized_weights(model)
    if not quantized:
        return []
    bones = skeleton(model.config, scorer=model.get_output_embeddings() is None)
    rows: dict[str, WeightRow] = {}
    for name, parameter in model.named_parameters():
        weight, count = quantized.get(id(parameter)), parameter.numel()
        group = _group(name, bones)
        before = rows.get(group, WeightRow(group, 0, 0, 0, 0))
        rows[group] = WeightRow(
            group,
            before.quantized + count * (weight is not None),
            before.kept + count * (weight is None and not parameter.requires_grad),
            before.trained + count * parameter.requires_grad,
            before.bytes + (parameter.nbytes if weight is None else weight.bytes),
        )
    return list(rows.values())


def weight_lines(rows: Iterable[WeightRow]) -> list[str]:
    """A table of weights in 4 bits with its total."""
    rows = list(rows)
    quantized, kept, trained, size = (sum(column) for column in zip(*(row[1:] for row in rows), strict=True))
    total = WeightRow("total", quantized, kept, trained, size)
    return [
        f"{'group':<16}{'in 4 bits':>16}{'kept':>16}{'trained':>16}{'MB':>12}",
        *(
            f"{row.group:<16}{row.quantized:>16,}{row.kept:>16,}{row.trained:>16,}{row.bytes / 1e6:>12,.1f}"
            for row in [*rows, total]
        ),
    ]


def _group(name: str, bones: Skeleton) -> str:
    """The group of a parameter of a wrapped model."""
    module, _, factor = plain_name(name).partition(".lora_")
    stacks = {stack.rpartition(".")[0] for stack in bones.experts}
    if factor and module in stacks:
        return "routed_experts"
    return bones.group(f"{module}.weight" if factor else module)


def trained_rows(model: Any, full_shape: Callable[[Any], tuple[int, ...]]) -> list[GroupRow]:
    """The groups that a model with adapters trains.

    full_shape: shape of a parameter on all ranks together.
    """
    bones = skeleton(model.config, scorer=model.get_output_embeddings() is None)
    stacks = {name.rpartition(".")[0]: experts for name, experts in bones.experts.items()}
    tensors: dict[str, int] = {}
    values: dict[str, int] = {}
    ranks: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, factor = plain_name(name).partition(".lora_")
        shape = full_shape(parameter)
        group = _group(name, bones)
        values[group] = values.get(group, 0) + math.prod(shape)
        tensors[group] = tensors.get(group, 0) + (not factor or factor.startswith("A."))
        if factor.startswith("A."):
            stacked = module in stacks and len(shape) == 2
            rank = shape[-2] // stacks[module] if stacked else shape[-2]
            ranks.setdefault(group, set()).add(rank)
    return [GroupRow(group, tensors[group], _span(ranks.get(group, set())), count) for group, count in values.items()]


def table_lines(rows: Iterable[GroupRow], whole: int | None = None) -> list[str]:
    """A table of groups with its total. whole: number of the model's parameters, for the share of the total."""
    rows = list(rows)
    total = sum(row.parameters for row in rows)
    share = f"  {total / whole:.2%} of {whole:,}" if whole else ""
    return [
        f"{'group':<16}{'tensors':>8}{'rank':>8}{'parameters':>16}",
        *(f"{row.group:<16}{row.tensors:>8}{row.rank:>8}{row.parameters:>16,}" for row in rows),
        f"{'total':<16}{sum(row.tensors for row in rows):>8}{'':>8}{total:>16,}{share}",
    ]
