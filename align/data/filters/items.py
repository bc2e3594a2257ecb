"""Read the items of the evaluation sets that `contamination` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from align.config.data_files import list_files
from align.config.filters import ContaminationFilter, EvaluationSet, Filter
from align.data.files import chunks
from align.data.rows import Row, value_of
from align.data.shapes import DropRow, plain, prompt, shape_of
from align.errors import UserError

_COLUMNS = ("question", "problem", "query", "turns", "text")


def evaluation_files(filters: Sequence[Filter]) -> list[Path]:
    """The files of all evaluation sets. Raises `UserError` for a path without files."""
    return [file for target in _targets(filters) for file in list_files(target.path).files]


def evaluation_items(filters: Sequence[Filter]) -> dict[str, list[str]]:
    """{name: texts of the items} of all evaluation sets. Raises `UserError` if a set has no items."""
    found = {target.name: list(_items(target)) for target in _targets(filters)}
    for target in _targets(filters):
        if not found[target.name]:
            raise UserError(
                f"{target.path}: no row has a text, so '{target.name}' has no items. Set `column` of the "
                "evaluation set."
            )
    return found


def _targets(filters: Sequence[Filter]) -> list[EvaluationSet]:
    return [target for settings in filters if isinstance(settings, ContaminationFilter) for target in settings.against]


def _items(target: EvaluationSet) -> Iterator[str]:
    rows = [row for chunk in chunks(target.path) for row in chunk.rows()]
    column = target.column or next((name for name in _COLUMNS if any(name in row for row in rows)), None)
    prompts = target.column is None and any(shape_of(row, ("prompt", "messages")) for row in rows)
    if not prompts and not any(column in row for row in rows):
        columns = ", ".join(sorted({name for row in rows for name in row})) or "(none)"
        raise UserError(
            f"{target.path}: no column has the items of '{target.name}'; the columns are {columns}. "
            "Set `column` of the evaluation set."
        )
    for row in rows:
        value = _prompt_text(row) if prompts else value_of(row, column or "")
        if text := "\n".join(map(str, value)) if isinstance(value, list) else value:
            yield str(text)


def _prompt_text(row: Row) -> str:
    try:
        return plain(prompt(row)[0])
    except DropRow:
        return ""
