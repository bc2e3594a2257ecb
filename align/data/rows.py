"""A row as it is read from a file, before its shape is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import UserError

Row = dict[str, Any]
"""{column: value}. Nested values have the keys and types of the file. A value may be `Unreadable`."""


@dataclass(frozen=True)
class SystemPrompt:
    """The system prompt that a recipe sets for a source; see `RowSource.system_prompt`."""

    text: str
    replace: bool = False


class RowWithSystem(dict[str, Any]):
    """A row of a source with a system prompt of the recipe. It has no further columns."""

    def __init__(self, row: Mapping[str, Any], system: SystemPrompt):
        super().__init__(row)
        self.system = system


@dataclass(frozen=True)
class Unreadable:
    """The value of a column that cannot be read. It stops a run only if the column is used.

    where    file and line
    problem  what is wrong, as the end of "the column 'x' ..."
    advice   what to do
    """

    where: str
    problem: str
    advice: str = "Correct or remove the line."

    def refusal(self, column: str) -> UserError:
        """The error for a use of `column`."""
        return UserError(f"{self.where}: the column '{column}' {self.problem}. {self.advice}")


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; None if the row lacks it. Raises `UserError` if it is unreadable."""
    value = row.get(column)
    if isinstance(value, Unreadable):
        raise value.refusal(column)
    return value
