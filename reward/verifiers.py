"""Scores of one completion by rule. Pure functions of text and numbers."""

from __future__ import annotations

import re
from typing import Any, Literal

from align.reward.math_answer import AnswerFormat, expected_answer, final_answer, same_answer


def math_score(completion: str, expected: Any, format: AnswerFormat = "any") -> float | None:
    """1.0 where the completion's final answer is the expected one, 0.0 where it is not, None where there is none."""
    answer = final_answer(completion, format)
    return None if answer is None else float(same_answer(answer, expected_answer(str(expected))))


def exact_score(completion: str, expected: Any, *, ignore_case: bool = False) -> float:
    """1.0 where the completion is the expected text, or one of a list of them; white space at the ends is left out."""

    def plain(text: Any) -> str:
        return str(text).strip().casefold() if ignore_case else str(text).strip()

    accepted = expected if isinstance(expected, list | tuple) else [expected]
    return float(plain(completion) in map(plain, accepted))


def regex_score(pattern: str, completion: str, expected: Any = None) -> float:
    """1.0 where the pattern is found and, if a text is expected, its first group is that; white space as above."""
    match = re.search(pattern, completion)
    if match is None or expected is None:
        return float(match is not None)
    return exact_score(match.group(1) or "", expected)


def format_score(
    completion: str, sections: list[str], *, opened: bool = False, text_after: Literal["required", "forbidden"]
) -> float:
    """1.0 where the completion is <a>text</a> for each section in order, and then text or none, as `text_after` says.

    Each tag stands exactly once, with nothing but white space between sections. opened: the first opening tag belongs
    to the prompt.
    """
    text = f"<{sections[0]}>{completion}" if opened else completion
    tags = [(f"<{section}>", f"</{section}>") for section in sections]
    if any(text.count(tag) != 1 for pair in tags for tag in pair):
        return 0.0
    for opening, closing in tags:
        before, _, text = text.partition(opening)
        inside, closed, text = text.partition(closing)
        if not closed or before.strip() or not inside.strip():
            return 0.0
    return float(bool(text.strip()) == (text_after == "required"))


def length_score(length: int, *, min_tokens: int, max_tokens: int, buffer: int) -> float:
    """1.0 within the range; outside it falls linearly to 0.0 at `buffer` + 1 tokens beyond."""
    outside = max(min_tokens - length, length - max_tokens, 0)
    return max(0.0, 1.0 - outside / (buffer + 1))


def regex_row(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """`regex_score` as a reward function, to be run where it can be ended."""
    return regex_score(row["pattern"], completion, row["expected"])
