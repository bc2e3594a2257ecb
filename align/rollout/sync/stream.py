"""Named weights between trainer and engine: split into buckets, packed as safetensors, digested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Bucket = list[tuple[str, Tensor]]
"""(name, tensor) pairs that are sent together."""

ROW = 1024
"""64-bit words per row in `digest`."""
KEPT = ("correction_bias", "expert_bias")
"""Name suffixes of tensors that keep their dtype. Routers add these biases to scores that may differ by less than the
rounding error of bf16."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""Names of dtypes in the safetensors format."""


def buckets(stream: Iterable[tuple[str, Tensor]], size: int, dtype: torch.dtype) -> Iterator[Bucket]:
    """Cast a stream of tensors to `dtype`, except for `KEPT`, and split it into buckets of at most `size` bytes.

    A larger tensor is a bucket of its own.
    """
    bucket: Bucket = []
    filled = 0
    for name, tensor in stream:
        cast = tensor.detach() if name.endswith(KEPT) else tensor.detach().to(dtype)
        if bucket and filled + cast.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, cast))
        filled += cast.nbytes
    if bucket:
        yield bucket


def digest(tensor: Tensor) -> str:
    """Digest of a tensor's dtype, shape and bits, 16 hex digits.

    The bits are read as 64-bit words in rows of 1024, and the sums of all rows and all columns modulo 2^64 are hashed.
    A changed, moved or missing value changes the digest. The digest is computed on the tensor's device, at about memory
    bandwidth. It guards against errors, not against an adversary.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    missing = -octets.numel() % 8
    if missing or octets.storage_offset() % 8:
        octets = torch.cat((octets, octets.new_zeros(missing)))
    words = octets.view(torch.int64)
    whole = words.numel() // ROW * ROW
    grid = words[:whole].view(-1, ROW)
    sums = torch.cat((grid.sum(0), grid.sum(1), words[whole:])).cpu()
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    return hashlib.sha256(kind.encode() + sums.numpy().tobytes()).hexdigest()[:16]


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of all weights, independent of their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def packed_size(bucket: Bucket) -> int:
    """Size of the bucket in the safetensors format, in bytes."""
    return len(_header(bucket)) + sum(tensor.nbytes for _, tensor in bucket)


def pack(bucket: Bucket, buffer: Tensor) -> None:
    """Write the bucket in the safetensors format to the start of `buffer` (uint8, on the host)."""
    header = _header(bucket)
    buffer[: len(header)].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    place = len(header)
    for _, tensor in bucket:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[place : place + flat.numel()].copy_(flat)
        place += flat.numel()


def _header(bucket: Bucket) -> bytes:
    """Safetensors header with its length, padded with spaces to a multiple of 8 so that the tensors are aligned."""
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
