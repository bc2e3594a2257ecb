"""Documents concatenated and split into rows of equal length, for pretraining; written once and memory-mapped."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from align.data.store.cache import hashed, locked, mark_used, writing
from align.data.store.tokenised import TokenisedRows

_BATCH = 1024
"""Documents or rows that are in memory at a time."""
_FILE = "blocks.arrow"


def block_lengths(tokens: int, length: int) -> list[int]:
    """Lengths of the rows of a stream of tokens. A last row of one token has no token to predict and is left out."""
    whole, rest = divmod(tokens, length)
    return [length] * whole + [rest] * (rest > 1)


def blocks(documents: TokenisedRows, length: int, cache: Path) -> datasets.Dataset:
    """Rows of `length` tokens (input_ids = labels) of the concatenated documents."""
    digests = hashlib.sha256(documents.tokens["digest"].tobytes()).hexdigest()
    key = hashed(["blocks", digests, length])[:32]
    folder = cache / "entries" / key
    with ExitStack() as stack, writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        mark_used(folder)
        if not (folder / _FILE).exists():
            _write(folder / _FILE, documents, length)
    table = pa.ipc.open_file(pa.memory_map(str(folder / _FILE))).read_all()
    ids = table.column("input_ids")
    return datasets.Dataset(InMemoryTable(pa.table({"input_ids": ids, "labels": ids})), fingerprint=key[:16])


def _write(path: Path, documents: TokenisedRows, length: int) -> None:
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    column = documents.table().column("input_ids")
    rest = np.zeros(0, np.int32)
    temporary = path.with_name(path.name + ".new")
    with pa.ipc.new_file(str(temporary), schema) as writer:
        for start in range(0, len(documents.indices), _BATCH):
            taken = column.take(pa.array(documents.indices[start : start + _BATCH]))
            rest = np.concatenate([rest, *(chunk.flatten().to_numpy() for chunk in taken.chunks)])
            whole = len(rest) // length * length
            _append(writer, rest[:whole], [length] * (whole // length))
            rest = rest[whole:]
        if len(rest) > 1:
            _append(writer, rest, [len(rest)])
    temporary.replace(path)


def _append(writer: pa.RecordBatchFileWriter, tokens: np.ndarray, lengths: list[int]) -> None:
    if lengths:
        ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
        lists = pa.ListArray.from_arrays(ends, pa.array(tokens, pa.int32()))
        writer.write_batch(pa.record_batch([lists], names=["input_ids"]))
