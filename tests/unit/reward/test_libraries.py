"""Verifiers of letters, JSON, algebra and overlap, with expected values by hand or of the libraries' own examples."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align.reward.choice import choice_score, chosen_letter
from align.reward.json_schema import json_score
from align.reward.overlap import overlap_score, rouge_l
from align.reward.symbolic import same_expression, symbolic_row


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. Because it is", "B"),
        ("(C) the third", "C"),
        ("**D**", "D"),
        ("The answer is (A).", "A"),
        ("The answer is: b", "B"),
        ("First I thought the answer is A. No, the answer is C.", "C"),
        ("Answer: option D", "D"),
        (r"So we get \boxed{B}", "B"),
        (r"\boxed{\text{C}}", "C"),
        ("答案：C", "C"),
        ("所以答案是Ｂ。", "B"),
        ("故选D", "D"),
        ("<think>maybe A</think>It must be C", "C"),
        ("A cat sat on the mat and it purred for an hour", None),
        ("Both A and B are possible", None),
        ("I do not know", None),
        ("The answer is Zebra", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABCD") == letter


def test_a_choice_is_compared_with_a_letter_or_a_number() -> None:
    assert [choice_score("B", cell, "ABCD") for cell in ("B", "(b)", 1, "1", 1.0, ["A", "B"])] == [1.0] * 6
    assert [choice_score("B", cell, "ABCD") for cell in ("C", 0, 7, ["A"])] == [0.0] * 4
    assert choice_score("none", "B", "ABCD") is None


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"n": 1, "tags": ["a"]}', 1.0),
        ('Here:\n```json\n{"n": 3}\n```\nDone.', 1.0),
        ('<think>{"n": 0}</think>{"n": 2}', 1.0),
        ('{"n": 0}', 0.0),
        ('{"n": 1.5}', 0.0),
        ('{"n": 1, "tags": ["c"]}', 0.0),
        ('{"n": 1, "x": 1}', 0.0),
        ("{}", 0.0),
        ('{"n": NaN}', 0.0),
        ('{"n": 1', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json(text: str, score: float) -> None:
    assert json_score(text, SCHEMA) == score
    assert json_score(text, '{"type": "string"}') == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        (r"4\pi i", r"4i\pi", True),
        ("(1,2)", "(1, 2)", True),
        ("(2,1)", "(1, 2)", False),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+2", "(x+1)^2", False),
        (r"\{1,2\}", r"\{2,1\}", True),
    ],
)
def test_algebra(answer: str, expected: str, same: bool) -> None:
    assert same_expression(answer, expected) is same
    row = {"format": "any", "expected": [rf"so \boxed{{{expected}}}"]}
    assert symbolic_row("", rf"We find \boxed{{{answer}}}.", row) == float(same)


def test_rouge_l_by_hand() -> None:
    # "the cat on the mat" is common: 5 of 6 words on both sides. Chinese: 4 of 6 characters.
    assert rouge_l("The cat sat on the mat.", "the cat is on the mat") == pytest.approx(5 / 6)
    assert rouge_l("今天天气很好", "今天天气不错") == pytest.approx(4 / 6)
    assert overlap_score("rouge_l", "a b", ["c d", "a b"]) == 1.0


def test_bleu_by_hand() -> None:
    # 5/6 words, 3/5 pairs, 1/4 triples; none of the 3 runs of four words is common, which counts as 1/(2*3).
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert overlap_score("bleu", "the cat sat on the mat", ["the cat is on the mat"]) == pytest.approx(expected)
    assert overlap_score("bleu", "今天天气很好", ["今天天气很好"]) == pytest.approx(1.0)


def test_chrf_by_hand() -> None:
    # Character 1-grams: 2 of 3; 2-grams: 1 of 2; 3-grams: 0 of 1. Orders that neither text has do not count.
    expected = (2 / 3 + 1 / 2 + 0) / 3
    found: Any = overlap_score("chrf", "abc", ["abd"])
    assert math.isclose(found, expected, rel_tol=1e-6)
