"""Write rows of any shape as JSON Lines in canonical form, which is read without configuration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.parts import FileSource
from align.data import shapes
from align.data.rows import Row, Unreadable
from align.data.shapes import DropRow, Shape
from align.data.shapes.base import all_dropped
from align.data.sources import source_chunks
from align.errors import UserError
from align.run.folder import replace_file


def canonical(row: Row) -> tuple[Shape, Row]:
    """(shape, the row in canonical form). Columns that the shape does not read stay as they are.

    Raises `DropRow` for a row that cannot be used.
    """
    shape = shapes.require_shape(row)
    form: dict[str, Any]
    match shape:
        case "preference":
            form = dict(shapes.pair(row))
            form |= {name: row[name] for name in ("chosen_finished", "rejected_finished") if name in row}
        case "unpaired":
            form = dict(shapes.unpaired(row))
        case "prompt_completion":
            form = dict(shapes.conversation(row))
        case "messages" | "alpaca":
            form = {"messages": shapes.conversation(row)["completion"]}
        case "prompt":
            form = {"prompt": shapes.prompt(row)[0]}
        case "text":
            form = {"text": shapes.text(row)}
        case "token_ids":
            form = dict(shapes.token_ids(row))
    if row.get("reference") is not None and "reference" in shapes.READS[shape]:
        form["reference"] = shapes.prompt(row)[1]
    variables = shapes.template_variables(row)
    if tools := variables.pop("tools", None):
        form["tools"] = tools
    if variables:
        form["chat_template_kwargs"] = variables
    read = shapes.READS[shape] | set(shapes.TEMPLATE_COLUMNS)
    others = {c: v for c, v in row.items() if c not in read and not isinstance(v, Unreadable | None)}
    return shape, {**form, **others}


@dataclass
class Conversion:
    """Counts of a conversion.

    read     rows of the source
    shapes   {shape: rows written}
    dropped  {reason: rows}
    example  {reason: file and line of the first row dropped for it}
    unused   {column: rows that have it} of columns that no shape reads; they are written as they are
    """

    read: int = 0
    shapes: Counter[Shape] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Lines for the terminal."""
        kinds = ", ".join(f"{count:,} {shape}" for shape, count in sorted(self.shapes.items()))
        lines = [f"{self.read:,} rows read, {self.shapes.total():,} written ({kinds or 'none'})"]
        for reason, count in self.dropped.most_common():
            lines.append(f"{count:,} dropped: {reason} (first: {self.example[reason]})")
        if self.unused:
            columns = ", ".join(f"{column} ({count:,})" for column, count in sorted(self.unused.items()))
            lines.append(f"columns that no shape reads, by rows: {columns}")
        return "\n".join(lines)


def convert(source: FileSource, out: Path) -> Conversion:
    """Write the rows of `source` to the JSON Lines file `out`, in their order and in bounded memory.

    Raises `UserError` if the source cannot be read or no row can be used; `out` is then not written.
    """
    counts = Conversion()

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            for row in _canonical_rows(source, counts):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if not counts.shapes:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in counts.dropped.most_common(3))
            raise UserError(
                f"{source.path}: {all_dropped(counts.read)} ({reasons}). Rename columns with --columns, or correct the "
                "rows."
            )

    replace_file(out, write)
    return counts


def _canonical_rows(source: FileSource, counts: Conversion) -> Iterator[Row]:
    for chunk in source_chunks(source):
        for index, row in enumerate(chunk.rows()):
            counts.read += 1
            try:
                shape, form = canonical(row)
            except DropRow as error:
                reason = str(error)
                counts.dropped[reason] += 1
                counts.example.setdefault(reason, chunk.where(index))
                continue
            counts.shapes[shape] += 1
            counts.unused.update(shapes.unused_columns(row, shape))
            yield form
