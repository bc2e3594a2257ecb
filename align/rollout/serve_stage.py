"""The stage of a recipe whose checkpoint and settings `align serve-rollout` serves. Imports nothing heavy."""

from __future__ import annotations

from align.config.recipe import Recipe
from align.errors import UserError


def serving_stage(recipe: Recipe, target: str, stage: str | None) -> str:
    """`stage`, or the first stage that generates and trains; raises `UserError` unless it generates completions.

    target: the recipe as given on the command line.
    """
    sampling = [name for name, part in recipe.stages.items() if part.generates_with is not None]
    if stage is None:
        stage = next((name for name in sampling if recipe.stages[name].trains), None)
    if stage is None or stage not in sampling:
        has = f"--stage with one of: {', '.join(sampling)}" if sampling else "a recipe that has one"
        raise UserError(f"{target}: --stage must name a stage that generates completions. Pass {has}.")
    return stage
