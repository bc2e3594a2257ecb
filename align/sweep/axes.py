"""Settings of a sweep: `KEY=VALUE,VALUE,...` for a grid, `KEY=LOW..HIGH[:log]` for a search."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from align.config.load import parse_value
from align.errors import UserError

_RANGE = re.compile(r"([-+]?\d[\d.eE+-]*?)\.\.([-+]?[\d.][\d.eE+-]*)(:log)?")
_CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Axis:
    """A swept setting. values: YAML texts."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A setting whose values a search draws from a range.

    whole: draw integers only.
    log: draw the logarithm uniformly.
    """

    key: str
    low: float
    high: float
    whole: bool
    log: bool


def read_settings(overrides: Sequence[str]) -> tuple[list[str], list[Axis | Range]]:
    """(overrides with one value, settings with several values or a range)."""
    fixed: list[str] = []
    axes: list[Axis | Range] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"'{override}': not of the form KEY=VALUE,VALUE. Write, for example, stages.dpo.beta=0.05,0.1,0.3."
            )
        if any(axis.key == key for axis in axes) or any(other.partition("=")[0] == key for other in fixed):
            raise UserError(f"'{override}': the key is written twice. Write all its values in one argument.")
        if found := _RANGE.fullmatch(text):
            axes.append(_range(key, override, *found.groups()))
            continue
        values = split_values(text)
        for value in values:
            parse_value(value, f"'{override}'")
        if len(values) == 1:
            fixed.append(override)
        elif len(set(values)) < len(values):
            raise UserError(f"'{override}': a value is written twice. Remove one of the two.")
        else:
            axes.append(Axis(key, tuple(values)))
    return fixed, axes


def _range(key: str, override: str, low: str, high: str, log: str | None) -> Range:
    ends = [parse_value(text, f"'{override}'") for text in (low, high)]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise UserError(f"'{override}': the ends of a range are not numbers. Write, for example, {key}=0.01..1:log.")
    if ends[0] >= ends[1] or (log and ends[0] <= 0):
        wanted = "a range goes from a lower to a higher number" + (", above 0 with :log" if log else "")
        raise UserError(f"'{override}': {wanted}. Write, for example, {key}=0.01..1:log.")
    return Range(key, ends[0], ends[1], all(isinstance(end, int) for end in ends), bool(log))


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key; the last two parts of keys that share the last one."""
    every = list(keys)
    last = [key.split(".")[-1] for key in every]
    return {
        key: end if last.count(end) == 1 else ".".join(key.split(".")[-2:])
        for key, end in zip(every, last, strict=True)
    }


def split_values(text: str) -> list[str]:
    """Split values at commas; commas within quotes, lists and sections do not separate."""
    parts, start, closing, quote = [], 0, [], ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not text[start:place].strip(" [{,:"):
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]]]
