"""Scores of a text; the same function serves as a reward and as an evaluation metric."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    kept = (c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return "".join(kept).split()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the two bags of words (Rajpurkar et al. 2016, SQuAD).

    Words are lower-case, without punctuation, split at white space; articles count. Two empty texts agree.
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))
