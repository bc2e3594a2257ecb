"""Prepare a stage whose sources stream: nothing is tokenised before training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from align.config.parts import Data, FileSource, HubSource, Source, StageSource
from align.data.accepted import ACCEPTED
from align.data.encode import COLUMNS, Encoding, RowEncoder
from align.data.filters.items import evaluation_files
from align.data.report import DataReport
from align.data.rows import Row
from align.data.sources import describe_source, source_chunks, stage_file
from align.data.store.fingerprint import code_fingerprint, library_versions, tokenizer_state
from align.data.store.order import mixture_shares
from align.data.store.stream import Stream, StreamedRows, StreamSource, lazy_rows, mixed_rows
from align.errors import UserError
from align.run.cache import cache_folder, hashed

HELD_OUT_FROM = 20_000
"""Rows of the mixture among which `held_out_fraction` finds the rows that are evaluated."""


@dataclass(frozen=True)
class StreamedReport(DataReport):
    """The counts of a stream up to the row that was read last.

    in_turn: several sources are read one after another.
    """

    stream: Stream | None = None
    in_turn: bool = False

    def to_dict(self) -> dict[str, Any]:
        now = self.now()
        return {field.name: getattr(now, field.name) for field in fields(DataReport)}

    def summary(self) -> str:
        order = "; the sources are read one after another, as none has a weight" if self.in_turn else ""
        return f"the rows stream; they are tokenised and counted while they are read{order}"

    @property
    def passes(self) -> int:
        """Whole passes over the mixture that have been read."""
        assert self.stream is not None
        return self.stream.state.number

    def now(self) -> DataReport:
        """The counts up to now, which do not change any more."""
        assert self.stream is not None
        counts, dropped = self.stream.state.counts, self.stream.state.dropped
        return DataReport(
            rows_held_out=self.rows_held_out,
            held_out_seen=counts["held_out"],
            held_out_from=self.held_out_from,
            fingerprint=self.fingerprint,
            rows_read=counts["read"],
            rows_train=counts["rows"],
            dropped=dict(sorted(dropped.items())),
            truncated=counts["truncated"],
            tokens=counts["tokens"],
            loss_tokens=counts["loss_tokens"],
            split=counts["split"],
        )


def open_stream(
    data: Data, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, seed: int, stage_dirs: Mapping[str, Path]
) -> tuple[StreamedRows, datasets.Dataset | None, DataReport]:
    """(training rows, held-out rows if a fraction is held out, report). Raises `UserError` for unreadable sources."""
    kind = encoding.kind
    sources = [_source(source, encoding, stage_dirs) for source in data.train]
    for source in data.train:  # an error at the start of a source is raised here
        next(source_chunks(source, stage_dirs=stage_dirs, accepted=ACCEPTED[kind]))
    shares = mixture_shares([1] * len(sources), data.train, data.mixture)
    key = {
        "contents": [_identity(source, stage_dirs) for source in data.train],
        "sources": [source.model_dump(mode="json") for source in data.train],
        "settings": [data.mixture.stop, seed, data.held_out_fraction, data.max_length, encoding.kind],
        "filters": [settings.model_dump(mode="json") for settings in encoding.filters],
        "evaluation_sets": _status(evaluation_files(encoding.filters)),
        "tokenizer": tokenizer_state(tokenizer),
        "code": code_fingerprint("stream.py", "order.py"),
        "libraries": [*library_versions(), f"numpy {np.__version__}"],
    }
    passes: Callable[[int], Iterator[Callable[[], Row]]] = partial(mixed_rows, sources, shares, data.mixture.stop, seed)
    stream = Stream(
        passes,
        RowEncoder(encoding, tokenizer),
        name=", ".join(map(describe_source, data.train)),
        marks=cache_folder(data.cache) / "streams" / f"{hashed(key)[:32]}.jsonl",
        held_out_fraction=0.0 if data.held_out else data.held_out_fraction,
        block_length=data.max_length if kind == "text" else None,
    )
    columns = ("input_ids", "labels", "documents") if kind == "text" else COLUMNS[kind]
    held_out, searched = None, 0
    if data.held_out_fraction and not data.held_out:
        found, searched = stream.held_out(HELD_OUT_FROM)
        held_out = _held_out(found, columns, data)
    nothing = DataReport(0, 0, 0 if held_out is None else len(held_out), {}, 0, 0, 0, "", held_out_from=searched)
    return (
        StreamedRows(stream, columns),
        held_out,
        StreamedReport(**vars(nothing), stream=stream, in_turn=shares is None and len(sources) > 1),
    )


def _held_out(rows: list[dict[str, np.ndarray]], columns: tuple[str, ...], data: Data) -> datasets.Dataset:
    if not rows:
        raise UserError(
            f"held_out_fraction {data.held_out_fraction} of the first {HELD_OUT_FROM:,} rows leaves no held-out row. "
            "Raise it, or set `held_out` to sources."
        )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _source(source: Source, encoding: Encoding, stage_dirs: Mapping[str, Path]) -> StreamSource:
    def rows() -> Iterator[Callable[[], Row]]:
        return lazy_rows(source_chunks(source, stage_dirs=stage_dirs, accepted=ACCEPTED[encoding.kind]))

    return StreamSource(source, rows)


def _identity(source: Source, stage_dirs: Mapping[str, Path]) -> Any:
    """Values that differ for a changed source; the source is not read."""
    match source:
        case FileSource():
            return _status(source.files().files)
        case StageSource():
            return _status([stage_file(source, stage_dirs)])
        case HubSource():
            return [source.id, source.name, source.split]
    return source.kind


def _status(files: Sequence[Path]) -> list[list[str | int]]:
    found = [(file.name, file.stat()) for file in files]
    return [[name, status.st_size, status.st_mtime_ns, status.st_ino] for name, status in found]
