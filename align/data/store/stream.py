"""Stream a mixture without reading it first: bounded memory, and the same rows again from any position.

The stream is a function of the sources, the settings and the seed. Rows are shuffled within blocks of `SHUFFLE_BUFFER`
rows of a source; the mixture draws the source of each row. After the last row of a pass, the next pass begins, in
another order. Every rank reads the same stream, so the number of ranks does not matter.

To resume, the stream returns to the last mark before a row: counts of rows per source, of draws and of results. It then
skips the rows before the mark without tokenising them. Marks are kept in the cache folder. Without them the stream is
tokenised again from its start, with the same result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.config.parts import Source
from align.data.encode import Encoded, RowEncoder
from align.data.files import Chunk, ObjectChunk
from align.data.files.chunk import TextChunk
from align.data.rows import Row
from align.data.shapes import DropRow
from align.data.sources import SourceChunk
from align.data.splits import held_out_below, key_hash
from align.errors import UserError
from align.run.cache import writing

SHUFFLE_BUFFER = 10_000
"""Rows of a source that are shuffled together."""
BATCH = 256
"""Source rows that are encoded together; a mark is possible after each batch."""
MARK_EVERY = 1000
"""Token rows between two marks."""
UNBOUNDED = 2**40
"""Length of a data set that streams."""


@dataclass
class State:
    """Position of the stream: counters, and the tokens that await the next block.

    rows: token rows so far. number: pass over the mixture. batches: batches drawn in this pass.
    counts: read, truncated, tokens, loss_tokens, split and held_out rows so far. dropped: {reason: rows} so far.
    rest: tokens that do not fill a block yet. documents: number of tokens of each document among them.
    """

    rows: int = 0
    number: int = 0
    batches: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rest: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    def copy(self) -> State:
        return State.from_json(json.loads(json.dumps(self.to_json())))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "counts": dict(self.counts), "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> State:
        return cls(**{**values, "counts": Counter(values["counts"]), "dropped": Counter(values["dropped"])})


@dataclass(frozen=True)
class StreamSource:
    """A source of a stream.

    open: yields the rows in file order, each not yet parsed. A call of the item parses it.
    """

    source: Source
    open: Callable[[], Iterator[Callable[[], Row]]]

    def rows(self, seed: int, number: int) -> Iterator[Callable[[], Row]]:
        """The rows of one pass, shuffled within blocks."""
        generator, block = np.random.default_rng([seed, number]), list[Callable[[], Row]]()
        for row in self._limited():
            block.append(row)
            if len(block) == SHUFFLE_BUFFER:
                yield from (block[place] for place in generator.permutation(len(block)))
                block = []
        yield from (block[place] for place in generator.permutation(len(block)))

    def _limited(self) -> Iterator[Callable[[], Row]]:
        whole, rest = divmod(self.source.epochs, 1)
        for _ in range(int(whole)):
            yield from self._first_rows()
        if rest:
            count = sum(1 for _ in self._first_rows())
            count = round(rest * count) if whole else max(1, round(rest * count))
            for index, row in enumerate(self._first_rows()):
                if index >= count:
                    break
                yield row

    def _first_rows(self) -> Iterator[Callable[[], Row]]:
        limit = self.source.limit
        for index, row in enumerate(self.open()):
            if limit is not None and index == limit:
                return
            yield row


def mixed_rows(
    sources: Sequence[StreamSource], shares: Sequence[float] | None, stop: str, seed: int, number: int
) -> Iterator[Callable[[], Row]]:
    """The rows of one pass over the mixture. shares: probability of each source; None to read one after another."""
    if shares is None:
        for place, source in enumerate(sources):
            yield from source.rows(seed + place, number)
        return
    generator = np.random.default_rng([seed, number, len(sources)])
    open_rows = [source.rows(seed + place, number) for place, source in enumerate(sources)]
    ended = [False] * len(sources)
    again = [0] * len(sources)
    while True:
        for place in generator.choice(len(sources), size=1000, p=list(shares)):
            if ended[place] and stop == "all_exhausted_without_replacement":
                continue
            row = next(open_rows[place], None)
            if row is None:
                ended[place] = True
                if stop == "first_exhausted" or all(ended):
                    return
                if stop == "all_exhausted_without_replacement":
                    continue
                again[place] += 1
                open_rows[place] = sources[place].rows(seed + place, number + 1_000_003 * again[place])
                row = next(open_rows[place], None)
                if row is None:
                    return
            yield row


class Stream:
    """Token rows of a mixture by number. Rows are meant to be read in ascending order.

    passes: yields the rows of a pass, by its number.
    block_length: join the tokens of all rows and split them into blocks of this length; None to keep rows.
    held_out_fraction: fraction of prompts whose rows are skipped; their rows are held out.
    marks: file of the marks.
    """

    def __init__(
        self,
        passes: Callable[[int], Iterator[Callable[[], Row]]],
        encoder: RowEncoder,
        *,
        name: str,
        marks: Path,
        held_out_fraction: float = 0.0,
        block_length: int | None = None,
    ):
        self._passes, self._encoder, self._name = passes, encoder, name
        self._held_below, self._block_length, self._marks_file = held_out_below(held_out_fraction), block_length, marks
        self.state = State()
        self._marks = [State(), *_read_marks(marks)]
        self._coming = self._token_rows(State())

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Token row `number`: {column: ids [T]}."""
        mark = max((mark for mark in self._marks if mark.rows <= number), key=lambda mark: mark.rows)
        if number < self.state.rows or mark.rows > self.state.rows:
            self._coming = self._token_rows(mark.copy())
        for row in self._coming:
            if self.state.rows == number + 1:
                return row
        raise AssertionError("a stream has no end")

    def held_out(self, source_rows: int) -> tuple[list[dict[str, np.ndarray]], int]:
        """(held-out token rows, rows read): at least the first `source_rows` rows of the mixture, in whole batches."""
        found: list[Encoded] = []
        read = 0
        rows = self._passes(0)
        for _ in range(0, source_rows, BATCH):
            batch = [row() for _, row in zip(range(BATCH), rows)]
            read += len(batch)
            for result in self._encoder(batch):
                if not isinstance(result, DropRow):
                    found += [row for row in result if key_hash(row.key) < self._held_below]
        return list(self._blocks(State(), found)), read

    def _token_rows(self, state: State) -> Iterator[dict[str, np.ndarray]]:
        self.state, marked = state, state.rows
        while True:
            first, used_before, rows = state.batches == 0, state.counts["rows"], self._passes(state.number)
            for _ in range(state.batches * BATCH):
                next(rows, None)
            while batch := [row() for _, row in zip(range(BATCH), rows)]:
                used = self._count(state, batch)
                for columns in self._blocks(state, used):
                    state.rows += 1
                    yield columns
                state.batches += 1
                if state.rows >= marked + MARK_EVERY:
                    marked = state.rows
                    self._mark(state)
            if first and state.counts["rows"] == used_before:
                raise self._nothing_left(state)
            state.number, state.batches = state.number + 1, 0

    def _count(self, state: State, batch: Sequence[Row]) -> list[Encoded]:
        """Encode a batch; returns the token rows to train on."""
        used: list[Encoded] = []
        state.counts["read"] += len(batch)
        for result in self._encoder(batch):
            if isinstance(result, DropRow):
                state.dropped[str(result)] += 1
            elif key_hash(result[0].key) < self._held_below:
                state.counts["held_out"] += len(result)
            else:
                used += result
        for row in used:
            added = {"rows": 1, "tokens": row.tokens, "loss_tokens": row.loss_tokens}
            state.counts.update(added | {"truncated": int(row.truncated), "split": int(row.split)})
        return used

    def _blocks(self, state: State, used: Sequence[Encoded]) -> Iterator[dict[str, np.ndarray]]:
        if self._block_length is None:
            yield from (row.columns for row in used)
            return
        length = self._block_length
        documents = [row.columns["input_ids"] for row in used]
        tokens = np.concatenate([np.array(state.rest, np.int32), *documents])
        ends = np.cumsum([*state.documents, *map(len, documents)])
        whole = len(tokens) // length * length
        state.rest, state.documents = tokens[whole:].tolist(), _pieces(ends, whole, len(tokens))
        for start in range(0, whole, length):
            block = tokens[start : start + length]
            pieces = np.array(_pieces(ends, start, start + length), np.int32)
            yield {"input_ids": block, "labels": block, "documents": pieces}

    def _mark(self, state: State) -> None:
        """Keep the position, in memory and in the cache folder. One rank of each machine writes."""
        if state.rows <= self._marks[-1].rows:
            return
        self._marks.append(state.copy())
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with writing(self._marks_file.parent):
                self._marks_file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._marks_file, "a", encoding="ascii") as file:
                    file.write(json.dumps(state.to_json()) + "\n")

    def _nothing_left(self, state: State) -> UserError:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in state.dropped.most_common())
        return UserError(
            f"{self._name}: all rows of the stream were dropped ({reasons or 'no rows'}). Correct the rows."
        )


def _pieces(ends: np.ndarray, start: int, stop: int) -> list[int]:
    """Lengths of the documents, or parts of them, between two places of a sequence in which documents end at `ends`."""
    inner = ends[(ends > start) & (ends < stop)]
    lengths: list[int] = np.diff([start, *inner, stop]).tolist() if stop > start else []
    return lengths


def _read_marks(file: Path) -> list[State]:
    """The marks of earlier runs. A line that a kill left incomplete ends the list."""
    marks: list[State] = []
    for line in file.read_text(encoding="ascii", errors="replace").splitlines() if file.exists() else ():
        try:
            mark = State.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError):
            break
        if not marks or mark.rows > marks[-1].rows:
            marks.append(mark)
    return marks


class LazyChunk:
    """A chunk that is parsed when a row of it is needed."""

    def __init__(self, chunk: Chunk):
        self._chunk = chunk
        self._rows: list[Row] | None = None

    def __len__(self) -> int:
        inner = self._chunk.chunk if isinstance(self._chunk, SourceChunk) else self._chunk
        match inner:
            case TextChunk():
                return len(inner.texts)
            case ObjectChunk():
                return len(inner.objects)
        return len(self.rows())

    def rows(self) -> list[Row]:
        """The rows, parsed once."""
        if self._rows is None:
            self._rows = self._chunk.rows()
        return self._rows


def lazy_rows(chunks: Iterable[Chunk]) -> Iterator[Callable[[], Row]]:
    """The rows of chunks, each parsed by a call."""
    for chunk in map(LazyChunk, chunks):
        for index in range(len(chunk)):
            yield partial(_row, chunk, index)


def _row(chunk: LazyChunk, index: int) -> Row:
    return chunk.rows()[index]


class StreamedRows:
    """A stream as a trainer reads it: rows by number, in ascending order. It has no end; `max_steps` ends a stage."""

    def __init__(self, stream: Stream, columns: Sequence[str]):
        self.stream, self.column_names = stream, list(columns)

    def __len__(self) -> int:
        return UNBOUNDED

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = self.stream[number]
        return {name: row[name].tolist() for name in self.column_names}

    def select_columns(self, columns: Sequence[str]) -> StreamedRows:
        """The same stream with some of its columns."""
        return StreamedRows(self.stream, columns)
