"""Inspect a data file for `align init`: the shapes and lengths of its first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from align.config.parts import FileSource
from align.data.accepted import ACCEPTED, Kind
from align.data.rows import Row
from align.data.shapes import READS, SHAPES, Shape, shape_of
from align.data.shapes.recognise import renaming
from align.data.sources import source_chunks
from align.errors import UserError

LOOKED_AT = 1000
"""Number of rows that are inspected."""
CHARACTERS_PER_TOKEN = 3.0
"""Low estimate: English text has 4 to 5 characters per token with common vocabularies, Chinese 1 to 2."""
TEMPLATE_TOKENS = 64
"""Tokens that a chat template may add to a row."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
KINDS: dict[str, Kind] = {
    "pretrain": "text",
    "sft": "sft",
    "reward_model": "reward_pairs",
    "dpo": "dpo_pairs",
    "kto": "labelled",
}
"""{stage: kind of its rows} of the stages that `align init` writes, in running order."""
DEFAULT_STAGE: dict[Shape, str] = {
    "messages": "sft",
    "alpaca": "sft",
    "prompt_completion": "sft",
    "token_ids": "sft",
    "preference": "dpo",
    "unpaired": "kto",
    "text": "pretrain",
}
"""{shape: default stage for such rows}."""


@dataclass(frozen=True)
class DataLook:
    """Shapes and lengths of a file's first rows.

    path: the file, folder or glob pattern.
    shapes: {shape: number of rows}, the most frequent first.
    rows: number of inspected rows.
    whole: True if the file has no further rows.
    tokens: estimated tokens of a long row (95th percentile).
    columns: {standard name: name in the file}.
    """

    path: str
    shapes: dict[Shape, int]
    rows: int
    whole: bool
    tokens: int
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The most frequent shape."""
        return next(iter(self.shapes))

    def fits(self, stage: str) -> bool:
        """True if the stage accepts rows of this shape."""
        accepted = ACCEPTED[KINDS[stage]]
        return self.shape in accepted or (self.shape == "alpaca" and "messages" in accepted)

    @property
    def stages(self) -> list[str]:
        """The stages that accept the rows."""
        return [stage for stage in KINDS if self.fits(stage)]

    @property
    def length(self) -> int:
        """The smallest common `max_length` that fits long rows and a chat template."""
        return next((length for length in LENGTHS if self.tokens + TEMPLATE_TOKENS <= length), LENGTHS[-1])

    def summary(self) -> str:
        count = f"{self.rows:,} rows" if self.whole else f"the first {self.rows:,} rows"
        kinds = ", ".join(f"{number:,} {shape}" for shape, number in self.shapes.items())
        return f"{count}: {kinds}; long rows have about {self.tokens:,} tokens"


def look_at(path: str, columns: Mapping[str, str] | None = None) -> DataLook:
    """Inspect the first rows. Raises `UserError` for an unreadable file, or if no row has a trainable shape."""
    renamed = dict(columns or {})
    rows = list(islice(_rows(path, renamed), LOOKED_AT + 1))
    found = [(shape_of(row), row) for row in rows[:LOOKED_AT]]
    shapes = Counter(shape for shape, _ in found if shape is not None)
    if not shapes:
        raise _unknown_columns(path, sorted({column for row in rows for column in row}))
    lengths = sorted(_characters(row, shape) / CHARACTERS_PER_TOKEN for shape, row in found if shape is not None)
    tokens = max(1, round(lengths[int(0.95 * (len(lengths) - 1))]))
    count = min(len(rows), LOOKED_AT)
    look = DataLook(path, dict(shapes.most_common()), count, len(rows) <= LOOKED_AT, tokens, renamed)
    if look.shape not in DEFAULT_STAGE:
        raise UserError(
            f"{path}: its rows are prompts without answers, which only PPO and sampling use. See docs/ppo.md, or "
            "pass a file with answers."
        )
    return look


def _rows(path: str, columns: dict[str, str]) -> Iterator[Row]:
    return (row for chunk in source_chunks(FileSource(path=path, columns=columns)) for row in chunk.rows())


def _unknown_columns(path: str, columns: list[str]) -> UserError:
    example = renaming(columns, SHAPES)
    words = example.replace(": ", "=").replace(",", "") if example else "prompt=NAME completion=NAME"
    return UserError(
        f"{path}: the columns {', '.join(columns) or '(none)'} match no known row shape (docs/data.md). Map them with "
        f"--columns, for example --columns {words}."
    )


def _characters(row: Mapping[str, Any], shape: Shape) -> float:
    """Characters of the longest sequence of a row. A token id counts as `CHARACTERS_PER_TOKEN` characters."""
    if shape == "token_ids":
        return CHARACTERS_PER_TOKEN * len(row["input_ids"])
    read = {column: _text(row[column]) for column in READS[shape] if row.get(column) is not None}
    if shape == "preference":
        answers = max(read.pop("chosen", 0), read.pop("rejected", 0))
        return answers + sum(read.values())
    return sum(read.values())


def _text(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_text, value.values()))
    return sum(map(_text, value)) if isinstance(value, list | tuple) else 0
