"""An entry of the cache: the token rows of one source, as it was encoded for one kind of trainer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align.data.store.shards import ROW, TOKENS, UNREAD, USED, read_counts, read_grams, read_tokens, shard_facts
from align.run.cache import read_json, write_atomically, writing

SEAL = "entry.json"
_ROWS, _TOKENS = "rows.npy", "tokens.npy"


@dataclass(frozen=True)
class Entry:
    """The token rows of a source, memory-mapped.

    rows     one `ROW` per row of the source, in file order
    tokens   one `TOKENS` per token row, in the order of the rows
    reasons  reasons of the dropped rows; `rows["reason"]` indexes them
    columns  {column: rows that have it}
    unused   {column: rows that have it} of the columns that the stage does not read
    names    {`setting: name`: rows with the column or role}, of the source's settings; see `Adapter.names`
    too_short  {evaluation set: items with too few words to be found by the filter of contamination}
    escaped  rows with a text that would have become a control token
    shards   number of shards
    starts   index of each row's first token row; None if every row has those that were encoded
    """

    folder: Path
    rows: np.ndarray
    tokens: np.ndarray
    reasons: list[str]
    columns: dict[str, int]
    unused: dict[str, int]
    names: dict[str, int]
    too_short: dict[str, int]
    escaped: int
    shards: int
    starts: np.ndarray | None = None

    def first(self) -> np.ndarray:
        """Index of each row's first token row."""
        if self.starts is not None:
            return self.starts
        counts = self.rows["count"].astype(np.int64)
        return np.cumsum(counts) - counts

    def without(self, dropped: np.ndarray, reason: str) -> Entry:
        """The entry without the token rows of some rows. dropped: numbers of these rows."""
        rows = np.array(self.rows)
        rows["count"][dropped], rows["reason"][dropped] = 0, len(self.reasons)
        return replace(self, rows=rows, reasons=[*self.reasons, reason], starts=self.first())

    def grams(self) -> list[np.ndarray]:
        """The n-grams of each row, memory-mapped; see `align.data.filters.duplicates`."""
        found: list[np.ndarray] = []
        for number in range(self.shards):
            own = read_counts(self.folder, number)[0]["grams"]
            found += np.split(read_grams(self.folder, number), np.cumsum(own)[:-1]) if len(own) else []
        return found

    def table(self) -> pa.Table:
        """All token rows, memory-mapped."""
        return pa.concat_tables(read_tokens(self.folder, number) for number in range(self.shards))


def open_entry(folder: Path) -> Entry | None:
    """The entry; None if it is missing, incomplete or damaged."""
    seal = read_json(folder / SEAL)
    if not isinstance(seal, dict) or "shards" not in seal:
        return None
    shards = len(seal["shards"])
    if [(facts or {}).get("sizes") for facts in (shard_facts(folder, n) for n in range(shards))] != seal["shards"]:
        return None
    try:
        rows, tokens = (np.load(folder / name, mmap_mode="r") for name in (_ROWS, _TOKENS))
    except (OSError, ValueError, EOFError):
        return None
    if (len(rows), len(tokens)) != (seal["rows"], seal["token_rows"]):
        return None
    counts = {name: seal[name] for name in ("reasons", "columns", "unused", "names", "too_short", "escaped")}
    return Entry(folder, rows, tokens, **counts, shards=shards)


def seal_entry(folder: Path, shards: int, origin: dict[str, Any]) -> None:
    """Join the counts of the shards and mark the entry as complete. origin: what determined it, for people to read."""
    reasons: dict[str, int] = {}
    columns, unused, names = Counter[str](), Counter[str](), Counter[str]()
    too_short: dict[str, int] = {}
    escaped, sizes, all_rows, all_tokens = 0, [], [np.zeros(0, ROW)], [np.zeros(0, TOKENS)]
    for number in range(shards):
        facts = shard_facts(folder, number)
        assert facts is not None, f"{folder} lost shard {number} while it was built"
        rows, tokens = read_counts(folder, number)
        # The shard's own numbers of its reasons become those of the entry.
        numbers = [reasons.setdefault(reason, len(reasons)) for reason in facts["reasons"]]
        rows["reason"] = np.array([*numbers, UNREAD, USED], "i4")[rows["reason"]]
        columns.update(facts["columns"])
        unused.update(facts["unused"])
        names.update(facts["names"])
        too_short.update(facts["too_short"])
        escaped += facts["escaped"]
        sizes.append(facts["sizes"])
        all_rows.append(rows)
        all_tokens.append(tokens)
    rows, tokens = np.concatenate(all_rows), np.concatenate(all_tokens)
    with writing(folder):
        for name, values in ((_ROWS, rows), (_TOKENS, tokens)):
            with open(folder / f"{name}.new", "wb") as file:
                np.save(file, values)
            (folder / f"{name}.new").replace(folder / name)
        seal = {
            "origin": origin,
            "shards": sizes,
            "rows": len(rows),
            "token_rows": len(tokens),
            "reasons": list(reasons),
            "columns": columns,
            "unused": unused,
            "names": names,
            "too_short": too_short,
            "escaped": escaped,
        }
        write_atomically(folder / SEAL, json.dumps(seal, indent=1).encode())
