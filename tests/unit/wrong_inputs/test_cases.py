"""Bad input gets one clear sentence, exit status 2 and no traceback, and leaves nothing half-written.

The sentences stand in docs/errors.md, one row a case; `…` there is a part that varies. Each case is wrong in one way
and is named like its row, so that the page and the program cannot drift apart. The cases stand in the files beside
this one, one for each section of the page.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from align.errors import UserError

from .here import CASES, Here

NAMES = "recipes command_line data checkpoints templates run_folder rewards generation several"
for section in NAMES.split():  # in the page's order
    import_module(f"{__package__}.{section}")
PAGE = Path(__file__).parents[3] / "docs" / "errors.md"


def page_rows() -> dict[str, str]:
    """{case: sentence} of the tables in docs/errors.md."""
    rows: dict[str, str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 3 and cells[2].startswith("`"):
            name = cells[2].strip("`")
            assert name not in rows, f"{name} is there twice"
            rows[name] = cells[1].strip("`").strip()
    return rows


def test_the_page_lists_exactly_the_cases() -> None:
    assert list(page_rows()) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name: str, here: Here) -> None:
    sentence = page_rows()[name]
    parts = sentence.split("…")
    assert len("".join(parts)) > 30, "too little of the sentence is fixed"
    try:
        said = CASES[name](here)
    except UserError as error:
        said = str(error)
    assert re.fullmatch(".+".join(map(re.escape, parts)), said or ""), said
    assert_nothing_half_written(here.folder)


def assert_nothing_half_written(folder: Path) -> None:
    assert [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".old"))] == []
    assert list(folder.rglob("*.partial-*")) == []
    models = folder.glob("run/*/model")
    written = {path.parent for path in models if not any(file.is_symlink() for file in path.iterdir())}
    assert written <= {path.parent for path in folder.glob("run/*/manifest.json")}
