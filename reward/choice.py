"""The letter of a multiple-choice answer in a text."""

from __future__ import annotations

import re
from typing import Any

from align.reward.math_answer import plain_characters
from align.reward.text import accepted_values

_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])|答案(?:是|为|选|:)?|(?:选择?|故选)", re.IGNORECASE)
_MARKED = re.compile(
    r"\s*:?\s*(?:option|choice|选项)?\s*[(\[*{\"']*\\?(?:boxed\{|text\{)?\(?([A-Z])(?![A-Za-z0-9'’])", re.IGNORECASE
)
_FIRST = re.compile(r"[(\[*\"'\s]*([A-Z])(?:[)\].:,*\"'\s]|$)")
_BOX = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}")
_ALONE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'’])")


def chosen_letter(text: str, letters: str) -> str | None:
    r"""The letter that a text gives as its answer, or None.

    In this order: the last `\boxed{B}`, the letter after the last phrase such as "the answer is", a letter at the
    start of the text, and the only letter that stands alone in it.
    """
    text = plain_characters(text.rpartition("</think>")[2]).strip()
    if boxes := [letter for letter in _BOX.findall(text) if letter in letters]:
        return str(boxes[-1])
    for phrase in reversed(list(_PHRASE.finditer(text))):
        if (found := _MARKED.match(text, phrase.end())) and found[1].upper() in letters:
            return found[1].upper()
    if (found := _FIRST.match(text)) and found[1] in letters and not re.match(r"[AI]\s+[a-z]", text):
        return found[1]
    alone = {letter for letter in _ALONE.findall(text) if letter in letters} - ({"A", "I"} if len(text) > 40 else set())
    return alone.pop() if len(alone) == 1 else None


def choice_score(completion: str, expected: Any, letters: str) -> float | None:
    """1.0 if the completion chooses an expected letter, 0.0 if another, None if it chooses none.

    expected: a data cell with a letter, or with the number of the choice, counted from 0.
    """
    letter = chosen_letter(completion, letters)
    if letter is None:
        return None
    return float(any(letter == _letter(value, letters) for value in accepted_values(expected)))


def _letter(value: Any, letters: str) -> str:
    if isinstance(value, str) and not value.strip().isdigit():
        return value.strip().strip("().").upper()
    number = int(value)
    return letters[number] if 0 <= number < len(letters) else ""
