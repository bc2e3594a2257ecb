"""Recognise a row's shape by its columns and their values.

A column whose value is None counts as absent, so that each row of a file may have a shape of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from align.data.rows import Row
from align.data.shapes.base import DropRow, Shape
from align.data.shapes.messages import MESSAGE_KEYS
from align.data.shapes.variables import TEMPLATE_COLUMNS
from align.errors import UserError

SHAPES: tuple[Shape, ...] = get_args(Shape)
"""All shapes, most specific first: a row has the first one whose columns are present."""
TALKS = ("messages", "conversations", "conversation")
"""Names of the column with a list of messages; the first one that is present is read."""
LABELS = ("label", "kto_tag")
"""Names of the column that tells desirable completions from others."""
_ALPACA = ("instruction", "input", "history")
_TALK = "messages (or conversations)"
NEEDS: dict[Shape, str] = {
    "preference": "chosen and rejected",
    "unpaired": f"label (or kto_tag) and {_TALK}, or label, prompt and completion",
    "prompt_completion": "prompt and completion",
    "messages": _TALK,
    "prompt": "prompt",
    "alpaca": "instruction and output",
    "text": "text",
    "token_ids": "input_ids",
}
"""The columns of each shape, in words."""
READS: dict[Shape, frozenset[str]] = {
    "preference": frozenset(
        {"prompt", "chosen", "rejected", "output", "system", "chosen_finished", "rejected_finished", *TALKS, *_ALPACA}
    ),
    "unpaired": frozenset({"prompt", "completion", "output", "system", *TALKS, *LABELS, *_ALPACA}),
    "prompt_completion": frozenset({"prompt", "completion", "system", "reference"}),
    "messages": frozenset({"system", "reference", *TALKS}),
    "prompt": frozenset({"prompt", "system", "reference"}),
    "alpaca": frozenset({"output", "system", "reference", *_ALPACA}),
    "text": frozenset({"text"}),
    "token_ids": frozenset({"input_ids", "labels", "attention_mask", "assistant_masks", "completion_mask"}),
}
"""All columns that each shape reads, beside the template's."""
STANDARD_COLUMNS = frozenset(column for columns in READS.values() for column in columns) | set(TEMPLATE_COLUMNS)
_SYNONYMS = {
    "prompt": ("question", "query", "instruction", "problem", "input"),
    "completion": ("response", "answer", "output", "solution"),
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "chosen": ("preferred", "response_chosen", "answer_chosen"),
    "rejected": ("dispreferred", "response_rejected", "answer_rejected"),
    "text": ("content", "document", "body"),
    "label": ("desirable", "is_desirable", "thumbs_up", "feedback", "rating"),
}
"""Other names that people give to a column; the advice of an error uses them."""
_WANTED: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"), ("messages", "label")),
    "prompt_completion": (("prompt", "completion"),),
    "messages": (("messages",),),
    "prompt": (("prompt",),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
    "token_ids": (("input_ids",),),
}
"""{shape: columns that the advice suggests as new names}."""
_NO_EXAMPLE = "Rename them in the recipe with `columns: {standard name: name in the file}`, or set another source."


def shape_of(row: Mapping[str, Any], accepted: Sequence[Shape] = SHAPES) -> Shape | None:
    """The most specific accepted shape of a row, if any. Where `messages` is accepted, `alpaca` is too."""
    given = {column for column, value in row.items() if value is not None}
    for shape in SHAPES:
        wanted = shape in accepted or (shape == "alpaca" and "messages" in accepted)
        if wanted and _fits(shape, given, row):
            return shape
    return None


def _fits(shape: Shape, given: set[str], row: Mapping[str, Any]) -> bool:
    match shape:
        case "preference":
            return given >= {"chosen", "rejected"} or (given >= {"instruction", "output"} and _two(row["output"]))
        case "unpaired":
            talks = given.intersection(TALKS) or given >= {"prompt", "completion"} or given >= {"instruction", "output"}
            return bool(given.intersection(LABELS) and talks)
        case "prompt_completion":
            return given >= {"prompt", "completion"}
        case "messages":
            return bool(given.intersection(TALKS))
        case "alpaca":
            return given >= {"instruction", "output"} and not _two(row["output"])
        case "token_ids":
            return "input_ids" in given
        case _:
            return shape in given


def _two(output: Any) -> bool:
    return isinstance(output, list) and len(output) == 2


def require_shape(row: Mapping[str, Any], accepted: Sequence[Shape] = SHAPES) -> Shape:
    """Like `shape_of`, but raises `DropRow` if no shape fits."""
    shape = shape_of(row, accepted)
    if shape is None:
        columns = ", ".join(sorted(c for c, value in row.items() if value is not None)) or "none"
        raise DropRow(f"columns of no known shape ({columns})")
    return shape


def needs(accepted: Sequence[Shape]) -> str:
    """The columns of the accepted shapes, in words."""
    return ", or ".join(NEEDS[shape] for shape in accepted)


def no_shape(columns: Iterable[str], accepted: Sequence[Shape], where: str) -> UserError:
    """The error for a source without a row of an accepted shape."""
    present = sorted(columns)
    example = renaming(present, accepted)
    return UserError(
        f"{where}: the columns are {', '.join(present) or '(none)'}, but this stage needs {needs(accepted)}. "
        + (f"Rename them in the recipe, for example `columns: {{{example}}}`." if example else _NO_EXAMPLE)
    )


def renaming(present: Sequence[str], accepted: Sequence[Shape]) -> str | None:
    """An example of `columns` that gives the rows an accepted shape; None if no column has a name that suggests one."""
    for shape in accepted:
        for wanted in _WANTED[shape]:
            found = {new: _similar(new, present) for new in wanted}
            changed = {new: old for new, old in found.items() if old is not None and new != old}
            if changed and all(found.values()) and len(set(found.values())) == len(wanted):
                return ", ".join(f"{new}: {old}" for new, old in changed.items())
    return None


def _similar(new: str, present: Sequence[str]) -> str | None:
    if any(new in names and set(names).intersection(present) for names in (TALKS, LABELS)):
        return new
    return next((old for old in (new, *_SYNONYMS.get(new, ())) if old in present), None)


def unused_columns(row: Mapping[str, Any], shape: Shape) -> set[str]:
    """Columns with a value that the shape does not read, and keys of messages as `messages[].key`."""
    read = READS[shape] | set(TEMPLATE_COLUMNS)
    unused = {column for column, value in row.items() if value is not None and column not in read}
    for column in ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"):
        value = row.get(column)
        if column in read and isinstance(value, list):
            keys = {key for item in value if isinstance(item, Mapping) for key, v in item.items() if v is not None}
            unused |= {f"{column}[].{key}" for key in keys - MESSAGE_KEYS}
    talks = [column for column in TALKS if row.get(column) is not None]
    return unused | set(talks[1:] if "messages" in read else ())


def only_columns_of(row: Row, shape: Shape) -> Row:
    """The row without the columns that would give it another shape."""
    others = STANDARD_COLUMNS - READS[shape] - set(TEMPLATE_COLUMNS)
    return {column: value for column, value in row.items() if column not in others}
