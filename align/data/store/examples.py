"""Find rows as they were read: the source row of a token row, and examples of dropped rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from align.data.rows import Row
from align.data.store.entry import Entry
from align.data.store.reading import Reading
from align.data.store.shards import read_counts
from align.data.store.tokenised import TokenisedRows


class SourceRow(NamedTuple):
    """A row as it was read. where: file and line."""

    where: str
    row: Row


def read_row(reading: Reading, entry: Entry, number: int) -> SourceRow:
    """Row `number` of a source. Reads the source up to that row; parses only the row's shard."""
    for shard, group in enumerate(reading.open()):
        count = len(read_counts(entry.folder, shard)[0])
        if number < count:
            return SourceRow(group.where(number), group.rows()[number])
        number -= count
    raise IndexError(number)


def dropped_examples(rows: TokenisedRows, most: int) -> dict[str, SourceRow]:
    """{reason: the first row that was dropped for it}, for the `most` most frequent reasons."""
    found: dict[str, SourceRow] = {}
    common = dict(rows.dropped().most_common(most))
    for reading, entry in zip(rows.readings, rows.entries, strict=True):
        codes = np.asarray(entry.rows["reason"])
        for code, reason in enumerate(entry.reasons):
            if reason not in common or reason in found:
                continue
            if len(places := np.flatnonzero(codes == code)):
                found[reason] = read_row(reading, entry, int(places[0]))
    return found
