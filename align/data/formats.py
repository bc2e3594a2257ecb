"""The data formats of TRL's documentation, recognised by their columns, and one canonical form for each use.

A message is {"role": str, "content": str, ...}. A plain string in `prompt`, `completion`, `chosen` or
`rejected` stands for one turn (the user's, or the assistant's): every stage speaks through the chat template,
so that a model is trained, sampled and scored on the same rendering. Only `text` rows bypass the template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from align.errors import UserError

Message = dict[str, Any]
Row = Mapping[str, Any]
Format = Literal["text", "messages", "prompt_completion", "preference", "prompt"]

FORMAT_COLUMNS: dict[Format, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}
"""Columns a format needs, most specific first; `prompt` is optional in preference rows."""

STANDARD_COLUMNS = frozenset(column for columns in FORMAT_COLUMNS.values() for column in columns) | {"reference"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


class DropRow(Exception):
    """A row that cannot be used; the message is the reason under which the report counts it."""


def format_of(columns: Iterable[str], accepted: Sequence[Format]) -> Format | None:
    """The most specific accepted format whose columns are all there."""
    present = set(columns)
    for name, needed in FORMAT_COLUMNS.items():
        if name in accepted and present.issuperset(needed):
            return name
    return None


def require_format(columns: Iterable[str], accepted: Sequence[Format], where: str) -> Format:
    """`format_of`, or a UserError that names the columns seen, those needed, and how to rename."""
    columns = list(columns)
    found = format_of(columns, accepted)
    if found is None:
        needed = ", or ".join(" and ".join(f"`{c}`" for c in FORMAT_COLUMNS[name]) for name in accepted)
        new, old = FORMAT_COLUMNS[accepted[0]][0], min(columns, default="name")
        raise UserError(
            f"{where} has the columns {', '.join(sorted(columns)) or '(none)'}, but this stage needs "
            f"{needed}. Rename them in the recipe, for example `columns: {{{new}: {old}}}`."
        )
    return found


def _row_format(row: Row, accepted: Sequence[Format]) -> Format:
    # A mixture of formats has every column in every row, with None where a source lacks it.
    found = format_of((c for c, value in row.items() if value is not None), accepted)
    if found is None:
        raise DropRow("empty columns")
    return found


# --- messages ---------------------------------------------------------------------------------------------


def to_messages(value: Any, role: str) -> list[Message]:
    """Messages of a column's value: a list as it is (ShareGPT's from/value too), a string as one turn of
    `role`.

    Raises DropRow for anything empty or that is not text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise DropRow(f"empty {role} turn")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DropRow("empty conversation")
    return [_message(item) for item in value]


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise DropRow("a message is not an object with role and content")
    # Arrow gives every message of a column the union of all keys; None marks those it never had.
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "value" in message:
        speaker = message.pop("from")
        message = {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": message.pop("value")}
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise DropRow("a message has no text")
    if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise DropRow("empty assistant turn")
    return message


def plain(messages: Sequence[Message]) -> str:
    """The contents alone, one turn a line."""
    return "\n".join(message["content"] for message in messages)


# --- canonical forms --------------------------------------------------------------------------------------


def to_conversation(row: Row) -> dict[str, list[Message]]:
    """{"prompt": messages, "completion": messages}: only the completion's assistant turns are trained on.

    A `messages` row becomes an empty prompt and the whole conversation as completion.
    """
    if _row_format(row, ("messages", "prompt_completion")) == "messages":
        completion = to_messages(row["messages"], "user")
        if not any(message["role"] == "assistant" for message in completion):
            raise DropRow("no assistant turn")
        return {"prompt": [], "completion": completion}
    return {
        "prompt": to_messages(row["prompt"], "user"),
        "completion": to_messages(row["completion"], "assistant"),
    }


def to_pair(row: Row) -> dict[str, list[Message]]:
    """{"prompt", "chosen", "rejected"}: messages; an implicit prompt (the common start) is made explicit."""
    _row_format(row, ("preference",))
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_strings(chosen, rejected)
    pair = {"chosen": to_messages(chosen, "assistant"), "rejected": to_messages(rejected, "assistant")}
    if prompt is None:
        shared = 0
        for ours, theirs in zip(pair["chosen"], pair["rejected"]):
            if ours != theirs:
                break
            shared += 1
        # Equal conversations share their answer as well: keep it, so that the caller sees equal completions.
        shared = min(shared, len(pair["chosen"]) - 1, len(pair["rejected"]) - 1)
        if shared == 0:
            raise DropRow("chosen and rejected share no prompt")
        messages = pair["chosen"][:shared]
        pair = {name: value[shared:] for name, value in pair.items()}
    else:
        messages = to_messages(prompt, "user")
    if pair["chosen"] == pair["rejected"]:
        raise DropRow("chosen equals rejected")
    return {"prompt": messages, **pair}


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two strings with a common beginning -> (prompt, chosen, rejected), cut at a word boundary."""
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    end = 0
    for ours, theirs in zip(chosen, rejected):
        if ours != theirs:
            break
        end += 1
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1
    if not chosen[:end].strip():
        raise DropRow("chosen and rejected share no prompt")
    return chosen[:end].rstrip(), chosen[end:], rejected[end:]


def to_prompt(row: Row) -> tuple[list[Message], str | None]:
    """(messages that end with the user's turn, reference answer or None).

    The reference is the column `reference`; without it, the completion, the chosen answer or the last
    assistant turn of the row, where it has one.
    """
    kind = _row_format(row, ("preference", "prompt_completion", "messages", "prompt"))
    answer: list[Message] = []
    if kind == "preference":
        pair = to_pair(row)
        messages, answer = pair["prompt"], pair["chosen"]
    elif kind == "messages":
        messages = to_messages(row["messages"], "user")
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1:]
    else:
        messages = to_messages(row["prompt"], "user")
        if kind == "prompt_completion" and row["completion"]:
            answer = to_messages(row["completion"], "assistant")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DropRow("prompt does not end with the user's turn")
    reference = row.get("reference")
    return messages, reference if isinstance(reference, str) else (plain(answer) or None)


def to_text(row: Row) -> str:
    """Plain text of a row of any format: the `text` column, or the contents of all turns."""
    kind = _row_format(row, tuple(FORMAT_COLUMNS))
    if kind == "text":
        text = row["text"]
    elif kind == "preference":
        pair = to_pair(row)
        text = plain(pair["prompt"] + pair["chosen"])
    elif kind == "prompt":
        text = plain(to_messages(row["prompt"], "user")) + "\n" + (row.get("reference") or "")
    else:
        conversation = to_conversation(row)
        text = plain(conversation["prompt"] + conversation["completion"])
    if not isinstance(text, str) or not text.strip():
        raise DropRow("empty text")
    return text
