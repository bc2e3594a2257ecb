"""Figures in the documentation are those of the results that lie beside the benchmarks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


def test_the_tables_are_what_the_results_say(tables) -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    assert tables["fill"](page) == page, "run `python benchmarks/tables.py`"
    assert page.count("<!-- table ") == len(tables["RENDER"])


def test_a_figure_that_was_typed_by_hand_is_noticed(tables) -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    first = page.index("<!-- table ")
    changed = page[:first] + page[first:].replace("1", "2", 1)
    assert tables["fill"](changed) == page != changed
