"""A shard: the token rows of one chunk as an Arrow file, and counts per row beside it.

00042.arrow        token rows; lists of int32, or JSON text
00042.rows.npy     one `ROW` per row of the chunk
00042.tokens.npy   one `TOKENS` per token row
00042.grams.npy    n-grams of the rows, one after another; only with a filter of near duplicates
00042.json         sizes of the three files, reasons and columns; written last, so a shard without it is incomplete
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align.config.filters import DuplicateFilter
from align.data.accepted import ACCEPTED, Kind
from align.data.encode import COLUMNS, Encoded, RowEncoder, is_ids
from align.data.filters.grams import Hashes, text_grams, text_hash, with_label
from align.data.filters.texts import texts_of
from align.data.rows import Row
from align.data.shapes import DropRow, shape_of, unused_columns
from align.data.splits import key_hash
from align.data.store.reading import ChunkGroup
from align.run.cache import read_json, write_atomically, writing

ROW = np.dtype([("count", "i4"), ("reason", "i4"), ("key", "u8"), ("text", "u8"), ("grams", "i4")])
"""count: token rows. reason: index into the reasons, USED or UNREAD. key: hash of the prompt, 0 for a dropped row.
text: hash of text and label, for finding duplicates, 0 without such a filter or a text. grams: number of its
n-grams in grams.npy."""
TOKENS = np.dtype([("tokens", "i4"), ("loss", "i4"), ("truncated", "?"), ("split", "?"), ("digest", "u8")])
"""tokens, loss: counts of tokens. digest: hash of the ids and labels."""
USED, UNREAD = -1, -2
"""`ROW.reason` of a row that became token rows, and of one that `limit` left out."""
SUFFIXES = (".arrow", ".rows.npy", ".tokens.npy")
GRAMS = ".grams.npy"


@dataclass(frozen=True)
class ShardWriter:
    """Encodes chunks and writes their shards into the folder of an entry."""

    folder: Path
    kind: Kind
    encoder: RowEncoder
    duplicates: DuplicateFilter | None = None

    def write(self, number: int, chunk: ChunkGroup, selected: np.ndarray | None) -> int:
        """Write shard `number` and return the number of rows that were encoded.

        selected: indices of the rows of the chunk to encode; None for all.
        """
        rows, names = chunk.rows_and_names()
        used = range(len(rows)) if selected is None else selected.tolist()
        columns, unused, reasons = Counter[str](), Counter[str](), dict[str, int]()
        table, encoded, escaped = np.zeros(len(rows), ROW), list[Encoded](), self.encoder.escaped
        table["reason"] = UNREAD
        grams = [np.zeros(0, np.uint64)]
        for index, result in zip(used, self.encoder([rows[index] for index in used]), strict=True):
            row = rows[index]
            columns.update(name for name, value in row.items() if value is not None)
            if (shape := shape_of(row, ACCEPTED[self.kind])) is not None:
                unused.update(unused_columns(row, shape))
            if isinstance(result, DropRow):
                table[index]["reason"] = reasons.setdefault(str(result), len(reasons))
            else:
                text, own = self._compared(row, result)
                grams.append(own)
                table[index] = (len(result), USED, key_hash(result[0].key), text, len(own))
                encoded += result
        count = self.encoder.escaped - escaped
        facts = {"reasons": list(reasons), "columns": columns, "unused": unused, "escaped": count}
        facts |= {"encoded": len(used), "names": names, "too_short": self.encoder.too_short}
        self._save(number, table, encoded, np.concatenate(grams), facts)
        return len(used)

    def _compared(self, row: Row, encoded: list[Encoded]) -> tuple[int, Hashes]:
        """(hash of the row's text, its n-grams), as far as duplicates are found by them; of a row with a label, both
        with the label."""
        if self.duplicates is None:
            return 0, np.zeros(0, np.uint64)
        text = texts_of(row, ACCEPTED[self.kind]).part(self.duplicates.part)
        found, grams = text_hash(text), np.zeros(0, np.uint64)
        if self.duplicates.near is not None:
            grams = text_grams(text)
        labels = [label for made in encoded for label in made.columns.get("label", ())]
        if len(labels) != 1:  # a pair has both
            return found, grams
        return found and int(with_label([found], labels[0])[0]), with_label(grams, labels[0])

    def _save(
        self, number: int, rows: np.ndarray, encoded: list[Encoded], grams: Hashes, facts: Mapping[str, Any]
    ) -> None:
        tokens = np.array([(e.tokens, e.loss_tokens, e.truncated, e.split, _digest(e)) for e in encoded], TOKENS)
        contents = {".arrow": _arrow(self.kind, encoded), ".rows.npy": _npy(rows), ".tokens.npy": _npy(tokens)}
        if self.duplicates is not None and self.duplicates.near is not None:
            contents[GRAMS] = _npy(grams)
        stem = self.folder / f"{number:05d}"
        with writing(self.folder):
            for suffix, content in contents.items():
                write_atomically(stem.with_name(stem.name + suffix), content)
            sizes = {suffix: len(content) for suffix, content in contents.items()}
            marker = json.dumps({"sizes": sizes, "rows": len(rows), "token_rows": len(encoded), **facts})
            write_atomically(stem.with_name(stem.name + ".json"), marker.encode())


def _digest(encoded: Encoded) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(encoded.columns):
        if is_ids(name):
            ids = encoded.columns[name]
            digest.update(f"{name}{len(ids)}:".encode() + ids.tobytes())
    return int.from_bytes(digest.digest(), "big")


def _arrow(kind: Kind, encoded: list[Encoded]) -> bytes:
    arrays = {}
    for name in COLUMNS[kind]:
        values = [row.columns[name] for row in encoded]
        arrays[name] = _lists(values) if is_ids(name) else pa.array(values, pa.large_string())
    sink = pa.BufferOutputStream()
    table = pa.table(arrays)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _lists(values: list[np.ndarray]) -> pa.Array:
    """Lists of int32, which take half the memory of Arrow's default, int64."""
    ends = np.cumsum([0, *map(len, values)])
    items = pa.array(np.concatenate([np.zeros(0, np.int32), *values]))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


# --- reading ----------------------------------------------------------------------------------------------


def shard_facts(folder: Path, number: int) -> dict[str, Any] | None:
    """Content of a shard's JSON file; None if the shard is missing, incomplete or damaged."""
    stem = folder / f"{number:05d}"
    facts = read_json(stem.with_name(stem.name + ".json"))
    if not isinstance(facts, dict):
        return None
    try:
        sizes = {suffix: facts["sizes"][suffix] for suffix in {*SUFFIXES, *facts["sizes"]}}
        if any(stem.with_name(stem.name + suffix).stat().st_size != size for suffix, size in sizes.items()):
            return None
        read_tokens(folder, number)
    except (OSError, KeyError, pa.ArrowException):
        return None
    return facts


def read_tokens(folder: Path, number: int) -> pa.Table:
    """The token rows of a shard, memory-mapped. Raises `pa.ArrowException` or `OSError` for a damaged file."""
    return pa.ipc.open_file(pa.memory_map(str(folder / f"{number:05d}.arrow"))).read_all()


def read_counts(folder: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(ROW per row, TOKENS per token row) of a shard."""
    stem = f"{number:05d}"
    return np.load(folder / f"{stem}.rows.npy"), np.load(folder / f"{stem}.tokens.npy")


def read_grams(folder: Path, number: int) -> np.ndarray:
    """The n-grams of a shard's rows, memory-mapped; `ROW.grams` says how many each row has."""
    grams: np.ndarray = np.load(folder / f"{number:05d}{GRAMS}", mmap_mode="r")
    return grams
