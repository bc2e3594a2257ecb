"""What a completion is scored by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.config.parts import Part


class ModelReward(Part):
    """The score of a reward model."""

    kind: Literal["model"]
    """Selects a reward model."""
    init_from: str
    """A reward_model stage of this recipe or a checkpoint folder."""
    weight: float = 1.0
    """Factor on this score in the sum of all rewards."""


class FunctionReward(Part):
    """A Python function `f(prompts, completions, rows) -> list of float`."""

    kind: Literal["function"]
    """Selects a Python function."""
    path: str
    """`file.py:function`, or the name of a built-in function of `align.reward`."""
    weight: float = 1.0
    """Factor on this score in the sum of all rewards."""


Reward = Annotated[ModelReward | FunctionReward, Field(discriminator="kind")]
