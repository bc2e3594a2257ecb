"""The share of the expected texts that an answer contains, as RULER defines it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def share_found(answer: str, expected: Sequence[str]) -> float:
    """RULER's string_match_all: share of the expected texts in the answer, in any case."""
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return sum(item.lower() in text for item in expected) / len(expected)


def any_found(answer: str, expected: Sequence[str]) -> float:
    """RULER's string_match_part: 1.0 if any of the expected texts is in the answer, in any case."""
    return float(share_found(answer, expected) > 0)
