"""Columns that reach the chat template beside the messages: tools and template arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.rows import value_of
from align.data.shapes.base import DropRow, json_text, parsed_json

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs", "reasoning_effort", "enable_thinking")
"""Optional columns that are passed to the chat template. The last two are template arguments of their own."""
RESERVED = frozenset(
    {"messages", "conversation", "tools", "chat_template", "tokenize", "tokenizer_kwargs", "padding", "truncation"}
    | {"add_generation_prompt", "continue_final_message", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
)
"""Arguments of `apply_chat_template` that a row may not set."""


def variables_problem(values: Mapping[str, Any], template: str) -> str | None:
    """Reason why a template cannot get these variables, if any."""
    for name in values:
        if name in RESERVED:
            return f"'{name}' is an argument of the renderer, not a variable of the chat template; remove it."
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            return f"the chat template does not read '{name}'; remove it."
    return None


def template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the chat template: those of the row, and `tools`, if any."""
    tools, variables = _json_column(row, "tools"), _json_column(row, "chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise DropRow("chat_template_kwargs is not an object")
    variables = dict(variables or {})
    if reserved := sorted(RESERVED.intersection(variables)):
        raise DropRow(f"chat_template_kwargs must not set {', '.join(reserved)}")
    for column in TEMPLATE_COLUMNS[2:]:
        value = value_of(row, column)
        if value is None or value == "":
            continue
        if variables.setdefault(column, value) != value:
            raise DropRow(f"the column {column} and chat_template_kwargs contradict each other")
    tools = _tools(tools)
    return {**variables, "tools": tools} if tools else variables


def _json_column(row: Mapping[str, Any], column: str) -> Any:
    value = value_of(row, column)
    if not isinstance(value, str):
        if value is not None:
            json_text(value, column)
        return value
    return parsed_json(value, column) if value.strip() else None


def _tools(value: Any) -> list[dict[str, Any]]:
    """Function schemas as {"type": "function", "function": ...}, the form that inference servers give to templates.

    A schema may be JSON text, and may lack that envelope.
    """
    if value is None:
        return []
    tools = [parsed_json(tool, "tools") if isinstance(tool, str) else tool for tool in _list(value)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise DropRow("tools is not a list of objects")
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool and "type" not in tool
        else tool
        for tool in tools
    ]  # fmt: skip


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DropRow("tools is not a list of objects")
    return value
