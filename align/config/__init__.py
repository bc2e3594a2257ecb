"""Recipes: what a run does, validated before anything heavy is imported."""

from align.config.load import load_recipe, resolve_recipe_path
from align.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "resolve_recipe_path"]
