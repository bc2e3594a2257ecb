"""A sample of `python -m tests.fuzz_data`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from align.errors import UserError
from tests import fuzz_data


def test_mutated_files_give_rows_or_one_sentence(tmp_path: Path) -> None:
    outcomes = {number: fuzz_data.run_case(number, tmp_path) for number in range(120)}
    assert {case: said for case, (outcome, said) in outcomes.items() if outcome == "FAILED"} == {}
    counts = Counter(outcome for outcome, _ in outcomes.values())
    assert min(counts["rows"], counts["sentence"]) > 30  # the files are neither all intact nor all destroyed


def _no_sentence(row: object) -> None:
    raise UserError("wrong")


@pytest.mark.parametrize(
    ("convert", "said"),
    [
        (lambda row: 1 / 0, "ZeroDivisionError"),
        (lambda row: time.sleep(5), "more than 1 seconds"),
        (_no_sentence, "not a sentence with the file"),
    ],
)
def test_what_counts_as_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[[object], None], said: str
) -> None:
    monkeypatch.setattr(fuzz_data, "SECONDS", 1)
    monkeypatch.setattr(fuzz_data, "_convert", convert)
    outcome, detail = fuzz_data.run_case(1, tmp_path)
    assert outcome == "FAILED"
    assert said in detail
