"""Types of the canonical forms, and the exception for rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, TypedDict

Message = dict[str, Any]
"""A canonical message: `role` (system, user, assistant or tool), `content` (text) and, if any, `tool_calls`, `name`,
`tool_call_id` and `reasoning_content`. An assistant message may have `train`, the weight of its tokens in the loss;
the default is 1."""

Shape = Literal["preference", "unpaired", "prompt_completion", "messages", "prompt", "alpaca", "text", "token_ids"]
"""Name of a row's shape, which decides the columns that are read."""


class Conversation(TypedDict):
    """A conversation to train on. The loss may include only assistant messages of the completion.

    prompt      messages before it; empty if every assistant message may be trained
    completion  messages with at least one of the assistant
    """

    prompt: list[Message]
    completion: list[Message]


class Pair(TypedDict):
    """A preference pair. Both answers follow the prompt and end with an assistant message."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


class Unpaired(TypedDict):
    """A completion with a label: True if it is desirable, otherwise False."""

    prompt: list[Message]
    completion: list[Message]
    label: bool


class TokenIds(TypedDict):
    """Token ids [T] and labels [T]; -100 marks tokens that are not in the loss."""

    input_ids: list[int]
    labels: list[int]


class DropRow(Exception):
    """Raised for a row that cannot be used. The data report counts dropped rows by this exception's message."""


def all_dropped(rows: int) -> str:
    """The statement of an error that all rows were dropped."""
    return "the only row was dropped" if rows == 1 else f"all {rows:,} rows were dropped"


def parsed_json(text: str, what: str) -> Any:
    """The value of JSON text. Raises `DropRow` with `what` if the text is not JSON that can be written again."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:  # only an escape can be half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise DropRow(f"{what} is not valid JSON") from None
    return value


def json_text(value: Any, what: str) -> str:
    """JSON text of a value. Raises `DropRow` with `what` for values that JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise DropRow(f"{what} is not valid JSON") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def shown(value: Any) -> str:
    """A short text of a value for a reason: at most 40 characters on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"


def as_text(value: Any, what: str) -> str:
    """Text of a scalar value: numbers and truth values as JSON writes them. Raises `DropRow` for other values."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json_text(value, what)
    if isinstance(value, Decimal):
        return str(value)
    raise DropRow(f"{what} is {kind_of(value)}, not text")


def kind_of(value: Any) -> str:
    """The kind of a value in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
