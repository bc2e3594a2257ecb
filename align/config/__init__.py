"""Recipes: the settings of a run, validated before torch or transformers are imported."""

from align.config.load import load_recipe, resolve_recipe_path
from align.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "resolve_recipe_path"]
