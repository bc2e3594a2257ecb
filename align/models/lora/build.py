"""Make LoRA adapters without training: from the difference of two checkpoints, or from other adapters.

Shapes: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    Change,
    LowRank,
    Skeleton,
    Whole,
    changes,
    read,
    read_adapter,
    skeleton,
)
from align.models.lora.stream import Factors
from align.models.lora.targets import portable_targets
from align.models.weight_files import StoredTensor, stored_tensors, weight_files
from align.models.weights import check_weights
from align.run.folder import replace_folder, write_json

LOW_RANK = ("attention", "shared_expert", "routed_experts")
"""Groups whose difference is written as factors; see `Skeleton.group`."""
EXACT = 1024
"""Matrices with a side up to this size are decomposed exactly, larger ones by a randomised method."""
Method = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


class Approximation(NamedTuple):
    """Factors B [O, r] and A [r, I], the squared norm of the matrix, and its largest singular values."""

    b: Tensor
    a: Tensor
    square: float
    singular: Tensor


@dataclass
class GroupError:
    """Error of an approximation of the matrices of one group, by rank.

    square: Sum of squares of all values.
    left: Sum of squares that a rank leaves, by rank.
    """

    square: float = 0.0
    left: dict[int, float] = field(default_factory=dict)

    def add(self, found: Approximation, ranks: Iterable[int]) -> None:
        self.square += found.square
        kept = found.singular.square().cumsum(0).tolist()
        for rank in ranks:
            rest = found.square - kept[min(rank, len(kept)) - 1]
            self.left[rank] = self.left.get(rank, 0.0) + max(0.0, rest)

    def relative(self, rank: int) -> float:
        """Norm of the part that a rank does not represent, relative to the norm of the matrices."""
        return math.sqrt(self.left[rank] / self.square) if self.square else 0.0


Pairs = dict[str, list[tuple[Tensor, Tensor]]]
"""(B [O, r], A [r, I]) of each parameter by name: one pair, or for a stack one per expert."""
Errors = dict[str, GroupError]
"""Errors by group."""


def approximate(matrix: Tensor, rank: int) -> Approximation:
    """The closest matrix of a rank, with the singular values divided evenly between the factors."""
    square = matrix.square().sum(dtype=torch.float64).item()
    if min(matrix.shape) <= EXACT:
        u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
        u, singular, v = u[:, :rank], singular[:rank], v[:rank]
    else:
        left, singular, right = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        u, singular, v = left[:, :rank], singular[:rank], right[:, :rank].mT
    root = singular.sqrt()
    b, a = u * root, root[:, None] * v
    if len(singular) < rank:  # a matrix with fewer rows or columns than the rank
        b = torch.cat([b, b.new_zeros(len(b), rank - len(singular))], 1)
        a = torch.cat([a, a.new_zeros(rank - len(singular), a.shape[1])])
    return Approximation(b, a, square, singular)


class Matrices:
    """The parameters of a checkpoint, read one matrix at a time in float32."""

    def __init__(self, folder: Path, config: Any, bones: Skeleton):
        place = family_of(config).names(config).place
        self._bones = bones
        self._parts: dict[str, list[tuple[StoredTensor, Place]]] = {}
        for tensor in stored_tensors(weight_files(folder)):
            where = place(tensor.name)
            self._parts.setdefault(where.parameter, []).append((tensor, where))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter, or one expert's matrix [O, I] of a stack."""
        parts = self._parts[name]
        if expert is None:
            (part,) = parts
            return read(part[0])
        tensor, where = parts[0]
        if where.expert is not None:
            own = sorted((where.half or 0, tensor) for tensor, where in parts if where.expert == expert)
            return torch.cat([read(tensor) for _, tensor in own])
        size = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        one = StoredTensor(tensor.name, tensor.file, tensor.dtype, tensor.shape[1:], tensor.offset + expert * size)
        return read(one).mT if name in self._bones.transposed else read(one)


def extract_adapter(
    base: Path, tuned: Path, config: Any, target: Path, rank: int, *, copy_rest: bool
) -> tuple[Errors, dict[str, float]]:
    """Write the difference of two checkpoints as an adapter of `base` to `target`.

    config: The configuration of both.
    copy_rest: Store every other changed parameter in full (`modules_to_save`). Otherwise its difference is lost.

    Returns the errors by group, for `rank` and for smaller powers of two, and the norm of the difference of the
    parameters without factors, by group, relative to the norm of the whole difference.
    """
    for folder in (base, tuned):
        check_weights(folder, config)
    bones = skeleton(config)
    first, second = (Matrices(folder, config, bones) for folder in (base, tuned))
    ranks = [power for power in (2**n for n in range(12)) if power < rank] + [rank]
    factors: Pairs = {}
    errors: Errors = {}
    rest: dict[str, float] = {}
    changed = set()
    for name in first:
        group, experts = bones.group(name), bones.experts.get(name)
        if group not in LOW_RANK or (experts is None and not name.endswith(".weight")):
            square = (second.read(name) - first.read(name)).square().sum(dtype=torch.float64).item()
            if square:
                rest[group] = rest.get(group, 0.0) + square
                changed.add(name.rpartition(".")[0])
            continue
        pairs = []
        for expert in [None] if experts is None else range(experts):
            found = approximate(second.read(name, expert) - first.read(name, expert), rank)
            errors.setdefault(group, GroupError()).add(found, ranks)
            pairs.append((found.b, found.a))
        factors[name] = pairs
    whole = sum(rest.values()) + sum(error.square for error in errors.values())
    if not whole:
        raise UserError(f"{tuned}: its weights equal those of {base}; pass a checkpoint that was trained.")
    copied = {
        name: second.read(name)
        for name in (first if copy_rest else ())
        if (module := name.rpartition(".")[0]) in changed
        and bones.group(name) not in LOW_RANK
        # PEFT trains a module in full or puts factors on it, not both.
        and not any(other.rpartition(".")[0] == module for other in factors)
    }
    if bones.tied and (embedding := copied.get(f"{bones.embedding}.weight")) is not None:
        copied[f"{bones.head}.weight"] = embedding
    write_adapter(target, factors, copied, rank, bones, config, base)
    lost = {group: math.sqrt(square / whole) for group, square in rest.items()}
    return errors, lost


def combine_adapters(
    folders: Sequence[Path],
    weights: Sequence[float],
    config: Any,
    target: Path,
    base: Path,
    *,
    method: Method = "linear",
    density: float = 1.0,
    rank: int | None = None,
) -> Errors:
    """Write the weighted combination of adapters of one base to `target`.

    method: linear adds the updates. The others first remove values from each update, as PEFT does: the smallest
        (magnitude_prune, ties) or random ones (dare_*); *ties then keep only values with the elected sign.
    density: Fraction of the values that these keep.
    rank: Rank of the result, by a singular value decomposition. None: the sum of the ranks, which is exact for
        `linear`; otherwise the largest of the ranks.

    Returns the errors by group if the result is an approximation.
    """
    adapters = [read_adapter(folder) for folder in folders]
    bones = skeleton(config)
    found = [changes(adapter, bones) for adapter in adapters]
    for adapter, updates in zip(adapters, found, strict=True):
        _require_combinable(adapter, updates)
    names = sorted({name for updates in found for name in updates})
    ranks = {
        name: [change.rank if isinstance(change := updates.get(name), LowRank) else 0 for updates in found]
        for name in names
    }
    exact = method == "linear" and rank is None
    if rank is None:
        rank = max((sum if exact else max)(values) for values in ranks.values())
    combined: Pairs = {}
    errors: Errors = {}
    for name in names:
        parts = [(updates.get(name), weight) for updates, weight in zip(found, weights, strict=True)]
        pairs = []
        experts = bones.experts.get(name)
        caches = [Factors() for _ in parts]
        for expert in [None] if experts is None else range(experts):
            if exact:
                pairs.append(_concatenated(parts, caches, expert, rank))
                continue
            approximation = approximate(_combined(parts, caches, expert, method, density), rank)
            errors.setdefault(bones.group(name), GroupError()).add(approximation, [rank])
            pairs.append((approximation.b, approximation.a))
        combined[name] = pairs
    write_adapter(target, combined, {}, rank, bones, config, base)
    return errors


def _require_combinable(adapter: Adapter, found: dict[str, Change]) -> None:
    for name, change in found.items():
        if isinstance(change, Whole) or change.magnitude is not None or (change.transposed and not change.experts):
            how = "has '{}' in full" if isinstance(change, Whole) else "has more than two factors for '{}'"
            raise UserError(
                f"{adapter.folder}: it {how.format(name)}, which cannot be combined; merge the adapters into their "
                "base one after another."
            )


def _in_product_order(change: LowRank, factors: Factors, expert: int | None) -> tuple[Tensor, Tensor]:
    """B [O, r] and A [r, I] of one matrix."""
    left, right = factors.matrices(change, expert)
    return (right.mT, left.mT) if change.transposed else (left, right)


def _concatenated(
    parts: Sequence[tuple[Change | None, float]], factors: Sequence[Factors], expert: int | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum of all updates, filled up with zeros to `rank`."""
    pairs = [
        (b * (change.scaling * weight), a)
        for (change, weight), cache in zip(parts, factors, strict=True)
        if isinstance(change, LowRank)
        for b, a in [_in_product_order(change, cache, expert)]
    ]
    b, a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])
    free = rank - len(a)
    return torch.cat([b, b.new_zeros(len(b), free)], 1), torch.cat([a, a.new_zeros(free, a.shape[1])])


def _combined(
    parts: Sequence[tuple[Change | None, float]],
    factors: Sequence[Factors],
    expert: int | None,
    method: Method,
    density: float,
) -> Tensor:
    """The combined update [O, I] of one matrix."""
    from peft.utils import merge_utils

    updates, weights = [], []
    for (change, weight), cache in zip(parts, factors, strict=True):
        if isinstance(change, LowRank):
            b, a = _in_product_order(change, cache, expert)
            updates.append((b @ a) * change.scaling)
            weights.append(weight)
    weighted = torch.tensor(weights)
    if method == "linear":
        return merge_utils.task_arithmetic(updates, weighted)
    combined: Tensor = getattr(merge_utils, method)(updates, weighted, density)
    return combined


def stored_factors(factors: Pairs, bones: Skeleton) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each factor under PEFT's names, without its prefix, and in its shapes."""
    for name, pairs in factors.items():
        if name not in bones.experts:
            ((b, a),) = pairs
            key = name.removesuffix(".weight")
            yield f"{key}.lora_A.weight", a
            yield f"{key}.lora_B.weight", b
            continue
        module = name.rpartition(".")[0]
        stacks = [stack for stack in bones.experts if stack in factors and stack.rpartition(".")[0] == module]
        # PEFT wraps a module once per stack; the wrapper of the last one is outermost.
        key = module + ".base_layer" * (len(stacks) - 1 - stacks.index(name))
        yield f"{key}.lora_A.weight", torch.cat([a for _, a in pairs])
        yield f"{key}.lora_B.weight", torch.stack([b for b, _ in pairs], 2).flatten(1)


def write_adapter(
    target: Path, factors: Pairs, copied: dict[str, Tensor], rank: int, bones: Skeleton, config: Any, base: Path
) -> None:
    """Write an adapter with the scaling 1 in PEFT's format.

    copied: Parameters that are stored in full.
    """
    modules, parameters = portable_targets(factors, bones, config.model_type)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in copied}) or None,
        "inference_mode": True,
    }
    tensors = dict(stored_factors(factors, bones)) | copied

    def write(folder: Path) -> None:
        named = {PREFIX + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, settings)

    replace_folder(target, write)
