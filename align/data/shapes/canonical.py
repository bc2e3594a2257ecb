"""Convert a row of any shape to the canonical form that a stage needs.

Text in `prompt`, `completion`, `chosen` or `rejected` is one turn: the user's in `prompt`, otherwise the assistant's.
Every stage applies the chat template, so that a model is trained, sampled and scored on the same rendering. Only `text`
and `token_ids` rows bypass the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.rows import value_of
from align.data.shapes.base import (
    Conversation,
    DropRow,
    Message,
    Shape,
    TokenIds,
    Unpaired,
    as_text,
    json_text,
    parsed_json,
)
from align.data.shapes.messages import to_messages
from align.data.shapes.pairs import pair
from align.data.shapes.parts import alpaca_turns, talk_of, with_system
from align.data.shapes.recognise import LABELS, require_shape

_ANY_TEXT: tuple[Shape, ...] = ("preference", "prompt_completion", "messages", "prompt", "alpaca", "text")
IGNORED = -100
"""Label of tokens that are not in the loss."""
NOT_A_LABEL = "label is not true or false"
_LABEL_TEXTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""Labels as text. A CSV file has 1.0 and 0.0 if some rows of the table had no label."""


def plain(messages: Sequence[Message]) -> str:
    """The contents of the messages, joined with line breaks."""
    return "\n".join(message["content"] for message in messages)


def conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a `messages`, `alpaca` or `prompt_completion` row.

    A `messages` or `alpaca` row has an empty prompt and the whole conversation as completion.
    """
    shape = require_shape(row, ("messages", "prompt_completion"))
    if shape == "prompt_completion":
        prompt = with_system(row, to_messages(value_of(row, "prompt"), "user"))
        completion = to_messages(value_of(row, "completion"), "assistant")
    else:
        prompt, completion = [], _whole(row, shape)
    if not any(message["role"] == "assistant" for message in completion):
        raise DropRow("no assistant turn")
    return {"prompt": prompt, "completion": completion}


def _whole(row: Mapping[str, Any], shape: Shape) -> list[Message]:
    """All messages of a `messages` or `alpaca` row."""
    if shape == "messages":
        return with_system(row, talk_of(row))
    turns = alpaca_turns(row)
    return with_system(row, [*turns, *to_messages(value_of(row, "output"), "assistant")])


def prompt(row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """(prompt that ends with a user or tool message, reference answer or None).

    The reference is the column `reference`, otherwise the completion, the chosen answer or the last assistant message
    of the row, if any. A reference that is a number, a list or an object becomes text as JSON writes it.
    """
    shape = require_shape(row, ("preference", "prompt_completion", "messages", "prompt", "alpaca"))
    answer: list[Message] = []
    if shape == "preference":
        both = pair(row)
        messages, answer = both["prompt"], both["chosen"]
    elif shape in ("messages", "alpaca"):
        messages = _whole(row, shape)
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1:]
    else:
        messages = with_system(row, to_messages(value_of(row, "prompt"), "user"))
        if shape == "prompt_completion" and value_of(row, "completion") != "":
            answer = to_messages(value_of(row, "completion"), "assistant")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DropRow("prompt does not end with the user's turn")
    return messages, reference_of(row, answer)


def reference_of(row: Mapping[str, Any], answer: Sequence[Message]) -> str | None:
    """The column `reference` as text, otherwise the contents of `answer`; None if both are empty."""
    given = value_of(row, "reference")
    if given is None:
        return plain(answer) or None
    if isinstance(given, list | dict):
        return json_text(given, "reference")
    return as_text(given, "reference")


def text(row: Mapping[str, Any]) -> str:
    """Plain text of a row: the column `text`, or the contents of all turns. The rejected answer of a preference row is
    left out; the `reference` of a prompt row is appended."""
    shape = require_shape(row, _ANY_TEXT)
    if shape == "text":
        found = as_text(value_of(row, "text"), "text")
    elif shape == "preference":
        both = pair(row)
        found = plain(both["prompt"] + both["chosen"])
    elif shape == "prompt":
        messages = with_system(row, to_messages(value_of(row, "prompt"), "user"))
        found = plain(messages) + "\n" + (reference_of(row, ()) or "")
    else:
        both_parts = conversation(row)
        found = plain(both_parts["prompt"] + both_parts["completion"])
    if not found.strip():
        raise DropRow("empty text")
    return found


def unpaired(row: Mapping[str, Any]) -> Unpaired:
    """The prompt, the completion and the label of a KTO row. The completion of a conversation is its last message."""
    require_shape(row, ("unpaired",))
    labels = {_label(value_of(row, column)) for column in LABELS if row.get(column) is not None}
    if len(labels) > 1:
        raise DropRow(f"{' and '.join(LABELS)} contradict each other")
    if row.get("prompt") is not None and row.get("completion") is not None:
        given = with_system(row, to_messages(value_of(row, "prompt"), "user"))
        completion = to_messages(value_of(row, "completion"), "assistant")
        if completion[: len(given)] == given:
            completion = completion[len(given) :]
    else:
        talk = require_shape(row, ("messages",))
        messages = _whole(row, talk)
        given, completion = messages[:-1], messages[-1:]
    if not completion or completion[-1]["role"] != "assistant":
        raise DropRow("the completion does not end with an assistant turn")
    if not given:
        raise DropRow("no prompt")
    return {"prompt": given, "completion": completion, "label": labels.pop()}


def _label(value: Any) -> bool:
    if isinstance(value, str):
        value = _LABEL_TEXTS.get(value.strip().lower())
    if value not in (0, 1):
        raise DropRow(NOT_A_LABEL)
    return bool(value)


def token_ids(row: Mapping[str, Any]) -> TokenIds:
    """Token ids that the data already has. The labels are `labels`, otherwise the ids inside `assistant_masks` or
    `completion_mask`, otherwise all ids. Padding, where `attention_mask` is 0, is removed."""
    require_shape(row, ("token_ids",))
    ids = _integers(row, "input_ids")
    if not ids or min(ids) < 0:
        raise DropRow("input_ids is empty" if not ids else "input_ids has a negative id")
    masks = {c: _integers(row, c) for c in ("assistant_masks", "completion_mask") if row.get(c) is not None}
    labels = _integers(row, "labels") if row.get("labels") is not None else list(ids)
    present = _integers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    for name, values in (("labels", labels), ("attention_mask", present), *masks.items()):
        if len(values) != len(ids):
            raise DropRow(f"{name} and input_ids differ in length")
        if name != "labels" and not {0, 1}.issuperset(values):
            raise DropRow(f"{name} is not a list of 0 and 1")
    for mask in masks.values():
        labels = [label if inside else IGNORED for label, inside in zip(labels, mask)]
    if any(label not in (token, IGNORED) for token, label in zip(ids, labels)):
        raise DropRow("labels has an id that is neither -100 nor that of input_ids")
    kept = [number for number, real in enumerate(present) if real]
    if not kept:
        raise DropRow("input_ids has only padding")
    return {"input_ids": [ids[n] for n in kept], "labels": [labels[n] for n in kept]}


def _integers(row: Mapping[str, Any], column: str) -> list[int]:
    values = value_of(row, column)
    if isinstance(values, str):
        values = parsed_json(values, column)
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise DropRow(f"{column} is not a list of integers")
    return [int(value) for value in values]
