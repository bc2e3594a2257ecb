"""Verifiers: rules that score one completion.

To add a verifier, write its section in `config/rewards.py`, and register a function for that section here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from align.config import rewards as config
from align.reward.choice import choice_score
from align.reward.instructions import instruction_score, read_instructions, verdicts
from align.reward.json_schema import json_row, json_score
from align.reward.math_answer import AnswerFormat, expected_answer, final_answer, same_answer
from align.reward.overlap import overlap_score
from align.reward.symbolic import symbolic_row
from align.reward.text import Row, accepted_values, spellings

__all__ = ["json_row", "regex_row", "symbolic_row"]
"""Functions that `components` runs in the process of users' functions, which looks for them here."""


@dataclass(frozen=True)
class Sample:
    """One completion to verify.

    text: the completion, without special tokens.
    row: columns of the prompt's data row.
    tokens: length of the completion, its end-of-sequence token included.
    """

    text: str
    row: Row
    tokens: int


Section = TypeVar("Section", bound=config.RewardBase)

VERIFIERS: dict[type[config.RewardBase], Callable[[Any, Sample], float | None]] = {}
"""Verifier of each reward section: f(section, sample) -> score, or None if the completion has no answer."""


def verifier(
    section: type[Section],
) -> Callable[[Callable[[Section, Sample], float | None]], Callable[[Section, Sample], float | None]]:
    """Register the decorated function as the verifier of a reward section."""

    def register(function: Callable[[Section, Sample], float | None]) -> Callable[[Section, Sample], float | None]:
        VERIFIERS[section] = function
        return function

    return register


@verifier(config.MathReward)
def verify_math(reward: config.MathReward, sample: Sample) -> float | None:
    return math_score(sample.text, sample.row[reward.column], reward.format)


@verifier(config.ExactReward)
def verify_exact(reward: config.ExactReward, sample: Sample) -> float:
    return exact_score(sample.text, sample.row[reward.column], ignore_case=reward.ignore_case)


@verifier(config.RegexReward)
def verify_regex(reward: config.RegexReward, sample: Sample) -> float:
    """Score without a time limit; `components` runs `regex_row` instead, in a process that can be killed."""
    return regex_score(reward.pattern, sample.text, None if reward.column is None else sample.row[reward.column])


@verifier(config.FormatReward)
def verify_format(reward: config.FormatReward, sample: Sample) -> float:
    return format_score(sample.text, reward.sections, opened=reward.opened, text_after=reward.text_after)


@verifier(config.LengthReward)
def verify_length(reward: config.LengthReward, sample: Sample) -> float:
    return length_score(sample.tokens, min_tokens=reward.min_tokens, max_tokens=reward.max_tokens, buffer=reward.buffer)


@verifier(config.ChoiceReward)
def verify_choice(reward: config.ChoiceReward, sample: Sample) -> float | None:
    return choice_score(sample.text, sample.row[reward.column], reward.letters)


@verifier(config.JsonReward)
def verify_json(reward: config.JsonReward, sample: Sample) -> float:
    """Score without a time limit; `components` runs `json_row` instead, in a process that can be killed."""
    return json_score(sample.text, reward.json_schema if reward.column is None else sample.row[reward.column])


@verifier(config.OverlapReward)
def verify_overlap(reward: config.OverlapReward, sample: Sample) -> float:
    references = [spellings(value)[0] for value in accepted_values(sample.row[reward.column])]
    return overlap_score(reward.measure, sample.text, references)


@verifier(config.InstructionsReward)
def verify_instructions(reward: config.InstructionsReward, sample: Sample) -> float | None:
    found = verdicts(sample.text, read_instructions(sample.row, reward.column, reward.arguments))
    return instruction_score(found, loose=reward.reading == "loose", share=reward.score == "share")


# --- scores --------------------------------------------------------------------------------------------------


def math_score(completion: str, expected: Any, format: AnswerFormat = "any") -> float | None:
    """1.0 if the completion's final answer equals an expected answer, 0.0 if not; None if it has no final answer.

    expected: a data cell, with one answer or a list of answers.
    """
    answer = final_answer(completion, format)
    if answer is None:
        return None
    return float(any(same_answer(answer, expected_answer(str(value))) for value in accepted_values(expected)))


def exact_score(completion: str, expected: Any, *, ignore_case: bool = False) -> float:
    """1.0 if the completion equals an expected text, ignoring white space at both ends; otherwise 0.0.

    expected: a data cell, with one text or a list of texts.
    """

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    accepted = (text for value in accepted_values(expected) for text in spellings(value))
    return float(plain(completion) in map(plain, accepted))


def regex_score(pattern: str, completion: str, expected: Any = None) -> float:
    """1.0 if the pattern is found and, unless `expected` is None, its first group equals an expected text; else 0.0."""
    match = re.search(pattern, completion)
    if match is None or expected is None:
        return float(match is not None)
    return exact_score(match.group(1) or "", expected)


def format_score(
    completion: str, sections: list[str], *, opened: bool = False, text_after: Literal["required", "forbidden"]
) -> float:
    """1.0 if the completion is <a>text</a> for each section in order, then text or nothing, depending on `text_after`.

    Each tag occurs exactly once, with only white space between sections. opened: the prompt ends with the first
    opening tag, so the completion lacks it.
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
    """1.0 within the range; outside, the score falls linearly and is 0.0 from `buffer` + 1 tokens beyond the range."""
    outside = max(min_tokens - length, length - max_tokens, 0)
    return max(0.0, 1.0 - outside / (buffer + 1))


def regex_row(prompt: str, completion: str, row: Row) -> float:
    """`regex_score` with the signature of a reward function, for the process of users' functions."""
    return regex_score(row["pattern"], completion, row["expected"])
