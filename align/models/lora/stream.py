"""Merge an adapter into a checkpoint, or remove it, file by file without building a model.

Bytes of tensors that the adapter does not change are copied. A changed tensor is read in blocks, updated in float32 and
rounded once to its stored dtype. Memory holds the factors of one parameter and one block.

Shapes: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.models.family import Place, family_of
from align.models.lora.folder import Adapter, Change, LowRank, Skeleton, Whole, changes, read, read_adapter, skeleton
from align.models.weight_files import StoredTensor, damaged, stored_tensors, weight_files
from align.models.weights import check_weights
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
        """(left, right) of one matrix's update `left @ right * scaling`, in the orientation in which it is stored."""
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

    config: The base's configuration.
    remove: Subtract the adapter from a checkpoint into which it was merged.
    """
    adapter = read_adapter(adapter_folder)
    scorer = adapter.settings.get("task_type") == "SEQ_CLS"
    check_weights(base, config, scorer=scorer)
    bones = skeleton(config, scorer=scorer)
    found = changes(adapter, bones)
    if remove:
        _require_removable(adapter, found)
    report = MergeReport()
    replace_folder(target, partial(_write, base, config, adapter, found, bones, remove, report))
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
    adapter: Adapter,
    found: dict[str, Change],
    bones: Skeleton,
    remove: bool,
    report: MergeReport,
    folder: Path,
) -> None:
    place, left, factors = family_of(config).names(config).place, set(found), Factors()
    places: dict[str, str] = {}
    for file in weight_files(base):
        with file.open("rb") as source, (folder / file.name).open("wb") as sink:
            header = int.from_bytes(source.read(8), "little")
            source.seek(0)
            sink.write(source.read(8 + header))
            for tensor in stored_tensors([file]):
                places[tensor.name] = file.name
                where = place(tensor.name)
                name = next((key for key in (tensor.name, where.parameter) if key in found), None)
                if name is None:
                    _copy(source, sink, tensor)
                    report.copied += 1
                    continue
                left.discard(name)
                report.changed += 1
                report.dtypes.add(tensor.dtype)
                change = found[name]
                if isinstance(change, Whole):
                    _replace(sink, change.tensor, tensor.dtype, where)
                else:
                    whole = where if name != tensor.name or where.parameter == name else Place(name)
                    _update(source, sink, tensor, change, whole, factors, -1 if remove else 1, report)
    if bones.tied:
        left.discard(f"{bones.head}.weight")
    _write_rest(base, config, adapter, {name: found[name] for name in left}, places, folder)


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


def _update(
    source: BinaryIO,
    sink: BinaryIO,
    tensor: StoredTensor,
    change: LowRank,
    where: Place,
    factors: Factors,
    sign: int,
    report: MergeReport,
) -> None:
    start = tensor.offset
    first_row = 0
    magnitudes = read(change.magnitude) if change.magnitude is not None else None
    for block in updates(change, where, tensor.shape, factors):
        part = StoredTensor(tensor.name, tensor.file, tensor.dtype, tuple(block.shape), start)
        start += block.numel() * tensor.dtype.itemsize
        weight = read(part)
        exact = weight + block if sign > 0 else weight - block
        if magnitudes is not None:
            rows = magnitudes.view(-1, 1)[first_row : first_row + len(block)]
            exact = exact * (rows / exact.norm(dim=1, keepdim=True))
            block = exact - weight
        first_row += len(block)
        rounded = exact.to(tensor.dtype)
        report.update += block.square().sum(dtype=torch.float64).item()
        if tensor.dtype != torch.float32:
            report.rounding += (rounded.float() - exact).square().sum(dtype=torch.float64).item()
        _put(sink, rounded)


def _put(sink: BinaryIO, values: Tensor) -> None:
    sink.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _write_rest(
    base: Path, config: Any, adapter: Adapter, added: dict[str, Change], places: dict[str, str], folder: Path
) -> None:
    """Write tensors that the base lacks, and everything beside the weights."""
    assert set(added) <= {"score.weight"}, f"not written: {sorted(added)}"
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    for file in adapter.folder.iterdir():  # trainers save the tokenizer that they used beside the adapter
        if file.is_file() and file.name.startswith(TOKENIZER):
            shutil.copyfile(file, folder / file.name)
    score = added.get("score.weight")
    if isinstance(score, Whole):
        name = "model-score.safetensors"
        save_file({"score.weight": read(score.tensor)}, folder / name, metadata={"format": "pt"})
        index = folder / INDEX
        values = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {"metadata": {}}
        write_json(index, {**values, "weight_map": {**places, "score.weight": name}})
    if adapter.settings.get("task_type") == "SEQ_CLS":
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        write_json(folder / "config.json", {**written, **labels, "architectures": [family_of(config).scorer.__name__]})
