"""Text scores that serve as rewards and as evaluation metrics, and the values that a data cell accepts."""

from __future__ import annotations

import math
import string
import unicodedata
from collections import Counter
from typing import Any

Row = dict[str, Any]
"""Data columns of one prompt."""


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    kept = (c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return "".join(kept).split()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the two bags of words (Rajpurkar et al. 2016, SQuAD).

    Words are lower-case, without punctuation, split at white space; articles count. Two empty texts have F1 1.
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def is_missing(value: Any) -> bool:
    """True for null and NaN, which mark an empty cell in data files."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def accepted_values(cell: Any) -> list[Any]:
    """Values that a cell accepts: the cell itself, or the items of a list; an empty cell accepts none."""
    items = cell if isinstance(cell, list | tuple) else [cell]
    return [item for item in items if not is_missing(item)]


def spellings(value: Any) -> list[str]:
    """Usual spellings of a value, the plainest first.

    A column of integers with an empty cell is read as floats, so 4.0 is also spelled "4".
    """
    if isinstance(value, bool):
        return [str(value).lower(), str(value)]
    if isinstance(value, float) and value.is_integer():
        return [str(int(value)), str(value)]
    return [str(value)]
