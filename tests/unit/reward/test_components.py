"""Components score completions without a rollout batch, read data columns of every type, and exist for every kind of
reward except a reward model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from align.config import rewards as config
from align.data.prepare import PromptRow
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.reward.components import Samples, build_component, columns, has_column, require_columns
from align.reward.functions import reference_f1
from align.reward.process import FunctionProcess
from align.reward.text import accepted_values
from align.reward.verifiers import VERIFIERS, exact_score, math_score
from align.rollout.base import Completion


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer without merges, so that a text has one token per byte."""
    return train_tokenizer(["a"], 259)


def samples(tokenizer: Any, texts: list[str], rows: list[dict[str, Any]]) -> Samples:
    prompts = [PromptRow((1,), [{"role": "user", "content": "q"}], None, row) for row in rows]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return Samples(prompts, [Completion([1], i, [0.0] * len(i), True, 0) for i in ids], tokenizer)


def section(**settings: Any) -> Any:
    return TypeAdapter(config.Reward).validate_python(settings)


def test_every_reward_section_is_a_verifier_or_one_of_the_three_other_kinds() -> None:
    union, _ = get_args(config.Reward)
    others = {config.ModelReward, config.RemoteReward, config.FunctionReward}
    # Evaluation registers its own metrics too, once it has been imported.
    verifiers = {section for section in VERIFIERS if section.__module__ == config.__name__}
    assert set(get_args(union)) == verifiers | others
    assert not verifiers & others


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "math"}, [1, 0, None]),  # the last text has no number
        ({"kind": "exact"}, [0, 1, 0]),
        ({"kind": "regex", "pattern": r"is (\d+)", "column": "answer"}, [1, 0, 0]),
        ({"kind": "format", "sections": ["a"]}, [0, 0, 1]),
        ({"kind": "choice", "column": "letter"}, [None, None, None]),
        ({"kind": "json"}, [0, 0, 0]),  # a number in JSON does not end with a point
        ({"kind": "overlap", "measure": "rouge_l"}, [2 / 3, 0, 0]),  # 2 shared of 4 and 2 words
        ({"kind": "math", "symbolic": True}, [1, 0, None]),
        ({"kind": "ifeval"}, [None, 1, 0]),  # an unknown type; no comma; not quoted
        ({"kind": "code", "column": "test_list"}, [0, 0, 0]),  # none is a program with a function `f`
        ({"kind": "length", "min_tokens": 8, "max_tokens": 20}, [1, 0, 1]),
        ({"kind": "function", "path": "reference_f1"}, [2 / 3, 0, 0]),  # 2 shared words of 4 and 2
    ],
)
def test_a_metric_scores_texts_against_rows(tokenizer, settings: dict[str, Any], expected: list[float | None]) -> None:
    texts = ["the answer is 4", "4.", "<a>b</a>four"]
    rows = [{"answer": 4, "reference": "is 4"}, {"answer": "4.", "reference": "5"}, {"answer": 4.0, "reference": "c"}]
    if settings["kind"] == "math":
        rows[1]["answer"] = 5
    rows = [row | {"test_list": ["assert f()"], "letter": "B"} for row in rows]
    for row, name in zip(rows, ["keywords:rhymes", "punctuation:no_comma", "startend:quotation"], strict=True):
        row |= {"instruction_id_list": [name], "kwargs": [{}]}
    with FunctionProcess() as process:
        scored = build_component(section(**settings), process, tokenizer)(samples(tokenizer, texts, rows))
    if settings["kind"] == "ifeval":
        assert scored.problem == "undecided: 'keywords:rhymes' (unknown)"
    assert scored.scores == pytest.approx(expected) if None not in expected else scored.scores == expected


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        (4, ["4", " 4\n"], ["40", "five"]),
        (4.0, ["4", "4\n"], ["40", "4.5"]),  # integers beside an empty cell are read as floats
        (2.5, ["2.5"], ["2"]),
        (True, ["true", "True"], ["1", "false"]),
        (["a", 7, False, None], ["a", "7", "false"], ["b", "none"]),
    ],
)
def test_numbers_and_booleans_of_a_column_are_read_as_text(value: Any, right: list[str], wrong: list[str]) -> None:
    for completions, score in ((right, 1.0), (wrong, 0.0)):
        assert [exact_score(text, value) for text in completions] == [score] * len(completions)
        rows = [{"reference": value}] * len(completions)
        assert reference_f1([""] * len(completions), completions, rows) == [score] * len(completions)


def test_a_floats_own_spelling_is_still_exact() -> None:
    assert [exact_score("4.0", value) for value in (4.0, 4, "4")] == [1.0, 0.0, 0.0]


def test_a_final_answer_is_compared_with_a_number_of_any_type() -> None:
    assert [math_score("The answer is 4", value) for value in (4, 4.0, "4", 5, 4.5)] == [1, 1, 1, 0, 0]
    assert math_score("The answer is true.", True) == 1.0
    assert [math_score("The answer is 4", value) for value in ([5, "3 + 1 = #### 4"], [5, 3], [])] == [1, 0, 0]


@pytest.mark.parametrize("empty", [None, float("nan")])
def test_an_empty_cell_is_missing(empty: float | None) -> None:
    prompts = [PromptRow((1,), [{"role": "user", "content": "q"}], None, {"answer": v, "id": 0}) for v in (7, empty)]
    exact = section(kind="exact")
    assert [has_column(exact, row) for row in prompts] == [True, False]
    assert has_column(section(kind="length", max_tokens=3), prompts[1])
    with pytest.raises(UserError, match="'exact': a row has no value in the column 'answer', only in id\\. "):
        require_columns([exact], prompts)
    assert accepted_values(empty) == []


def test_f1_needs_its_column_before_the_first_round() -> None:
    f1 = section(kind="function", path="reference_f1")
    row = PromptRow((1,), [{"role": "user", "content": "q"}], "from the pair", {"prompt": "q"})
    require_columns([f1], [row])
    with pytest.raises(UserError, match="'reference_f1': a row has no value in the column 'reference'"):
        require_columns([f1], [PromptRow(row.ids, row.messages, None, row.row)])
    with pytest.raises(UserError, match="a row has no value in the column 'reference'"):
        reference_f1(["q"], ["a"], [{"reference": []}])


def test_verifiers_load_no_heavy_library() -> None:
    """The process of users' functions imports the verifiers to search for a pattern, and must start quickly."""
    code = "import sys, align.reward.verifiers; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("reference", "row", "expected"),
    [
        ("4", {"answer": "4"}, {"answer": "4", "reference": "4"}),
        ("4", {"reference": "four"}, {"reference": "four"}),
        (None, {"answer": "4"}, {"answer": "4"}),
    ],
)
def test_a_reference_under_another_name_is_added_to_the_columns(reference, row, expected) -> None:
    assert columns(PromptRow((1,), [], reference, row)) == expected
