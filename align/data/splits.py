"""Hold out rows by a hash of their prompt, so that adding rows never moves an existing row to the other split."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def prompt_key(prompt: Any) -> str:
    """Canonical text of a prompt: the string itself, or the roles and contents of the messages as JSON.

    System prompts are left out, unless there is nothing else: a question with and without one is in the same split.
    """
    if isinstance(prompt, str):
        return prompt
    turns = [m for m in prompt if m["role"] != "system"] or prompt
    return json.dumps([[m["role"], m["content"]] for m in turns], ensure_ascii=False)


def key_hash(key: str) -> int:
    """64-bit hash of a key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def held_out_below(fraction: float) -> int:
    """A row is held out if the hash of its key is below this number."""
    return math.ceil(fraction * 2**64)


def is_held_out(key: str, fraction: float) -> bool:
    """True for about `fraction` of all keys. The result depends only on the key and the fraction."""
    return key_hash(key) < held_out_below(fraction)


def split_by_prompt_hash(rows: Iterable[T], fraction: float, key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """(train, held_out), each in the given order. Rows with the same key are in the same split."""
    sides: tuple[list[T], list[T]] = ([], [])
    for row in rows:
        sides[is_held_out(key(row), fraction)].append(row)
    return sides
