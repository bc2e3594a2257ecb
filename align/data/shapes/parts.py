"""Parts that several shapes share: the column with messages, Alpaca's columns, the column `system`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.rows import RowWithSystem, value_of
from align.data.shapes.base import DropRow, Message, as_text, kind_of, parsed_json
from align.data.shapes.messages import to_messages
from align.data.shapes.recognise import TALKS


def talk_of(row: Mapping[str, Any]) -> list[Message]:
    """Messages of the row's column of messages, which may be JSON text, as in a CSV file."""
    column = next(name for name in TALKS if row.get(name) is not None)
    value = value_of(row, column)
    if isinstance(value, str):
        value = parsed_json(value, column) if value.strip() else []
    if not isinstance(value, list):
        raise DropRow(f"{column} is {kind_of(value)}, not a list of messages")
    return to_messages(value, "user")


def alpaca_turns(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca's `history`, followed by the user's turn: `instruction` and, on its own line, a non-empty `input`."""
    history = value_of(row, "history")
    if isinstance(history, str):
        history = parsed_json(history, "history") if history.strip() else []
    turns: list[Message] = []
    for exchange in history if isinstance(history, list) else [history] * (history is not None):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise DropRow("history is not a list of pairs of an instruction and an answer")
        turns += [*to_messages(exchange[0], "user"), *to_messages(exchange[1], "assistant")]
    question = as_text(value_of(row, "instruction"), "instruction")
    given = value_of(row, "input")
    extra = "" if given is None else as_text(given, "input")
    joined = "\n".join(part for part in (question, extra) if part.strip())
    return [*turns, *to_messages(joined, "user")]


def with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the column `system`, if it has text, and with the system prompt of the recipe, if any."""
    messages = _with_column(row, messages)
    if not isinstance(row, RowWithSystem):
        return messages
    if row.system.replace:
        messages = [message for message in messages if message["role"] != "system"]
    elif any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": row.system.text}, *messages] if row.system.text else messages


def _with_column(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    given = value_of(row, "system")
    text = "" if given is None else as_text(given, "system")
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != text.strip():
            raise DropRow("the column system and the conversation have different system prompts")
        return messages
    return [{"role": "system", "content": text}, *messages]
