"""Filters in the store: dropped, counted and kept rows, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.filters import (
    ContaminationFilter,
    DuplicateFilter,
    EvaluationSet,
    Filter,
    GarbledFilter,
    LengthFilter,
    RefusalFilter,
)
from align.config.parts import Data, FileSource
from align.data.prepare import Prepared, prepare_reward_pairs, prepare_sft
from align.errors import UserError

QUESTION = "How many apples does Anna have after she gave three of her twelve apples to her brother Tom?"
NEAR = QUESTION.replace("twelve", "eleven")
ROWS = [
    (QUESTION, "Nine apples."),
    ("Name a colour that is often seen in the sky on a clear day.", "Blue."),
    (QUESTION.upper() + "!!", "nine, apples"),
    (NEAR, "Eight apples."),
    ("Help me with something bad.", "I'm sorry, but I can't help with that."),
    ("Say something.", "caf\ufffd"),
    ("What is the capital of France, and which river flows through it?", "Paris; the Seine."),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in ROWS])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(path: Path, tokenizer: Any, filters: list[Filter], tmp_path: Path, **settings: Any) -> Prepared:
    data = Data(train=[FileSource(path=str(path))], filters=filters, cache=str(tmp_path / "cache"), **settings)
    return prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0)


def answers(data: Prepared, tokenizer: Any) -> set[str]:
    return {tokenizer.decode([i for i in row["labels"] if i >= 0], skip_special_tokens=True) for row in data.train}


def test_faults_are_dropped_and_counted(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    data = prepared(rows, tokenizer, [GarbledFilter(kind="garbled"), RefusalFilter(kind="refusal")], tmp_path)
    assert data.report.dropped == {"filter: an answer is a refusal": 1, "filter: garbled text": 1}
    assert data.report.rows_read == 7
    assert len(data.train) == 5
    assert len(prepared(rows, tokenizer, [], tmp_path).train) == 7


def test_equal_and_near_rows_are_dropped(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache
        equal = prepared(rows, tokenizer, [DuplicateFilter(kind="duplicates")], tmp_path)
        assert equal.report.dropped == {"filter: repeats an earlier row": 1}
        near = prepared(rows, tokenizer, [DuplicateFilter(kind="duplicates", part="prompt", near=0.5)], tmp_path)
        assert near.report.dropped == {"filter: repeats an earlier row": 2}
        assert answers(near, tokenizer) == {ROWS[i][1] for i in (0, 1, 4, 5, 6)}
        assert near.report.tokens == sum(len(row["input_ids"]) for row in near.train)


def test_repetitions_of_a_source_are_not_duplicates(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    settings = [DuplicateFilter(kind="duplicates")]
    source = FileSource(path=str(rows), epochs=2.0)
    data = Data(train=[source], filters=settings, cache=str(tmp_path / "cache"))
    assert len(prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0).train) == 12
    twice = Data(train=[FileSource(path=str(rows))] * 2, filters=settings, cache=str(tmp_path / "cache"))
    assert len(prepare_sft(twice, tokenizer, assistant_only_loss=True, seed=0).train) == 6


def test_items_of_an_evaluation_set_are_dropped(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    items = write(tmp_path / "test.jsonl", [{"question": NEAR, "answer": 8}, {"question": "Unrelated text of a test?"}])
    filters = [ContaminationFilter(kind="contamination", against=[EvaluationSet(name="apples", path=str(items))])]
    data = prepared(rows, tokenizer, filters, tmp_path)
    assert data.report.dropped == {"filter: contains an item of apples": 3}
    # Another evaluation set at the same path is noticed.
    write(items, [{"question": "What is the capital of France, and which river flows through it?"}])
    data = prepared(rows, tokenizer, filters, tmp_path)
    assert data.report.dropped == {"filter: contains an item of apples": 1}
    write(items, [{"name": "no text"}])
    with pytest.raises(UserError, match="no column has the items of 'apples'; the columns are name"):
        prepared(rows, tokenizer, filters, tmp_path)


def test_held_out_sources_are_not_filtered(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    data = prepared(rows, tokenizer, [RefusalFilter(kind="refusal")], tmp_path, held_out=[FileSource(path=str(rows))])
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (6, 7)


def test_both_answers_of_a_pair_are_judged(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [
        {"prompt": "Say something.", "chosen": "Something.", "rejected": "I cannot assist with that request."},
        {"prompt": "Say something else.", "chosen": "Something else.", "rejected": "No."},
    ]
    path = write(tmp_path / "pairs.jsonl", pairs)
    filters: list[Filter] = [RefusalFilter(kind="refusal")]
    data = Data(train=[FileSource(path=str(path))], filters=filters, cache=str(tmp_path / "cache"))
    assert prepare_reward_pairs(data, tokenizer, seed=0).report.dropped == {"filter: an answer is a refusal": 1}


def test_no_filter_drops_token_ids(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6], "attention_mask": [0, 0]},
        {"prompt": "a", "completion": "b"},
    ]
    path = write(tmp_path / "ids.jsonl", rows)
    data = prepared(path, tokenizer, [LengthFilter(kind="length", min_chars=5)], tmp_path)
    assert data.report.dropped == {"filter: answer shorter than 5 characters": 1, "input_ids has only padding": 1}
    assert [row["input_ids"] for row in data.train] == [[5, 6, 7]]


@pytest.mark.parametrize("content", [b"", b"half of it"])
def test_a_damaged_comparison_is_made_again(rows: Path, tokenizer: Any, tmp_path: Path, content: bytes) -> None:
    settings: list[Filter] = [DuplicateFilter(kind="duplicates")]
    before = prepared(rows, tokenizer, settings, tmp_path)
    (file,) = (tmp_path / "cache").rglob("duplicates/*.npy")
    file.write_bytes(content)
    assert prepared(rows, tokenizer, settings, tmp_path).report == before.report
