"""A stream of named weights on its way from a trainer to an engine: cut into buckets, written as bytes, digested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Bucket = list[tuple[str, Tensor]]
"""Some of the stream's (name, tensor) pairs, sent at a time."""

WORDS_A_ROW = 1024
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""What the safetensors format calls them."""


def buckets(stream: Iterable[tuple[str, Tensor]], size: int, dtype: torch.dtype) -> Iterator[Bucket]:
    """The stream in buckets of at most `size` bytes (or one tensor), cast to `dtype`. Order is kept."""
    bucket: Bucket = []
    held = 0
    for name, tensor in stream:
        cast = tensor.detach().to(dtype)
        if bucket and held + cast.nbytes > size:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, cast))
        held += cast.nbytes
    if bucket:
        yield bucket


def digest(tensor: Tensor) -> str:
    """16 hex digits of a tensor's type, shape and bits.

    The bits are read as 64-bit words in rows of 1024; a hash is taken of the sums of the rows and of the columns modulo
    2^64. So a changed, moved or missing value shows, at about the speed of memory and on the tensor's own device. It is
    a guard against errors, not against an adversary.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    missing = -octets.numel() % 8
    if missing or octets.storage_offset() % 8:
        octets = torch.cat((octets, octets.new_zeros(missing)))
    words = octets.view(torch.int64)
    whole = words.numel() // WORDS_A_ROW * WORDS_A_ROW
    grid = words[:whole].view(-1, WORDS_A_ROW)
    sums = torch.cat((grid.sum(0), grid.sum(1), words[whole:])).cpu()
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    return hashlib.sha256(kind.encode() + sums.numpy().tobytes()).hexdigest()[:16]


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of all weights, whatever their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def packed_size(bucket: Bucket) -> int:
    """Bytes of the bucket in the safetensors format."""
    return len(_header(bucket)) + sum(tensor.nbytes for _, tensor in bucket)


def pack(bucket: Bucket, buffer: Tensor) -> None:
    """Write the bucket into the beginning of `buffer` (uint8, on the host) in the safetensors format."""
    header = _header(bucket)
    buffer[: len(header)].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    place = len(header)
    for _, tensor in bucket:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[place : place + flat.numel()].copy_(flat)
        place += flat.numel()


def _header(bucket: Bucket) -> bytes:
    """Length and JSON of the safetensors header; spaces fill it to a multiple of 8, which aligns what follows."""
    entries, place = {}, 0
    for name, tensor in bucket:
        end = place + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
