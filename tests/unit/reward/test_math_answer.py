"""Extraction and comparison of final answers. Every expectation was written by hand."""

from __future__ import annotations

import time

import pytest

from align.reward.math_answer import expected_answer, final_answer, same_answer, to_numbers
from align.reward.verifiers import math_score

GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)

EQUAL = [
    ("72", "72"),
    ("72.0", "72"),
    ("72.", "72"),
    ("072", "72"),
    ("+72", "72"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    ("1\\,234", "1234"),
    ("10 000", "10000"),
    ("1,234,567.50", "1234567.5"),
    ("$18", "18"),
    ("\\$18.00", "18"),
    ("-$5", "-5"),
    ("$-5$", "-5"),
    ("−5", "-5"),  # Unicode's minus
    ("€1,200", "1200"),
    ("US$ 7", "7"),
    ("18 dollars", "18"),
    ("18 dollars per day", "18"),
    ("5 km/h", "5"),
    ("12 cm^2", "12"),
    ("12 cm²", "12"),
    ("12\\text{ cm}^2", "12"),
    ("3 m", "3"),
    ("90^\\circ", "90"),
    ("90°", "90"),
    ("9个", "9"),
    ("１２", "12"),  # full width
    ("50%", "50"),
    ("50\\%", "50"),
    ("50%", "0.5"),
    ("0.5", "50\\%"),
    ("3/4", "0.75"),
    ("\\frac{3}{4}", "0.75"),
    ("\\dfrac34", "3/4"),
    ("-\\tfrac{3}{4}", "-0.75"),
    ("\\frac{-3}{4}", "-3/4"),
    ("2\\frac{1}{2}", "2.5"),
    ("2 1/2", "2.5"),
    ("2½", "5/2"),
    ("½", "0.5"),
    (".5", "1/2"),
    ("6/8", "3/4"),
    ("1e3", "1000"),
    ("1.5 \\times 10^{3}", "1500"),
    ("2 x 10^-2", "0.02"),
    ("0.3333333", "1/3"),
    ("x = 5", "5"),
    ("$x=5$", "5"),
    ("(5)", "5"),
    ("**42**", "42"),
    ("\\(42\\)", "42"),
    ("4 \\pi i", "4\\pi i"),
    ("\\left(0, 1\\right)", "(0,1)"),
    ("\\dfrac{\\pi}{2}", "\\frac{\\pi}{2}"),
    ("Yes.", "yes"),
    ("(B)", "B"),
    ("\\text{(B)}", "B"),
]

DIFFERENT = [
    ("72", "73"),
    ("-5", "5"),
    ("0.33", "1/3"),
    ("3,5", "35"),  # not a thousands separator
    ("12,34", "1234"),
    ("5:30", "530"),
    ("5 or 6", "5"),
    ("2x", "2"),
    ("2i", "2"),
    ("4\\pi", "4"),
    ("4pi", "4"),
    ("10²", "102"),
    ("50", "0.5"),  # without a percent sign
    ("1/0", "1"),
    ("", ""),
    ("", "0"),
    ("(1,2)", "(1,3)"),
    ("yes", "no"),
    ("1e999999999", "1"),
]

ANSWERS = [
    (GSM8K, "72"),
    ("She makes $18.", "$18"),
    ("So 16 - 3 - 4 = 9 eggs are left, and 9 * 2 = 18", "18"),
    ("It takes 3-4 days", "4"),  # a dash between numbers is not a minus
    ("The result is -4", "-4"),
    ("A total of 1,234.50 dollars, as said.", "1,234.50"),
    ("The answer is 42.", "42"),
    ("The answer is: 42. That is 6 times 7.", "42"),
    ("The answer is 16 - 3 - 4 = 9.", "9"),
    ("The answer is $18 per day because 9 * 2 is so much", "$18"),
    ("**Answer:** 26 because of 5", "26"),
    ("He had 48 people at the concert.\nA: 40", "40"),
    ("答案是9。", "9"),
    ("Thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("\\boxed{1} or rather \\boxed{2}, said 3 people", "2"),
    ("The final answer is: $\\boxed{4}$. I hope it is correct.", "4"),
    ("\\boxed{4}\n#### 5", "5"),
    ("#### 5\nNo: \\boxed{4}", "4"),
    ("#### Step 1: add\n2 + 3 = 5\n#### Step 2: double\n5 * 2 = 10", "10"),  # headings
    ("I do not know", None),
    ("", None),
    ("\\boxed{never closed", None),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_where_the_answer_stands(text: str, answer: str | None) -> None:
    found = final_answer(text)
    if answer is None:
        assert found is None
    else:
        assert found is not None
        assert found.strip() == answer


def test_a_format_that_is_asked_for_is_required() -> None:
    assert final_answer("The answer is 5", "hash") is None
    assert final_answer("The answer is 5", "boxed") is None
    assert final_answer("#### 5\n\\boxed{6}", "hash") == "5"
    assert final_answer("\\boxed{6}\n#### 5", "boxed") == "6"
    assert final_answer("####\n5", "hash") == "5"
    assert final_answer("#### 5 apples and 3 pears", "hash") == "5"


def test_the_rows_answer_may_be_bare_or_a_worked_solution() -> None:
    assert expected_answer(GSM8K) == "72"
    assert expected_answer(" 18 ") == "18"
    assert expected_answer("So it is \\boxed{4\\pi i}.") == "4\\pi i"
    assert expected_answer("4\\pi i") == "4\\pi i"


def test_scores() -> None:
    assert math_score("so it is 72", GSM8K) == 1.0
    assert math_score("so it is 71", GSM8K) == 0.0
    assert math_score("so it is none", GSM8K) is None
    assert math_score("#### 72", 72) == 1.0
    assert math_score("72", GSM8K, "boxed") is None


@pytest.mark.parametrize(
    "text",
    [
        "9" * 200_000,
        "#### " + "9" * 200_000,
        "\\boxed{" + "{" * 200_000,
        "\\boxed{" * 30_000,
        "1e" + "9" * 100_000,
        "The answer is 10^{999999999}",
        "answer is answer is " * 20_000,
        "1,2" * 60_000,
        "\\frac{1}{0}" * 10_000,
        "a-" * 100_000 + "1" + "," * 100_000,
        "\\text{" * 30_000,
        "1 " * 100_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """A policy may write anything, and a reward runs on every completion. The test measures CPU time, because other
    processes may run at the same time."""
    start = time.process_time()
    math_score(text, "72")
    math_score("72", text)
    assert time.process_time() - start < 1.0


def test_a_number_beyond_the_length_limit_is_compared_as_text() -> None:
    assert same_answer("5" + " " * 300, "5")
    assert not same_answer("5" + "0" * 300, "5")


def test_a_number_is_exact() -> None:
    assert to_numbers("0.1")[0] * 3 == to_numbers("0.3")[0]
    assert not same_answer("10000001", "10000002.1")
    assert not same_answer("12345678", "12345698")
    assert not same_answer("1.0000001", "1.0000002")
