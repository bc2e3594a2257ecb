"""The documentation: its figures are those in benchmarks/results, and the targets of its links exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from align.config import load_recipe
from align.config.families import TABLE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


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
    complete = dict.fromkeys(tables["FAMILY_COLUMNS"], 1e-6) | {"replay": None, "plan": 0.0123, "commit": "a" * 40}
    (row,) = [line for line in tables["families"]({"families": {"x": complete}}).splitlines() if "`x`" in line]
    assert row.count("| 1.0e-06 |") + row.count("| no experts |") > 3
    assert "| 1.2% |" in row
    del complete["sharded"]
    with pytest.raises(AssertionError, match=r"x: no result for \['sharded'\]"):
        tables["families"]({"families": {"x": complete}})


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize(
    ("page", "words"), [("README.md", "[{} families](docs/families.md)"), ("CHANGELOG.md", "* {} families of")]
)
def test_the_number_of_adopted_families_is_theirs(page: str, words: str) -> None:
    assert words.format(len(TABLE)) in (ROOT / page).read_text(encoding="utf-8")


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](gone.md) [d](https://example.org)", encoding="utf-8")
    assert broken_links(page) == ["page.md#two", "gone.md"]


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
