"""JSON in a completion, checked against a JSON Schema."""

from __future__ import annotations

import json
import re
from typing import Any

from align.errors import UserError, missing_dependency
from align.reward.text import Row

INSTALL = "pip install 'align-moe[eval]'"
_FENCE = re.compile(r"^ *```(?:json)?[^\S\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def json_score(completion: str, schema: Any = None) -> float:
    """1.0 if the completion is JSON that satisfies the schema, otherwise 0.0.

    The JSON is the last fenced block, or the whole completion. schema: JSON Schema, as a value or as JSON text; None
    accepts every JSON. Raises UserError for a schema that is not valid.
    """
    text = completion.rpartition("</think>")[2]
    blocks = _FENCE.findall(text)
    try:
        value = json.loads(blocks[-1] if blocks else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if schema is None else float(_validator(schema).is_valid(value))


def check_schema(schema: Any) -> None:
    """Raise UserError if a schema is not valid or cannot be checked."""
    _validator(schema)


def json_row(prompt: str, completion: str, row: Row) -> float:
    """`json_score` with the signature of a reward function, for the process of users' functions."""
    return json_score(completion, row["schema"])


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _validator(schema: Any) -> Any:
    try:
        from jsonschema import exceptions, validators
    except ImportError:
        raise missing_dependency("jsonschema", "a JSON Schema", INSTALL) from None
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, exceptions.SchemaError) as error:
        reason = error.message if isinstance(error, exceptions.SchemaError) else str(error)
        raise UserError(f"JSON Schema {str(schema)[:60]!r}: it is not valid ({reason}). Correct the schema.") from None
    return kind(schema)
