"""TRL's data formats: recognise a row's format by its columns, and convert the row to the form that a stage needs.

A message is {"role": str, "content": str, ...}. A string in `prompt`, `completion`, `chosen` or `rejected` is one turn:
the user's in `prompt`, otherwise the assistant's. Every stage applies the chat template, so that a model is trained,
sampled and scored on the same rendering. Only `text` rows bypass the template.

Two optional columns of any other format reach the chat template: `tools`, a list of function schemas, and
`chat_template_kwargs`, an object with the template's own variables. Both may be JSON text.
"""

from __future__ import annotations

import json
import re
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
"""Required columns of each format, most specific format first. `prompt` is optional in preference rows."""

STANDARD_COLUMNS = frozenset(column for columns in FORMAT_COLUMNS.values() for column in columns) | {"reference"}
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Optional columns that are passed to the chat template."""
RESERVED = frozenset(
    {"messages", "conversation", "tools", "chat_template", "tokenize", "tokenizer_kwargs", "padding", "truncation"}
    | {"add_generation_prompt", "continue_final_message", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
)
"""Arguments of `apply_chat_template` that a row may not set."""
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


class DropRow(Exception):
    """Raised for a row that cannot be used. The data report counts dropped rows by this exception's message."""


def format_of(columns: Iterable[str], accepted: Sequence[Format]) -> Format | None:
    """The most specific accepted format whose columns are all present, if any."""
    present = set(columns)
    for name, needed in FORMAT_COLUMNS.items():
        if name in accepted and present.issuperset(needed):
            return name
    return None


def require_format(columns: Iterable[str], accepted: Sequence[Format], where: str) -> Format:
    """Like `format_of`, but raises `UserError` if no format fits."""
    columns = list(columns)
    found = format_of(columns, accepted)
    if found is None:
        needed = ", or ".join(" and ".join(f"`{c}`" for c in FORMAT_COLUMNS[name]) for name in accepted)
        new, old = FORMAT_COLUMNS[accepted[0]][0], min(columns, default="name")
        raise UserError(
            f"{where}: the columns are {', '.join(sorted(columns)) or '(none)'}, but this stage needs {needed}. "
            f"Rename them in the recipe, for example `columns: {{{new}: {old}}}`."
        )
    return found


def _row_format(row: Row, accepted: Sequence[Format]) -> Format:
    # In a mixture of formats every row has every column; None marks the columns that its source lacks.
    found = format_of((c for c, value in row.items() if value is not None), accepted)
    if found is None:
        raise DropRow("empty columns")
    return found


# --- messages ---------------------------------------------------------------------------------------------


def to_messages(value: Any, role: str) -> list[Message]:
    """Convert a column's value to messages.

    A string becomes one turn of `role`. A list of messages may use ShareGPT's keys `from` and `value`. Raises `DropRow`
    if the value is empty or a message has no text.
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
    # Arrow gives every message of a column the union of all messages' keys; None marks the keys that a message lacks.
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "value" in message:
        speaker = message.pop("from")
        message = {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": message.pop("value")}
    calls = message.get("tool_calls") or None
    message.pop("tool_calls", None)
    if calls is not None:
        message.setdefault("content", "")
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise DropRow("a message has no text")
    if message["role"] == "assistant" and not message["content"].strip() and calls is None:
        raise DropRow("empty assistant turn")
    return message if calls is None else {**message, "tool_calls": [_tool_call(call) for call in calls]}


def _tool_call(call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name", "arguments": JSON text}} and its id, if any.

    As JSON text, the arguments of all calls have the same type in a column.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    try:
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else without_none(arguments or {})
    except ValueError:
        raise DropRow("the arguments of a tool call are not valid JSON") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise DropRow("a tool call is not an object with a name and arguments")
    known = {"id": call["id"]} if call.get("id") is not None else {}
    text = json.dumps(arguments, ensure_ascii=False)
    return {**known, "type": "function", "function": {"name": name, "arguments": text}}


def without_none(value: Any) -> Any:
    """Copy without the keys whose value is None, which Arrow adds to objects that lack a key of another row."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def variables_problem(values: Mapping[str, Any], template: str) -> str | None:
    """Reason why a template cannot get these variables, if any."""
    for name in values:
        if name in RESERVED:
            return f"'{name}' is an argument of the renderer, not a variable of the chat template; remove it."
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            return f"the chat template does not read '{name}'; remove it."
    return None


def template_variables(row: Row) -> dict[str, Any]:
    """Keyword arguments for the chat template: the columns `tools` and `chat_template_kwargs`, if present.

    Values that are JSON text are kept exactly. In other values, None marks the keys that an object lacks.
    """
    tools, variables = (_json_column(row.get(column), column) for column in TEMPLATE_COLUMNS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DropRow("tools is not a list of objects")
    if variables is not None and not isinstance(variables, dict):
        raise DropRow("chat_template_kwargs is not an object")
    variables = variables or {}
    if reserved := sorted(RESERVED.intersection(variables)):
        raise DropRow(f"chat_template_kwargs must not set {', '.join(reserved)}")
    return {**variables, "tools": tools} if tools else variables


def _json_column(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return without_none(value)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise DropRow(f"{column} is not valid JSON") from None


def plain(messages: Sequence[Message]) -> str:
    """The contents of the messages, joined with line breaks."""
    return "\n".join(message["content"] for message in messages)


# --- canonical forms --------------------------------------------------------------------------------------


def to_conversation(row: Row) -> dict[str, list[Message]]:
    """{"prompt": messages, "completion": messages}. With `assistant_only_loss`, the loss includes only the assistant
    turns of the completion.

    A `messages` row has an empty prompt and the whole conversation as completion.
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
    """{"prompt", "chosen", "rejected"}: messages. Without the column `prompt`, the prompt is the common beginning of
    `chosen` and `rejected`."""
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
        # Equal conversations have their answers in common too. The prompt must not include the last message, so that
        # the comparison below finds the equal answers.
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
    """(prompt, chosen, rejected) of two strings with a common beginning, split at a word boundary."""
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
    """(prompt that ends with a user or tool turn, reference answer or None).

    The reference is the column `reference`, otherwise the completion, the chosen answer or the last assistant turn of
    the row, if any.
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
    """Plain text of a row of any format: the column `text`, or the contents of all turns. The rejected answer of a
    preference row is left out; the `reference` of a prompt row is appended."""
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
