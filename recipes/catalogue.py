"""Purpose, cost and expected results of each shipped recipe: catalogue.json, beside the recipes.

`align recipes` prints it, and the table of recipes/README.md is made from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).resolve().parent / "catalogue.json"


@dataclass(frozen=True)
class Expected:
    """A metric of the report, as mean over held-out rows, by model.

    values: {model: the value with the digits that are certain}.
    """

    metric: str
    values: dict[str, str]

    def text(self) -> str:
        return f"{self.metric} {', '.join(f'{value} ({model})' for model, value in self.values.items())}"


@dataclass(frozen=True)
class ShippedRecipe:
    """One entry of the catalogue.

    shows: purpose of the recipe.
    needs: requirements beside align; None if there are none.
    minutes: measured time on two CPU cores; None if it was not measured.
    memory_gib: measured peak memory of the process in GiB; None if it was not measured.
    expected: measured results with the recipe's seed.
    estimate: command that estimates the cost of a recipe for a cluster.
    page, page_has: documentation page about it, and its content.
    """

    name: str
    shows: str
    needs: str | None
    minutes: float | None = None
    memory_gib: float | None = None
    expected: tuple[Expected, ...] = field(default=())
    estimate: str | None = None
    page: str | None = None
    page_has: str = "an explanation"

    @staticmethod
    def of(name: str, values: dict[str, Any]) -> ShippedRecipe:
        expected = tuple(Expected(**entry) for entry in values.get("expected", ()))
        return ShippedRecipe(name, **{**values, "expected": expected})


def read_catalogue() -> list[ShippedRecipe]:
    """The shipped recipes, small ones first."""
    entries = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return [ShippedRecipe.of(name, values) for name, values in entries.items()]
