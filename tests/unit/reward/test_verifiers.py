"""Verifiers, compared with expectations written by hand."""

from __future__ import annotations

import pytest
import torch

from align.reward.shaping import overlong_shaping
from align.reward.verifiers import exact_score, format_score, length_score, regex_score


def test_exact() -> None:
    assert exact_score(" Paris\n", "Paris") == 1.0
    assert exact_score("paris", "Paris") == 0.0
    assert exact_score("PARIS", "Paris", ignore_case=True) == 1.0
    assert exact_score("Rome", ["Paris", "Rome"]) == 1.0
    assert exact_score("Bonn", ["Paris", "Rome"]) == 0.0
    assert exact_score("7", 7) == 1.0


def test_regex() -> None:
    assert regex_score(r"\bcat\b", "a cat sat") == 1.0
    assert regex_score(r"\bcat\b", "concatenate") == 0.0
    assert regex_score(r"is (\w+)\.", "It is Paris.", "Paris") == 1.0
    assert regex_score(r"is (\w+)\.", "It is Rome.", "Paris") == 0.0
    assert regex_score(r"is (\w+)?", "It is .", "Paris") == 0.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>2 + 2</think>4", 1.0),
        ("\n<think>\n2 + 2\n</think>\n\n4", 1.0),
        ("<think>2 + 2</think>", 0.0),  # no answer
        ("<think> </think>4", 0.0),  # no thought
        ("<think>2 + 2", 0.0),
        ("4", 0.0),
        ("Well, <think>2 + 2</think>4", 0.0),
        ("</think>4<think>2", 0.0),
        ("<think>a</think><think>b</think>4", 0.0),
    ],
)
def test_format(completion: str, score: float) -> None:
    assert format_score(completion, ["think"], text_after="required") == score


def test_format_with_two_sections_and_with_an_opened_one() -> None:
    both = {"sections": ["think", "answer"], "text_after": "forbidden"}
    assert format_score("<think>a</think>\n<answer>4</answer>\n", **both) == 1.0
    assert format_score("<think>a</think>\n<answer>4</answer> bye", **both) == 0.0
    assert format_score("<answer>4</answer><think>a</think>", **both) == 0.0
    assert format_score("<think>a<answer>4</answer></think>", **both) == 0.0
    assert format_score("2 + 2</think>4", ["think"], opened=True, text_after="required") == 1.0
    assert format_score("<think>2 + 2</think>4", ["think"], opened=True, text_after="required") == 0.0


@pytest.mark.parametrize(
    ("length", "score"), [(10, 1.0), (20, 1.0), (9, 0.75), (7, 0.25), (6, 0.0), (0, 0.0), (21, 0.75), (24, 0.0)]
)
def test_length(length: int, score: float) -> None:
    assert length_score(length, min_tokens=10, max_tokens=20, buffer=3) == score


def test_length_without_a_buffer_is_a_range() -> None:
    assert [length_score(n, min_tokens=2, max_tokens=3, buffer=0) for n in range(6)] == [0, 0, 1, 1, 0, 0]


def test_a_buffer_of_one_token_penalises_the_last_token_alone() -> None:
    shaped = overlong_shaping(torch.tensor([18, 19, 20]), max_new_tokens=20, buffer=1, penalty=2.0)
    assert shaped.tolist() == [0.0, 0.0, -2.0]


def test_overlong_shaping_falls_linearly_in_the_buffer() -> None:
    """The limit is 20 tokens and the buffer 4, so the penalty grows from 17 to 20 tokens."""
    lengths = torch.tensor([1, 15, 16, 17, 18, 19, 20, 25])
    shaped = overlong_shaping(lengths, max_new_tokens=20, buffer=4, penalty=2.0)
    assert shaped.tolist() == [0.0, 0.0, 0.0, -0.5, -1.0, -1.5, -2.0, -2.0]
    with pytest.raises(ValueError, match="at least one token"):
        overlong_shaping(lengths, max_new_tokens=20, buffer=0, penalty=1.0)
