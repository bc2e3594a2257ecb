"""Add the adapters of a checkpoint to the weights of its base while these are loaded, in memory.

Shapes: E experts, O outputs, I inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.folder import Change, LowRank, Whole, changes, read, read_adapter, skeleton
from align.models.lora.stream import BLOCK, Factors, rescaled
from align.models.weights import read_range, stored_state


class Overlay:
    """The changes of a chain of adapters, by parameter.

    Sums are computed in float32, and rounded to the parameter's dtype after each adapter.
    """

    def __init__(self, adapters: Sequence[Path], config: Any):
        self._changes: dict[str, list[tuple[Change, Place, Path]]] = {}
        self._head: str | None = None
        place = family_of(config).names(config).place
        for folder in adapters:
            adapter = read_adapter(folder)
            bones = skeleton(config, scorer=adapter.settings.get("task_type") == "SEQ_CLS")
            self._head = f"{bones.head}.weight"
            for name, change in changes(adapter, bones).items():
                where = place(name) if name in bones.published else Place(name)
                self._changes.setdefault(where.parameter, []).append((change, where, folder))

    @property
    def changed(self) -> set[str]:
        """Names of the parameters and buffers that change."""
        return set(self._changes)

    @torch.no_grad()
    def apply_to(self, model: Any, without: Collection[str] = ()) -> None:
        """Change the parameters and buffers of a whole model, except those named in `without`.

        A model may lack the head: it is the embedding, or the model is a scorer.
        """
        state = stored_state(model)
        if missing := sorted(set(self._changes) - set(state) - {self._head}):
            raise ValueError(f"the model has no parameter '{missing[0]}'")
        for name in self._changes:
            if name in state and name not in without:
                self.apply(name, state[name].data)

    @torch.no_grad()
    def apply(self, name: str, target: Tensor, first: int = 0, start: int = 0, stop: int | None = None) -> None:
        """Change elements `start` to `stop` of the flattened parameter `target`.

        first: index of the first expert in `target`, if it is a shard of a stack of experts.
        """
        stop = target.numel() if stop is None else stop
        for change, where, folder in self._changes.get(name, ()):
            if isinstance(change, Whole):
                read_range(target, [(change.tensor, where)], first, start, stop)
            else:
                _add(change, where, target, first, start, stop, folder)


def _matrices(change: LowRank, where: Place, target: Tensor, first: int) -> Iterator[tuple[int | None, int]]:
    """(expert, first element in `target`) of each matrix that the change has in `target`."""
    if change.experts is not None:
        yield from ((first + number, number * target[0].numel()) for number in range(len(target)))
    elif where.expert is None:
        yield None, 0
    elif first <= where.expert < first + len(target):
        size = target[0].numel()
        yield None, (where.expert - first) * size + (where.half or 0) * (size // 2)


def _add(change: LowRank, where: Place, target: Tensor, first: int, start: int, stop: int, folder: Path) -> None:
    flat, factors = target.view(-1), Factors()
    magnitudes = None if change.magnitude is None else read(change.magnitude)
    for expert, offset in _matrices(change, where, target, first):
        left, right = factors.matrices(change, expert)
        width = right.shape[1]
        low, high = max(start, offset) - offset, min(stop, offset + len(left) * width) - offset
        if low >= high:
            continue
        if magnitudes is not None and (low % width or high % width):
            raise UserError(
                f"{folder}: a DoRA adapter needs the norms of whole rows, which `parallel` shards; merge it with "
                "`align adapter merge`, and use the merged model."
            )
        rows = max(1, BLOCK // width)
        for row in range(low // width, math.ceil(high / width), rows):
            update = (left[row : row + rows] @ right).mul_(change.scaling).view(-1)
            begin, end = max(low, row * width), min(high, row * width + len(update))
            part = flat[offset + begin : offset + end]
            exact = part.float() + update[begin - row * width : end - row * width]
            if magnitudes is not None:
                exact = rescaled(exact.view(-1, width), magnitudes[begin // width : end // width]).view(-1)
            part.copy_(exact)
