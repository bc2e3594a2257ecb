"""Parse JSON objects exactly, and find where a JSON value ends without parsing it."""

from __future__ import annotations

import json
import re
from typing import Any

from align.data.rows import Row, Unreadable
from align.errors import UserError

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]|"', re.DOTALL)
"""A whole string, a bracket, or the beginning of a string that does not end."""
_ATOM = re.compile(rb"[^\s,\]}]+")
_SPACE = b" \t\r\n"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Repeated(Exception):
    """Raised for an object with the same key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated
    return found


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def parse_object(text: bytes, where: str) -> Row:
    """The row of a JSON object. A column that cannot be read has the value `Unreadable`.

    Raises `UserError` with `where` if the text is not a JSON object with at least one key.
    """
    try:
        row = _decode(text.decode().strip())
        if _SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError, _Repeated) as error:
        return _parse_by_column(text, where, error)
    if not isinstance(row, dict) or not row:
        raise _not_a_row(row, where)
    return row


def _not_a_row(value: Any, where: str) -> UserError:
    kind = "an empty object" if value == {} else f"a {type(value).__name__}"
    return UserError(f"{where}: {kind}, but a row must be a JSON object with named columns. Correct or remove it.")


def _parse_by_column(text: bytes, where: str, error: Exception) -> Row:
    """The row of an object with an invalid value, or the error if it is not an object."""
    parts = _columns_of(text)
    if parts is None:
        raise _invalid(text, where, error)
    row: Row = {}
    for raw_key, raw in parts:
        try:
            key, problem = json.loads(raw_key.decode()), ""
            key.encode()
        except (ValueError, AttributeError):
            raise _invalid(text, where, error) from error
        value: Any = None
        try:
            value = _decode(raw.decode())
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeDecodeError as wrong:
            problem = f"is not UTF-8 ({wrong.reason})"
        except UnicodeEncodeError:
            problem = "has half of a surrogate pair, which is not text"
        except _Repeated:
            problem = "has an object with the same key twice"
        except RecursionError:
            problem = "is nested too deeply"
        except ValueError as wrong:
            # A value that is only a large number does not make its column part of a broken line.
            if "integer string conversion" not in str(wrong):
                raise _invalid(text, where, error) from error
            problem = "has a number of more than 4,300 digits"
        if key in row:
            value, problem = None, "occurs twice"
        advice = "Save the file as UTF-8." if problem.startswith("is not UTF-8") else "Correct or remove the line."
        row[key] = Unreadable(where, problem, advice) if problem else value
    if not row:
        raise _not_a_row({}, where)
    return row


def _invalid(text: bytes, where: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        reason = f"not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
    elif isinstance(error, json.JSONDecodeError):
        reason = f"not valid JSON ({error.msg} at column {error.colno}). Correct or remove the line."
    elif isinstance(error, RecursionError):
        reason = "nested too deeply. Correct or remove the line."
    else:
        reason = "not valid JSON. Correct or remove the line."
    return UserError(f"{where}: {reason}")


def _columns_of(text: bytes) -> list[tuple[bytes, bytes]] | None:
    """(key, value) of each column of an object, as JSON text; None if the text is not an object."""
    at = skip_space(text, 0)
    if text[at : at + 1] != b"{":
        return None
    found: list[tuple[bytes, bytes]] = []
    at = skip_space(text, at + 1)
    if text[at : at + 1] == b"}":
        return found if not text[at + 1 :].strip() else None
    while True:
        end = value_end(text, at)
        if end is None or text[at : at + 1] != b'"':
            return None
        key, at = text[at:end], skip_space(text, end)
        if text[at : at + 1] != b":":
            return None
        at = skip_space(text, at + 1)
        end = value_end(text, at)
        if end is None:
            return None
        found.append((key, text[at:end]))
        at = skip_space(text, end)
        mark = text[at : at + 1]
        if mark == b"}":
            return found if not text[at + 1 :].strip() else None
        if mark != b",":
            return None
        at = skip_space(text, at + 1)


def skip_space(text: bytes, at: int) -> int:
    """Position of the first byte from `at` on that is not white space of JSON."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def value_end(text: bytes, start: int) -> int | None:
    """Position after the JSON value at `start`, found by its brackets and strings; None if the text ends before it.

    The value may be nested to any depth. It is not checked otherwise.
    """
    first = text[start : start + 1]
    if first not in (b"{", b"[", b'"'):
        atom = _ATOM.match(text, start)
        return atom.end() if atom and atom.end() < len(text) else None
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = text[token.start()]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        elif token.end() - token.start() == 1:
            return None
        if depth <= 0:
            return token.end()
    return None
