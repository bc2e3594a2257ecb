"""Read the rows of a mixture one at a time, without tokenising them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np

from align.config.parts import Mixture, RowSource, Source
from align.data.rows import Row
from align.data.sources import source_chunks
from align.data.store.order import mixed_order


def mixture_rows(
    sources: Sequence[Source], *, seed: int, stage_dirs: Mapping[str, Path] | None = None
) -> Iterator[Row]:
    """The rows of a mixture in bounded memory: source by source, in the order of the files.

    A row that the mixture leaves out is not among them, and one that it repeats occurs as often. A source that streams
    has its first `limit` rows.
    """

    def read(source: Source) -> Iterator[Row]:
        rows = (row for chunk in source_chunks(source, stage_dirs=stage_dirs) for row in chunk.rows())
        return islice(rows, source.limit) if _streams(source) else rows

    if not any(map(_chosen, sources)):
        yield from chain.from_iterable(map(read, sources))
        return
    sizes = [sum(1 for _ in read(source)) for source in sources]
    settings = [source.model_copy(update={"limit": None}) if _streams(source) else source for source in sources]
    order = mixed_order(sizes, settings, Mixture(), seed)
    for number, source in enumerate(sources):
        times = np.bincount(order.row[order.source == number], minlength=sizes[number])
        yield from chain.from_iterable(map(repeat, read(source), times.tolist()))


def _streams(source: Source) -> bool:
    return isinstance(source, RowSource) and source.streaming


def _chosen(source: Source) -> bool:
    """True if the rows of the mixture may not be all rows of the source, each once."""
    return (
        "weight" in source.model_fields_set or source.epochs != 1 or (source.limit is not None and not _streams(source))
    )
