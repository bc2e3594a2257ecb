"""Merge an adapter into a checkpoint, or remove it, file by file without building a model.

Bytes of tensors that the adapter does not change are copied. A changed tensor is read in blocks, updated in float32 and
rounded once to its stored dtype. Memory holds the factors of one parameter and one block.

Shapes: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.folder import Adapter, Change, LowRank, Skeleton, Whole, changes, read, read_adapter, skeleton
from align.models.weight_files import StoredTensor, damaged, stored_tensors, weight_files
from align.models.weights import check_weights
from align.run.adapted import require_base, weights_of
from align.run.folder import replace_folder, write_json

BLOCK = 2**22
"""Values of a tensor that are updated at a time."""
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
"""Beginnings of the names of a tokenizer's files."""


@dataclass
class MergeReport:
    """Counts and errors of one merge.

    changed, copied: Tensors that the adapter changes, and tensors whose bytes were copied.
    update, rounding: Sum of squares of the low-rank updates, and of the errors by rounding to the stored dtype.
    """

    changed: int = 0
    copied: int = 0
    update: float = 0.0
    rounding: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def relative_rounding(self) -> float:
        """Norm of the rounding error relative to the norm of the update."""
        return math.sqrt(self.rounding / self.update) if self.update else 0.0


class Factors:
    """Float32 factors of the update that was used last; consecutive tensors of a file often share it."""

    def __init__(self) -> None:
        self._last: tuple[LowRank | None, Tensor, Tensor] = (None, torch.empty(0), torch.empty(0))

    def of(self, change: LowRank) -> tuple[Tensor, Tensor]:
        if self._last[0] is not change:
            self._last = (change, read(change.a), read(change.b))
        return self._last[1:]

    def matrices(self, change: LowRank, expert: int | None) -> tuple[Tensor, Tensor]:
        """(left, right) of one matrix's update `left @ right * scaling`, in the stored orientation."""
        a, b = self.of(change)
        if change.experts is not None and expert is not None:
            a, b = a.unflatten(0, (change.experts, -1))[expert], b[:, expert :: change.experts]
        return (a.mT, b.mT) if change.transposed else (b, a)


def updates(change: LowRank, place: Place, shape: tuple[int, ...], factors: Factors) -> Iterator[Tensor]:
    """Consecutive blocks of rows of the float32 update of a published tensor."""
    stacked = change.experts is not None and place.expert is None
    for expert in range(shape[0]) if stacked else [place.expert]:
        left, right = factors.matrices(change, expert)
        if place.half is not None:
            left = left.chunk(2)[place.half]
        for rows in left.split(max(1, BLOCK // right.shape[1])):
            yield (rows @ right).mul_(change.scaling)


def merge_adapter(base: Path, config: Any, adapter_folder: Path, target: Path, *, remove: bool = False) -> MergeReport:
    """Write the checkpoint `base` with the adapter added to `target`.

    base: Whole weights, or an adapter beside its own base; all adapters are then merged.
    config: The base's configuration.
    remove: Subtract the adapter from a checkpoint that contains it.
    """
    weights = weights_of(base)
    if not remove:
        require_base(adapter_folder, base)
    elif weights.adapters:
        raise UserError(f"{base}: its adapter is not merged into its weights; use its base {weights.base}.")
    adapters = [read_adapter(folder) for folder in (*weights.adapters, adapter_folder)]
    scorer = any(adapter.settings.get("task_type") == "SEQ_CLS" for adapter in adapters)
    check_weights(weights.base, config, scorer=scorer)
    bones = skeleton(config, scorer=scorer)
    found = [changes(adapter, bones) for adapter in adapters]
    if remove:
        _require_removable(adapters[-1], found[-1])
    report = MergeReport()
    replace_folder(target, partial(_write, weights.base, config, adapters, found, bones, remove, report))
    return report


def _require_removable(adapter: Adapter, found: Mapping[str, Change]) -> None:
    for name, change in found.items():
        if isinstance(change, Whole) or change.magnitude is not None:
            how = "replaces" if isinstance(change, Whole) else "rescales (DoRA)"
            raise UserError(
                f"{adapter.folder}: it {how} '{name}', so the original cannot be computed; use the base model."
            )


def _write(
    base: Path,
    config: Any,
    adapters: Sequence[Adapter],
    found: Sequence[dict[str, Change]],
    bones: Skeleton,
    remove: bool,
    report: MergeReport,
    folder: Path,
) -> None:
    place, left, factors = family_of(config).names(config).place, set[str]().union(*found), [Factors() for _ in found]
    places: dict[str, str] = {}
    for file in weight_files(base):
        with file.open("rb") as source, (folder / file.name).open("wb") as sink:
            header = int.from_bytes(source.read(8), "little")
            source.seek(0)
            sink.write(source.read(8 + header))
            for tensor in stored_tensors([file]):
                places[tensor.name] = file.name
                where = place(tensor.name)
                names = [next((key for key in (tensor.name, where.parameter) if key in part), None) for part in found]
                chain = [
                    _Step(part[name], where if name != tensor.name or where.parameter == name else Place(name), cache)
                    for part, name, cache in zip(found, names, factors, strict=True)
                    if name is not None
                ]
                left.difference_update(name for name in names if name is not None)
                chain = chain[max((n for n, step in enumerate(chain) if isinstance(step.change, Whole)), default=0) :]
                if not chain:
                    _copy(source, sink, tensor)
                    report.copied += 1
                    continue
                report.changed += 1
                report.dtypes.add(tensor.dtype)
                values: StoredTensor | Tensor = tensor
                if isinstance(first := chain[0].change, Whole):
                    if len(chain) == 1:
                        _replace(sink, first.tensor, tensor.dtype, where)
                        continue
                    values = first.tensor if where.expert is None else where.within(read(first.tensor))
                _update(sink, tensor, values, chain, -1 if remove else 1, report)
    if bones.tied:
        left.discard(f"{bones.head}.weight")
    added = {name: next(part[name] for part in reversed(found) if name in part) for name in left}
    _write_rest(base, config, adapters, added, places, folder)


class _Step(NamedTuple):
    """One adapter's change of a published tensor, the part of the parameter that it is, and a cache of factors."""

    change: Change
    where: Place
    factors: Factors


def _copy(source: BinaryIO, sink: BinaryIO, tensor: StoredTensor) -> None:
    source.seek(tensor.offset)
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    while size:
        part = source.read(min(size, BLOCK))
        if not part:
            raise damaged(tensor.file, "the file is truncated")
        sink.write(part)
        size -= len(part)


def _replace(sink: BinaryIO, tensor: StoredTensor, dtype: torch.dtype, where: Place) -> None:
    """Write the part of the adapter's tensor that is published under one name, in the base's dtype."""
    size = math.prod(tensor.shape)
    if where.expert is not None:
        _put(sink, where.within(read(tensor)).to(dtype))
        return
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        offset = tensor.offset + start * tensor.dtype.itemsize
        _put(sink, read(StoredTensor(tensor.name, tensor.file, tensor.dtype, (count,), offset)).to(dtype))


def _rows(source: StoredTensor | Tensor, shape: tuple[int, ...], first: int) -> Tensor:
    """Rows of a matrix, or of the matrices of a stack one after another, in float32, from row `first`."""
    if isinstance(source, Tensor):
        return source.reshape(-1, shape[1])[first : first + shape[0]].float()
    offset = source.offset + first * shape[1] * source.dtype.itemsize
    return read(StoredTensor(source.name, source.file, source.dtype, shape, offset))


def _update(
    sink: BinaryIO,
    tensor: StoredTensor,
    source: StoredTensor | Tensor,
    chain: Sequence[_Step],
    sign: int,
    report: MergeReport,
) -> None:
    """Write a tensor with the low-rank updates of all adapters, rounded once. source: the values without them."""
    first_row = 0
    steps = [(step.change, step) for step in chain if isinstance(step.change, LowRank)]
    magnitudes = [read(change.magnitude) if change.magnitude is not None else None for change, _ in steps]
    for blocks in zip(
        *(updates(change, step.where, tensor.shape, step.factors) for change, step in steps), strict=True
    ):
        weight = exact = _rows(source, tuple(blocks[0].shape), first_row)
        for block, norms in zip(blocks, magnitudes, strict=True):
            exact = exact + block if sign > 0 else exact - block
            if norms is not None:
                exact = rescaled(exact, norms[first_row : first_row + len(block)])
        first_row += len(weight)
        plain = len(blocks) == 1 and magnitudes[0] is None
        rounded = exact.to(tensor.dtype)
        report.update += (blocks[0] if plain else exact - weight).square().sum(dtype=torch.float64).item()
        if tensor.dtype != torch.float32:
            report.rounding += (rounded.float() - exact).square().sum(dtype=torch.float64).item()
        _put(sink, rounded)


def rescaled(weight: Tensor, magnitudes: Tensor) -> Tensor:
    """DoRA: rows of `weight` [O, I] with the norms `magnitudes`, O values."""
    result: Tensor = weight * (magnitudes.view(-1, 1) / weight.norm(dim=1, keepdim=True))
    return result


def _put(sink: BinaryIO, values: Tensor) -> None:
    sink.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _write_rest(
    base: Path,
    config: Any,
    adapters: Sequence[Adapter],
    added: dict[str, Change],
    places: dict[str, str],
    folder: Path,
) -> None:
    """Write tensors that the base lacks, and everything beside the weights."""
    assert set(added) <= {"score.weight"}, f"not written: {sorted(added)}"
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    for adapter in adapters:  # trainers save the tokenizer that they used beside the adapter
        for file in adapter.folder.iterdir():
            if file.is_file() and file.name.startswith(TOKENIZER):
                shutil.copyfile(file, folder / file.name)
    score = added.get("score.weight")
    if isinstance(score, Whole):
        name = "model-score.safetensors"
        save_file({"score.weight": read(score.tensor)}, folder / name, metadata={"format": "pt"})
        index, single = folder / INDEX, folder / "model.safetensors"
        values = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {"metadata": {}}
        if single.is_file():  # transformers would read this file alone, and leave the index unread
            single.rename(folder / "model-trunk.safetensors")
            places = {key: "model-trunk.safetensors" if file == single.name else file for key, file in places.items()}
        write_json(index, {**values, "weight_map": {**places, "score.weight": name}})
    if adapters[-1].settings.get("task_type") == "SEQ_CLS":
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        write_json(folder / "config.json", {**written, **labels, "architectures": [family_of(config).scorer.__name__]})
