"""The token rows of a mixture: entries of the cache and the order of their rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from align.config.filters import DuplicateFilter
from align.config.parts import Mixture, Source
from align.data.encode import Encoding
from align.data.splits import held_out_below
from align.data.store.build import EntryPlan, build_entry, row_counts
from align.data.store.duplicates import without_duplicates
from align.data.store.entry import Entry
from align.data.store.order import Order, chosen_rows, mixed_order
from align.data.store.progress import Show, silent
from align.data.store.reading import Reading, open_source
from align.data.store.shards import TOKENS


@dataclass(frozen=True)
class Store:
    """Cache folder, encoding and tokenizer of rows.

    workers: maximum number of processes; None for one per core.
    show: shows how far a tokenisation is.
    """

    cache: Path
    encoding: Encoding
    tokenizer: PreTrainedTokenizerBase
    workers: int | None = None
    show: Show = silent

    def plan(self, sources: Sequence[Source], stage_dirs: Mapping[str, Path], seed: int) -> list[EntryPlan]:
        """The entries of the sources. Raises `UserError` for a source that does not exist or has other columns."""
        plans = []
        for source in sources:
            reading = open_source(source, self.encoding.kind, stage_dirs, self.cache)
            selected = None
            if source.limit is not None:
                selected = chosen_rows(sum(row_counts(reading, self.cache)), source.limit, seed)
            plan = EntryPlan.of(reading, self.encoding, self.tokenizer, self.cache, selected)
            if not plan.is_built():
                reading.check()
            plans.append(plan)
        return plans

    def mix(self, plans: Sequence[EntryPlan], sources: Sequence[Source], mixture: Mixture, seed: int) -> TokenisedRows:
        """Tokenise what is missing and put the rows of all sources in order."""
        entries = [build_entry(plan, self.workers, self.show) for plan in plans]
        for settings in self.encoding.filters:
            if isinstance(settings, DuplicateFilter):
                entries = without_duplicates(entries, settings, self.cache)
        order = mixed_order([len(entry.rows) for entry in entries], sources, mixture, seed)
        return TokenisedRows([plan.reading for plan in plans], entries, order)


@dataclass(frozen=True)
class TokenisedRows:
    """Rows of several sources in one order, with their token rows."""

    readings: list[Reading]
    entries: list[Entry]
    order: Order

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [reading.name for reading in self.readings]

    def _gather(self, column: str) -> np.ndarray:
        """A column of `ROW` for every row, in order."""
        found = np.zeros(len(self.order), self.entries[0].rows.dtype[column])
        for number, entry in enumerate(self.entries):
            own = self.order.source == number
            found[own] = entry.rows[column][self.order.row[own]]
        return found

    def split(self, fraction: float) -> tuple[TokenisedRows, TokenisedRows]:
        """(training rows, held-out rows), chosen by the hash of the prompt. A held-out row occurs once."""
        held = self._gather("key") < np.uint64(held_out_below(fraction))
        train, held_out = self.order[~held], self.order[held].first_occurrences()
        return replace(self, order=train), replace(self, order=held_out)

    def dropped(self) -> Counter[str]:
        """{reason: dropped rows}."""
        reasons: Counter[str] = Counter()
        codes = self._gather("reason")
        for number, entry in enumerate(self.entries):
            own = codes[(self.order.source == number) & (codes >= 0)]
            for code, count in zip(*np.unique(own, return_counts=True), strict=True):
                reasons[entry.reasons[code]] += int(count)
        return reasons

    def used(self) -> int:
        """Rows that became token rows."""
        return int(np.count_nonzero(self._gather("count")))

    @cached_property
    def indices(self) -> np.ndarray:
        """Numbers of the token rows in order, counted through all entries."""
        starts = np.cumsum([0, *(len(entry.tokens) for entry in self.entries)])
        first = np.zeros(len(self.order), np.int64)
        for number, entry in enumerate(self.entries):
            own = self.order.source == number
            first[own] = starts[number] + entry.first()[self.order.row[own]]
        counts = self._gather("count").astype(np.int64)
        before = np.cumsum(counts) - counts
        return np.repeat(first - before, counts) + np.arange(counts.sum())

    @cached_property
    def tokens(self) -> np.ndarray:
        """One `TOKENS` per token row, in order."""
        every = np.concatenate([np.zeros(0, TOKENS), *(entry.tokens for entry in self.entries)])
        return np.asarray(every[self.indices])

    def labels(self) -> np.ndarray | None:
        """True for each desirable token row, in order; None for rows without a label."""
        table = self.table()
        if "label" not in table.column_names:
            return None
        values = pc.list_flatten(table.column("label")).to_numpy()
        return np.asarray(values[self.indices] == 1)

    def sources(self) -> np.ndarray:
        """Number of each token row's source."""
        ends = np.cumsum([len(entry.tokens) for entry in self.entries])
        return np.searchsorted(ends, self.indices, side="right")

    def table(self) -> pa.Table:
        """The token rows of all entries, memory-mapped; `indices` gives their order."""
        return pa.concat_tables(entry.table() for entry in self.entries)

    def dataset(self) -> datasets.Dataset:
        """The token rows in order, memory-mapped."""
        order = pa.table({"indices": pa.array(self.indices, pa.uint64())})
        fingerprint = hashlib.sha256(self.tokens["digest"].tobytes()).hexdigest()[:16]
        return datasets.Dataset(
            InMemoryTable(self.table()), indices_table=InMemoryTable(order), fingerprint=fingerprint
        )


Rows = datasets.Dataset
"""Token rows in order, memory-mapped."""


def list_lengths(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Length of the list in each row of a column; reads no token."""
    lengths = pc.list_value_length(dataset.data.column(column)).to_numpy()
    if dataset._indices is None:
        return np.asarray(lengths)
    return np.asarray(lengths[dataset._indices.column(0).to_numpy()])


def single_values(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """The value in each row of a column of lists with one value, such as `label`."""
    values = pc.list_flatten(dataset.data.column(column)).to_numpy()
    return np.asarray(values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()])


def list_hashes(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """64-bit hash of the list in each row of a column."""
    found = []
    for chunk in dataset.data.column(column).chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        lists = (values[start:end].tobytes() for start, end in pairwise(ends))
        found += [int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "big") for part in lists]
    hashes = np.array(found, np.uint64)
    return hashes if dataset._indices is None else np.asarray(hashes[dataset._indices.column(0).to_numpy()])
