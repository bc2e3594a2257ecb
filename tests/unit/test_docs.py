"""The documentation: its figures are those in benchmarks/results."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.config import load_recipe
from align.config.families import TABLE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> Iterator[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


def test_tables_are_up_to_date(tables) -> None:
    pages = [path.read_text(encoding="utf-8") for path in tables["PAGES"]]
    for page in pages:
        assert tables["fill"](page) == page, "run `python benchmarks/tables.py`"
    assert sum(page.count("<!-- table ") for page in pages) == len(tables["RENDER"])


def test_a_figure_changed_by_hand_is_noticed(tables) -> None:
    for path in tables["PAGES"]:
        page = path.read_text(encoding="utf-8")
        changed = page.replace("\n<!-- end -->", " 1.5 times faster\n<!-- end -->", 1)
        assert tables["fill"](changed) == page != changed


def test_a_family_without_a_number_is_an_error(tables) -> None:
    families = tables["model_tables"]
    complete = dict.fromkeys(families.FAMILY_COLUMNS, 1e-6) | {"replay": None, "plan": 0.0123, "commit": "a" * 40}
    (row,) = [line for line in families.families({"families": {"x": complete}}).splitlines() if "`x`" in line]
    assert row.count("| 1.0e-06 |") + row.count("| no experts |") > 3
    assert "| 1.2% |" in row
    del complete["sharded"]
    with pytest.raises(AssertionError, match=r"x: no result for \['sharded'\]"):
        families.families({"families": {"x": complete}})


@pytest.mark.parametrize(
    ("page", "words"), [("README.md", "[{} families](docs/families.md)"), ("CHANGELOG.md", "* {} families of")]
)
def test_the_number_of_adopted_families_is_theirs(page: str, words: str) -> None:
    assert words.format(len(TABLE)) in (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_recipes_lists_every_recipe() -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    listed = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_the_settings_of_published_methods_are_valid() -> None:
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    methods = re.findall(r"^\| .* \| `\{(.*)\}` \|$", page, re.MULTILINE)
    assert len(methods) > 5
    basis = "kind: ppo, prompts: [{path: rows.jsonl}], rewards: [{kind: length, max_tokens: 8}]"
    for settings in methods:
        stage = load_recipe("tiny", [f"stages.ppo={{{basis}, {settings}}}"]).stages["ppo"]
        assert stage != load_recipe("tiny", [f"stages.ppo={{{basis}}}"]).stages["ppo"]
