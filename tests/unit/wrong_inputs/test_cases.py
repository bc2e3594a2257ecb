"""Bad input gets one clear sentence, exit status 2 and no traceback, and leaves nothing half-written.

Each case gives one wrong input. `python docs/make_errors.py` writes the sentences to docs/errors.md.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from .cases import ALL
from .here import Here

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def maker() -> dict:
    return runpy.run_path(str(DOCS / "make_errors.py"))


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "errors.md").read_text(encoding="utf-8")


def test_the_page_lists_exactly_the_cases(maker: dict, page: str) -> None:
    sentences = maker["read"](page)
    assert list(sentences) == list(ALL), "run `python docs/make_errors.py --only`"
    assert maker["render"](sentences) == page, "run `python docs/make_errors.py --only`"


def test_a_sentence_changed_by_hand_is_noticed(maker: dict, page: str) -> None:
    changed = page.replace("did you mean 'batch_size'?", "did you mean 'batch'?", 1)
    assert maker["read"](changed)["unknown-key"] != maker["read"](page)["unknown-key"]


def test_both_sides_of_a_merge_conflict_are_read(maker: dict, page: str) -> None:
    row = next(line for line in page.splitlines() if "`unknown-key`" in line)
    other = row.replace("unknown key", "no such key")
    conflict = page.replace(row, f"<<<<<<< ours\n{row}\n=======\n{other}\n>>>>>>> theirs")
    sentences = maker["read"](conflict)
    assert sentences.pop("unknown-key") is None  # None: the case must be run again
    assert sentences == {name: said for name, said in maker["read"](page).items() if name != "unknown-key"}


@pytest.mark.parametrize("name", ALL)
def test_one_sentence(name: str, here: Here, maker: dict, page: str) -> None:
    said = ALL[name].sentence(here)
    assert maker["read"](page)[name] == said, f"run `python docs/make_errors.py --only {name}`"
    assert len(said.replace("…", "")) > 30, "too much of the sentence varies"
    assert_nothing_half_written(here.folder)


def assert_nothing_half_written(folder: Path) -> None:
    assert [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".old"))] == []
    assert list(folder.rglob("*.partial-*")) == []
    models = folder.glob("run/*/model")
    written = {path.parent for path in models if not any(file.is_symlink() for file in path.iterdir())}
    assert written <= {path.parent for path in folder.glob("run/*/manifest.json")}
