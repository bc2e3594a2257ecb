"""The encoded part of a row: its messages or its text, its template variables, and the key that decides its split."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from align.data import shapes
from align.data.chat import Conversation as Chat
from align.data.rows import Row
from align.data.shapes import Conversation, DropRow, Message, Pair, Unreadable
from align.data.splits import prompt_key


@dataclass(frozen=True)
class Completions:
    """A prompt and its completions: one, or the two of a pair.

    completions: (messages, True if desirable, False if the sample was truncated) of each.
    """

    prompt: list[Message]
    variables: dict[str, Any]
    completions: list[tuple[list[Message], bool, Any]]


@dataclass(frozen=True)
class Plan:
    """A row before tokenisation. Without messages, the row is the text `key`."""

    key: str
    chat: Chat
    texts: dict[str, Any] = field(default_factory=dict)


def plan_conversation(row: Row) -> Plan:
    """A conversation, or a prompt and its completion."""
    conversation, variables = shapes.conversation(row), shapes.template_variables(row)
    messages = conversation["prompt"] + conversation["completion"]
    return Plan(conversation_key(conversation), Chat(messages, variables, len(conversation["prompt"])))


def plan_text_or_conversation(row: Row) -> Plan:
    """The column `text` if the row has it, otherwise a conversation."""
    return plan_conversation(row) if row.get("text") is None else Plan(shapes.text(row), Chat([]))


def plan_pair(row: Row) -> tuple[Pair, dict[str, Any]]:
    """(preference pair, template variables)."""
    return shapes.pair(row), shapes.template_variables(row)


def plan_completions(row: Row) -> Completions:
    """A labelled completion, or both of a preference pair: the chosen one desirable, the rejected one not."""
    variables = shapes.template_variables(row)
    shape = shapes.require_shape(row, ("preference", "unpaired", "prompt_completion", "messages"))
    if shape == "preference":
        pair = shapes.pair(row)
        chosen = (pair["chosen"], True, row.get("chosen_finished"))
        rejected = (pair["rejected"], False, row.get("rejected_finished"))
        return Completions(pair["prompt"], variables, [chosen, rejected])
    if shape != "unpaired":
        raise DropRow("no label")
    labelled = shapes.unpaired(row)
    return Completions(labelled["prompt"], variables, [(labelled["completion"], labelled["label"], None)])


def plan_prompt(row: Row) -> Plan:
    """The prompt of a row of any shape, with the columns that reach the reward functions."""
    messages, reference = shapes.prompt(row)
    variables = shapes.template_variables(row)
    read = {column: value for column, value in row.items() if not isinstance(value, Unreadable)}
    texts = {"messages": messages, "reference": reference, "row": read, "variables": variables}
    return Plan("", Chat(messages, variables), texts)


def conversation_key(conversation: Conversation) -> str:
    """Key of a conversation's prompt: the column `prompt`, otherwise everything before the last assistant turn."""
    if conversation["prompt"]:
        return prompt_key(conversation["prompt"])
    turns = conversation["completion"]
    last = max(number for number, message in enumerate(turns) if message["role"] == "assistant")
    return prompt_key(turns[:last])


def as_json(value: Any) -> str:
    """JSON text of a value of a row. Values without a JSON type (dates, bytes of a Parquet file) become strings."""
    return json.dumps(value, default=str)
