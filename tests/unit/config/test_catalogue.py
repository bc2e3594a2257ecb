"""The catalogue of shipped recipes, `align recipes`, and the pages that repeat its figures."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

from align import cli
from align.recipes.catalogue import read_catalogue

ROOT = Path(__file__).parents[3]


def test_the_table_of_the_page_is_up_to_date() -> None:
    make_recipes = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))
    page = make_recipes["PAGE"].read_text(encoding="utf-8")
    assert make_recipes["fill"](page) == page, "run `python docs/make_recipes.py`"
    changed = page.replace("| 1.4 |", "| 9.9 |")
    assert changed != page
    assert make_recipes["fill"](changed) == page


def test_the_figures_of_the_quickstart_are_those_of_the_readme() -> None:
    """Its table rounds to two decimals where it has intervals."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (base|sft|dpo|ppo) \| (-?[\d.]+) \[.*?\| ([\d.]+) \[", readme, re.MULTILINE)
    scores, f1, _ = next(recipe for recipe in read_catalogue() if recipe.name == "quickstart").expected
    assert {name: score for name, score, _ in rows} == {name.lower(): value for name, value in scores.values.items()}
    assert {name: value for name, _, value in rows} == {name.lower(): value for name, value in f1.values.items()}


def test_every_recipe_is_listed_with_its_cost(capsys) -> None:
    cli.main(["recipes"])
    text = capsys.readouterr().out
    cli.main(["recipes", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert sorted(recipe["name"] for recipe in listed) == sorted(
        path.stem for path in (ROOT / "recipes").glob("*.yaml")
    )
    assert all(f"\n{recipe['name']}\n" in f"\n{text}" for recipe in listed)
    assert "1.4 minutes on two CPU cores, 1.3 GiB of memory" in text


def test_estimates_are_commands_and_pages_exist() -> None:
    for recipe in read_catalogue():
        if recipe.estimate:
            assert cli.parse(shlex.split(recipe.estimate)[1:]).recipe == recipe.name
        if recipe.page:
            assert (ROOT / recipe.page.partition("#")[0]).is_file()
