"""Metrics against hand arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.config.evaluation import F1Metric, Metric
from align.config.rewards import ExactReward, FunctionReward, LengthReward, MathReward
from align.data.prepare import PromptRow
from align.errors import UserError
from align.eval.metrics import best_f1, build_metric, measure, ordered_pairs, require_scorable
from align.eval.task import MetricResult
from align.reward.components import Samples
from align.reward.process import FunctionProcess
from align.reward.text import token_f1
from align.rollout.base import Completion


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 2 shared of 3 predicted and 4 expected words: precision 2/3, recall 2/4, F1 = 4/7.
        ("return the list", "Return a new list.", 4 / 7),
        # Repeated words count: only one of the three "a" matches, so precision 1/3, recall 1/2.
        ("a a a", "a b", 0.4),
        ("Same, words!", "same words", 1.0),
        ("left", "right", 0.0),
        ("", "", 1.0),
        ("", "word", 0.0),
        ("...", "word", 0.0),
        ("«Grüße»", "grüße", 1.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected, abs=1e-12)
    assert token_f1(reference, prediction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("a new list", 0.5),  # 1 shared of 1 predicted and 3 expected words: 2 / 4
        (["a new list", "list"], 1.0),
        (4, 0.0),
        (None, None),
        (math.nan, None),
        ("  ", None),
        ([], None),
    ],
)
def test_f1_is_that_of_the_best_reference(cell: Any, expected: float | None) -> None:
    assert best_f1("list", cell) == expected


@pytest.mark.parametrize("cell", [4, 4.0, "4"])
def test_a_reference_that_is_a_number_counts_as_text(cell: Any) -> None:
    assert best_f1("It is 4.", cell) == 0.5  # 1 shared of 3 predicted words and 1 expected: 2 / 4


def test_ordered_pairs_count_ties_half_and_keep_unknown_ones_unknown() -> None:
    values = ordered_pairs([1.0, 2.0, 3.0, math.nan, math.inf], [0.0, 2.0, 4.0, 0.0, 0.0])
    assert values[:3] == [1.0, 0.5, 0.0]
    assert all(math.isnan(value) for value in values[3:])


class Words:
    """Stand-in tokenizer: decoding returns the text whose index is the first id."""

    chat_template = None

    def __init__(self, texts: list[str]):
        self.texts = texts

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.texts[ids[0]]


def samples(texts: list[str], rows: list[dict[str, Any]]) -> Samples:
    prompts = [PromptRow((1,), [{"role": "user", "content": "?"}], None, row) for row in rows]
    completions = [Completion([1], [i] * (i + 1), [0.0] * (i + 1), True, 0) for i in range(len(texts))]
    return Samples(prompts, completions, Words(texts))  # type: ignore[arg-type]


@pytest.fixture
def process() -> Iterator[FunctionProcess]:
    functions = FunctionProcess()
    yield functions
    functions.close()


def result_of(metric: Metric, found: Samples, process: FunctionProcess) -> MetricResult:
    component = build_metric(metric, process, found.tokenizer)
    return measure(metric, component, found, resamples=100, seed=0)[0]


def test_a_completion_without_a_final_answer_counts_as_wrong_and_is_counted(process: FunctionProcess) -> None:
    texts = ["so #### 72", "so #### 71", "I do not know", "#### 1,000"]
    rows = [{"answer": "#### 72"}, {"answer": "#### 72"}, {"answer": "#### 72"}, {"answer": 1000}]
    result = result_of(MathReward(kind="math", format="hash"), samples(texts, rows), process)
    assert result.values == [1.0, 0.0, 0.0, 1.0]
    assert (result.mean, result.n, result.unscored, result.unanswered) == (0.5, 4, 0, 1)
    # Sample variance of (1, 0, 0, 1) is 1/3, so the standard error is sqrt(1/12).
    assert result.standard_error == pytest.approx(math.sqrt(1 / 12))


def test_rows_without_the_compared_column_are_not_scored(process: FunctionProcess) -> None:
    found = samples(["a b", "a b", "a b"], [{"reference": "a c"}, {"reference": None}, {"reference": "a b"}])
    result = result_of(F1Metric(kind="f1"), found, process)
    assert result.values == [0.5, None, 1.0]
    assert (result.mean, result.n, result.unscored) == (0.75, 2, 1)


def test_length_counts_the_tokens_of_the_completion(process: FunctionProcess) -> None:
    found = samples(["x"] * 4, [{}] * 4)  # lengths 1, 2, 3, 4
    result = result_of(LengthReward(kind="length", max_tokens=2, buffer=1), found, process)
    assert result.values == [1.0, 1.0, 0.5, 0.0]


def test_a_function_that_fails_on_a_completion_leaves_it_unscored(process: FunctionProcess, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, row):\n    return 1 / len(completion)\n")
    metric = FunctionReward(kind="function", path=f"{file}:score", batched=False)
    result = result_of(metric, samples(["ab", "", "abcd"], [{}] * 3), process)
    assert result.values == [0.5, None, 0.25]
    assert (result.mean, result.n, result.unscored) == (0.375, 2, 1)


def test_a_column_that_is_empty_in_every_row_is_refused() -> None:
    found = samples([], [{"question": "?", "answer": None}, {"question": "?"}])
    with pytest.raises(UserError, match="'answer', which is empty in every row; columns with values: question"):
        require_scorable("sums", [ExactReward(kind="exact")], found)
