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
    pages = [path.read_text(encoding="utf-8") for path in tables["PAGES"]]
    for page in pages:
        assert tables["fill"](page) == page, "run `python benchmarks/tables.py`"
    assert sum(page.count("<!-- table ") for page in pages) == len(tables["RENDER"])


def test_a_figure_that_was_typed_by_hand_is_noticed(tables) -> None:
    for path in tables["PAGES"]:
        page = path.read_text(encoding="utf-8")
        changed = page.replace("\n<!-- end -->", " 1.5 times faster\n<!-- end -->", 1)
        assert tables["fill"](changed) == page != changed
