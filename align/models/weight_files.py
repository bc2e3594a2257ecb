"""Tensors of safetensors files, read directly into allocated memory.

Memory mapping would be less code, but mapped pages count as the process's memory until the file is closed, and
converting the dtype would need a second copy. Here a tensor is read from its offset into its destination. A buffer is
needed only if dtype or device differ; it has at most `CHUNK` values.

Source of the format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from align.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**15
"""Values that are read, checked and converted at a time. They fit in the processor's cache, and they are too few for
torch to start a thread pool in every reader."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; its data begins `offset` bytes after the file's start."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read_into(self, target: Tensor) -> None:
        """Fill `target`, which must be contiguous and of this shape, and may have any floating dtype and device.

        Raises `UserError` for values that are not finite and for a truncated file.
        """
        if tuple(target.shape) != self.shape:
            raise ValueError(f"'{self.name}' has the shape {self.shape}, its destination {tuple(target.shape)}")
        values = target.view(-1)
        in_place = target.dtype == self.dtype and target.device.type == "cpu"
        buffer = None if in_place else torch.empty(min(CHUNK, len(values)), dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for part in values.split(CHUNK):
                piece = part if buffer is None else buffer[: len(part)]
                self._read(file, piece)
                if not _all_finite(piece):
                    raise UserError(
                        f"{self.file.parent}: the tensor '{self.name}' has values that are infinite or not a number; "
                        "use an earlier checkpoint."
                    )
                if buffer is not None:
                    part.copy_(piece)

    def equals(self, values: Tensor) -> bool:
        """True if the file's values, converted to the dtype of `values`, equal `values`, which must be contiguous."""
        if tuple(values.shape) != self.shape:
            return False
        buffer = torch.empty(min(CHUNK, values.numel()), dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for part in values.view(-1).split(CHUNK):
                piece = buffer[: len(part)]
                self._read(file, piece)
                if not torch.equal(piece.to(part.dtype), part.cpu()):
                    return False
        return True

    def _read(self, file: BinaryIO, piece: Tensor) -> None:
        if file.readinto(piece.view(torch.uint8).numpy()) != piece.nbytes:  # type: ignore[attr-defined]
            raise damaged(self.file, "the file is truncated")


def _all_finite(values: Tensor) -> bool:
    """True if all values are finite. A finite sum proves that; a sum that is not finite may have overflowed."""
    return math.isfinite(values.sum()) or bool(values.isfinite().all())


def stored_tensors(files: list[Path]) -> list[StoredTensor]:
    """All tensors of the files, in file order; only headers are read."""
    return [tensor for file in files for tensor in _read_header(file)]


def _read_header(file: Path) -> list[StoredTensor]:
    """Tensors of one file; `UserError` if it is not a safetensors file, is truncated or has an unsupported dtype."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= size - 8:
            raise damaged(file, "its header is truncated")
        try:
            header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            tensors = [_stored(name, file, 8 + length, **entry) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(file, f"its header is not valid: {error}") from error
    tensors.sort(key=lambda tensor: tensor.offset)
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise damaged(file, f"the bytes of '{tensor.name}' are not at their offset")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise damaged(file, f"it has {size} bytes, but its header says {end}")
    return tensors


def _stored(name: str, file: Path, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    if dtype not in DTYPES:
        raise UserError(f"{file}: the tensor '{name}' is of type {dtype}; save the weights in float32 or bfloat16.")
    first, last = data_offsets
    if any(size < 0 for size in shape) or last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the size of '{name}' does not match its shape")
    return StoredTensor(name, file, DTYPES[dtype], tuple(shape), start + first)


def damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file.parent}: the weights cannot be read ({file.name}: {reason}); copy or download them again.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's whole weights.

    Raises `UserError` if its index is invalid or lists a missing file, and for a checkpoint that is an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: its weights are an adapter beside its base, but whole weights are needed here; run "
            f"`align adapter merge {folder} OUT`, and use OUT."
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{index}: it is not a valid index of safetensors files; copy or download it again.") from None
    for name in named:
        if not (folder / name).is_file():
            raise UserError(f"{index}: the file '{name}' does not exist; copy or download it.")
    return [folder / name for name in named]
