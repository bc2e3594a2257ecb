"""Documents concatenated and split into rows of equal length, for pretraining; written once and memory-mapped.

A row has the documents' tokens and the number of tokens of each document, or part of one, in the row.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from align.data.store.cache import mark_used
from align.data.store.tokenised import TokenisedRows
from align.run.cache import hashed, locked, writing

_BATCH = 1024
"""Documents or rows that are in memory at a time."""
_FILE = "blocks.arrow"
_VERSION = 2
"""Part of the key; to be raised when the files change."""


def block_lengths(tokens: int, length: int) -> list[int]:
    """Lengths of the rows of a stream of tokens. A last row of one token has no token to predict and is left out."""
    whole, rest = divmod(tokens, length)
    return [length] * whole + [rest] * (rest > 1)


def blocks(documents: TokenisedRows, length: int, cache: Path) -> datasets.Dataset:
    """Rows of `length` tokens (input_ids = labels) of the concatenated documents, with the column `documents`."""
    digests = hashlib.sha256(documents.tokens["digest"].tobytes()).hexdigest()
    key = hashed(["blocks", _VERSION, digests, length])[:32]
    folder = cache / "entries" / key
    with ExitStack() as stack, writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        mark_used(folder)
        if not (folder / _FILE).exists():
            _write(folder / _FILE, documents, length)
    table = pa.ipc.open_file(pa.memory_map(str(folder / _FILE))).read_all()
    ids = table.column("input_ids")
    columns = {"input_ids": ids, "labels": ids, "documents": table.column("documents")}
    return datasets.Dataset(InMemoryTable(pa.table(columns)), fingerprint=key[:16])


def _write(path: Path, documents: TokenisedRows, length: int) -> None:
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "documents": pa.list_(pa.int32())})
    column = documents.table().column("input_ids")
    rest, begins = np.zeros(0, np.int32), np.zeros(0, bool)  # begins: True at a document's first token
    temporary = path.with_name(path.name + ".new")
    with pa.ipc.new_file(str(temporary), schema) as writer:
        for start in range(0, len(documents.indices), _BATCH):
            for chunk in column.take(pa.array(documents.indices[start : start + _BATCH])).chunks:
                tokens, sizes = chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy()
                first = np.zeros(len(tokens), bool)
                first[np.cumsum(sizes[sizes > 0]) - sizes[sizes > 0]] = True
                rest, begins = np.concatenate([rest, tokens]), np.concatenate([begins, first])
            whole = len(rest) // length * length
            _append(writer, rest[:whole], begins[:whole], [length] * (whole // length))
            rest, begins = rest[whole:], begins[whole:]
        if len(rest) > 1:
            _append(writer, rest, begins, [len(rest)])
    temporary.replace(path)


def _append(writer: pa.RecordBatchFileWriter, tokens: np.ndarray, begins: np.ndarray, lengths: list[int]) -> None:
    if not lengths:
        return
    ends = np.cumsum([0, *lengths])
    begins = begins.copy()
    begins[ends[:-1]] = True  # a row begins with a document or with the rest of one
    starts = np.flatnonzero(begins)
    pieces = np.diff([*starts, len(tokens)])
    rows = (_lists(tokens, ends), _lists(pieces, np.searchsorted(starts, ends)))
    writer.write_batch(pa.record_batch(list(rows), names=["input_ids", "documents"]))


def _lists(values: np.ndarray, ends: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int32()))
