"""Apply the settings of a source to its rows: ignored and renamed columns, the format, other names of roles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from align.data.rows import Row, RowWithSystem, SystemPrompt
from align.data.shapes.base import Shape
from align.data.shapes.recognise import TALKS, only_columns_of

FORMATS: dict[str, Shape] = {
    "messages": "messages",
    "sharegpt": "messages",
    "alpaca": "alpaca",
    "prompt_completion": "prompt_completion",
    "preference": "preference",
    "unpaired": "unpaired",
    "prompt": "prompt",
    "text": "text",
    "token_ids": "token_ids",
}
"""Shape of each value of the key `format`."""
_MESSAGES = ("prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Adapter:
    """The settings of a source. A call returns the row as its shape is recognised.

    columns  {standard name: name in the file}
    format   a value of `FORMATS`; columns of other shapes are removed
    roles    {name in the file: role}
    ignore   columns that are removed
    system   system prompt of the recipe
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    system: SystemPrompt | None = None

    def names(self) -> list[str]:
        """The settings that name a column or a role of the data, as `setting: name`."""
        named = {"columns": self.columns.values(), "ignore": self.ignore, "roles": self.roles}
        return [f"{setting}: {name}" for setting, names in named.items() for name in names]

    def names_in(self, row: Row) -> set[str]:
        """Those of `names` that this row has."""
        found = {f"columns: {old}" for old in self.columns.values() if old in row}
        found |= {f"ignore: {column}" for column in self.ignore if column in row}
        if self.roles:
            renamed = self._renamed(row)
            columns = _READ.intersection(renamed)
            found |= {f"roles: {name}" for column in columns for name in _roles(_parsed(renamed, column))}
        return found.intersection(self.names())

    def __call__(self, row: Row) -> Row:
        if self.ignore:
            row = {column: value for column, value in row.items() if column not in self.ignore}
        if self.columns:
            row = self._renamed(row)
        if self.format == "sharegpt" and row.get("conversations") is not None:
            row = {column: value for column, value in row.items() if column != "messages"}
        if self.format is not None:
            row = only_columns_of(row, FORMATS[self.format])
        if self.roles:
            row = {**row, **{column: self._with_roles(_parsed(row, column)) for column in _READ.intersection(row)}}
        return row if self.system is None else RowWithSystem(row, self.system)

    def _renamed(self, row: Row) -> Row:
        moved = {old: new for new, old in self.columns.items() if old in row}
        kept = {column: value for column, value in row.items() if column not in moved and column not in moved.values()}
        return {**kept, **{new: row[old] for old, new in moved.items()}}

    def _with_roles(self, value: object) -> object:
        if isinstance(value, Mapping):
            changed = {key: self.roles.get(str(value[key]), value[key]) for key in ("role", "from") if key in value}
            return {**value, **changed}
        return [self._with_roles(item) for item in value] if isinstance(value, list) else value


_READ = frozenset({*TALKS, *_MESSAGES})


def _roles(value: object) -> set[str]:
    """The roles of a message, or of a list of messages."""
    if isinstance(value, Mapping):
        return {str(value[key]) for key in ("role", "from") if key in value}
    return {role for item in value for role in _roles(item)} if isinstance(value, list) else set()


def _parsed(row: Row, column: str) -> object:
    """The value of a column; messages that are JSON text, as in a CSV file, as a list."""
    value = row[column]
    if column in TALKS and isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
