"""Default values for a chat template's own variables, such as Qwen3's `enable_thinking` or Hy3's `reasoning_effort`.

The defaults are written at the beginning of the template. So they are saved with the model, and every program that
renders the template uses them. A value that a data row or a caller passes takes precedence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.shapes import variables_problem
from align.errors import UserError


def set_template_defaults(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], where: str) -> None:
    """Set defaults of the variables of the tokenizer's chat template; they take precedence over earlier ones.

    where: the setting or option with the values, for errors. Raises `UserError` for a variable that the template does
    not read.
    """
    if not values:
        return
    template: Any = tokenizer.chat_template or ""
    if problem := variables_problem(values, template if isinstance(template, str) else "\n".join(template.values())):
        raise UserError(f"{where}: {problem}")
    lines = "".join(f"{{%- set {name} = {name} | default({_literal(value)}) -%}}" for name, value in values.items())
    if isinstance(template, str):
        tokenizer.chat_template = lines + template
    else:
        tokenizer.chat_template = {name: lines + text for name, text in template.items()}


def _literal(value: Any) -> str:
    """`value`, of JSON types, as a Jinja expression."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)
