"""The command `recipes`."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from typing import TYPE_CHECKING

from align.cli.parser import add_json, examples
from align.cli.terminal import color

if TYPE_CHECKING:
    from align.recipes.catalogue import ShippedRecipe


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    recipes = commands.add_parser(
        "recipes",
        help="list the shipped recipes with their cost and expected results",
        description="List the shipped recipes with their purpose, requirements, measured time on two CPU cores, memory "
        "and expected results.",
        epilog=examples("align recipes", "align recipes --json"),
    )
    add_json(recipes)
    recipes.set_defaults(command=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from align.recipes.catalogue import read_catalogue

    found = read_catalogue()
    if options.json:
        print(json.dumps([asdict(recipe) for recipe in found], indent=2))
        return
    width = min(shutil.get_terminal_size().columns, 100)
    for recipe in found:
        print(color(recipe.name, 36))
        for name, text in _lines(recipe):
            print(textwrap.fill(text, width, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11))
    print("\n`align show NAME` prints a recipe, `align run NAME` runs it; `align init` writes one for your own data.")


def _lines(recipe: ShippedRecipe) -> list[tuple[str, str]]:
    lines = [("does", recipe.shows), ("needs", recipe.needs or "nothing")]
    if recipe.minutes is not None:
        memory = "" if recipe.memory_gib is None else f", {recipe.memory_gib:g} GiB of memory"
        lines.append(("costs", f"{recipe.minutes:g} minutes on two CPU cores{memory}"))
    else:
        lines.append(("costs", f"estimate it: {recipe.estimate}" if recipe.estimate else "not measured"))
    lines += [("expect" if n == 0 else "", entry.text()) for n, entry in enumerate(recipe.expected)]
    return lines + ([("see", f"{recipe.page} ({recipe.page_has})")] if recipe.page else [])
