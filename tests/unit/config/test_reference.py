"""docs/recipes.md describes every setting and is up to date."""

from __future__ import annotations

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from align.config.recipe import Recipe

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def reference() -> dict:
    return runpy.run_path(str(DOCS / "make_reference.py"))


def reachable(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Every class of a recipe's sections, found through the JSON schema and not through the page."""
    names = {*model.model_json_schema()["$defs"], model.__name__}
    found: set[type[BaseModel]] = set()
    waiting = [BaseModel]
    while waiting:
        waiting += (subclasses := waiting.pop().__subclasses__())
        found |= {c for c in subclasses if c.__module__.startswith("align.config") and c.__name__ in names}
    assert {c.__name__ for c in found} == names
    return found


def test_the_page_is_up_to_date(reference) -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert reference["page"]() == page, "run `python docs/make_reference.py`"


def test_every_class_has_a_section_and_every_setting_a_description(reference) -> None:
    classes = reachable(Recipe)
    assert len(classes) > 20
    assert classes <= set(reference["TITLES"])
    without = [
        f"{model.__name__}.{name}"
        for model in reference["TITLES"]
        for name, field in model.model_fields.items()
        if not (field.description or "").strip().endswith(".")
    ]
    assert without == []
    assert [model.__name__ for model in reference["TITLES"] if not inspect.getdoc(model)] == []


def test_every_setting_is_listed_once_in_its_section_or_its_base_class(reference) -> None:
    page = reference["page"]()
    sections = {block.partition("\n")[0]: block for block in page.replace("\n## ", "\n### ").split("\n### ")}
    for model in reachable(Recipe):
        titles = [reference["TITLES"][c] for c in model.__mro__ if c in reference["TITLES"]]
        for name in model.model_fields:
            rows = [row for title in titles for row in sections[title].splitlines() if row.startswith(f"| `{name}` ")]
            assert len(rows) == 1, (model, name)


def test_rows_have_type_default_and_range(reference) -> None:
    page = reference["page"]()
    for row in (
        "| `seed` | whole number | `0` | ≥ 0, < 4294967296 |",
        "| `betas` | list of 2: number | `[0.9, 0.95]` | ≥ 0, ≤ 1 |",
        "| `target` | number or null | `null` | > 0 |",
        "| `schedule` | `constant` or `linear` or `cosine` | `cosine` |  |",
        "| `train` | list: [Source](#every-source) | – | entries ≥ 1 |",
        "| `optimizer` | [Optimizer](#optimizer) | `{eps: 1e-5, schedule: constant, warmup_fraction: 0.0}` |  |",
    ):
        assert row in page


def test_links_point_to_headings(reference) -> None:
    page = reference["page"]()
    headings = {line.lstrip("# ") for line in page.splitlines() if line.startswith("##")}
    # GitHub's rule for the anchor of a heading.
    addresses = {"".join(c for c in h.lower() if c.isalnum() or c in " -").replace(" ", "-") for h in headings}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert len(links) > 10
    assert links <= addresses


def test_the_page_is_made_without_torch() -> None:
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(DOCS / "make_reference.py")], check=True)
