"""Prompts for generation, read from the store when they are needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa

from align.data.shapes import Message
from align.data.store.tokenised import TokenisedRows


@dataclass(frozen=True)
class PromptRow:
    """A prompt for generation.

    ids        tokens of the prompt and of the header of the assistant's turn
    messages   the prompt as messages
    reference  reference answer, if the data has one
    row        the row as read, for reward functions
    variables  keyword arguments for the chat template
    """

    ids: tuple[int, ...]
    messages: list[Message]
    reference: str | None
    row: dict[str, Any] = field(repr=False)
    variables: dict[str, Any] = field(default_factory=dict, repr=False)


class PromptRows(Sequence[PromptRow]):
    """Prompts in order, parsed one at a time from the memory-mapped store."""

    def __init__(self, rows: TokenisedRows):
        self.rows, self._table, self._order = rows, rows.table(), rows.indices
        self._offsets = np.cumsum([0, *(chunk.num_rows for chunk in self._table.to_batches())])
        self._batches: list[pa.RecordBatch] = self._table.to_batches()
        # A column that one source or row has and another lacks is None there.
        self._columns = dict.fromkeys(column for entry in rows.entries for column in entry.columns)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptRow]: ...
    def __getitem__(self, index: int | slice) -> PromptRow | list[PromptRow]:
        if isinstance(index, slice):
            return [self._read(number) for number in self._order[index]]
        return self._read(self._order[index])

    def _read(self, number: int) -> PromptRow:
        batch = int(np.searchsorted(self._offsets, number, side="right")) - 1
        (found,) = self._batches[batch].slice(int(number - self._offsets[batch]), 1).to_pylist()
        row = self._columns | json.loads(found["row"])
        texts = {name: json.loads(found[name]) for name in ("messages", "reference", "variables")}
        return PromptRow(tuple(found["input_ids"]), row=row, **texts)
