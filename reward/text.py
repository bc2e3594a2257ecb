"""Scores of a text; the same function serves as a reward and as an evaluation metric."""

from __future__ import annotations

import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return text.lower().translate(_PUNCTUATION).split()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, counting repeated words (as in SQuAD's evaluation)."""
    found, wanted = words(prediction), words(reference)
    overlap = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    if overlap == 0:
        return 0.0
    precision, recall = overlap / len(found), overlap / len(wanted)
    return 2 * precision * recall / (precision + recall)
