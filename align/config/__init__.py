"""Recipes: the settings of a run, validated before torch or transformers are imported.

The names are imported on their first use: the classes of a recipe take 0.3 s to build, which `align --help` does not
need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config.load import load_recipe, resolve_recipe_path
    from align.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "resolve_recipe_path"]
_HOMES = {
    "Recipe": "align.config.recipe",
    "load_recipe": "align.config.load",
    "resolve_recipe_path": "align.config.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
