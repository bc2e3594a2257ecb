"""Tables and sentences for a terminal of a given width."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

GAP = "  "
NARROWEST = 20
"""A first column that is longer than this may be wrapped to keep all other columns beside it."""
FOLDED = 26
"""Width of the first column if the other columns are folded into several blocks."""
_TOGETHER = re.compile(r"\S+ \[[^\]]*\](?: \([^)]*\))?")
"""A number with its interval and what is said about it."""


def text_table(rows: Sequence[Sequence[str]], width: int | None = None, *, indent: str = "") -> list[str]:
    """The lines of a table with columns of equal width, the first row being its head.

    width: of the terminal. If the table is wider, the first column is wrapped; if that is not enough, the other columns
    are folded into blocks below each other, each with the first column. None: the table is never folded.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, others = widths[0], widths[1:]
    if width is None:
        return list(_block(rows, range(1, len(widths)), widths, indent))
    room = width - len(indent)
    beside = room - sum(len(GAP) + other for other in others)
    if beside >= min(first, NARROWEST):
        widths[0] = min(first, beside)
        return list(_block(rows, range(1, len(widths)), widths, indent))
    widths[0] = min(first, FOLDED)
    lines: list[str] = []
    for columns in _blocks(widths, room):
        lines += [*([""] if lines else []), *_block(rows, columns, widths, indent)]
    return lines


def wrapped(sentence: str, width: int | None, *, indent: str = "") -> list[str]:
    """The lines of a sentence. A number and its interval stay on one line."""
    if width is None:
        return [indent + sentence]
    joined = _TOGETHER.sub(lambda found: found.group().replace(" ", "\0"), sentence)
    filled = textwrap.wrap(
        joined,
        width,
        initial_indent=indent,
        subsequent_indent=indent + GAP,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in filled]


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """The columns after the first one, in blocks that fit beside it; at least one column each."""
    block: list[int] = []
    used = widths[0]
    for column, width in enumerate(widths[1:], start=1):
        if block and used + len(GAP) + width > room:
            yield block
            block, used = [], widths[0]
        block.append(column)
        used += len(GAP) + width
    yield block


def _block(rows: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int], indent: str) -> Iterator[str]:
    for row in rows:
        label, *more = textwrap.wrap(row[0], widths[0], break_on_hyphens=False) if row[0] else [""]
        cells = [f"{label:<{widths[0]}}", *(f"{row[column]:<{widths[column]}}" for column in columns)]
        yield (indent + GAP.join(cells)).rstrip()
        yield from (indent + line for line in more)
