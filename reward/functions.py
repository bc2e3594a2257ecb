"""Reward functions: those of ours, which run in this process, and where users' own are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.reward.text import token_f1

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]
"""f(prompts, completions, rows) -> one score a completion; rows are the data's columns."""


def reference_f1(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Word F1 of each completion with its row's `reference`."""
    if any(not isinstance(row.get("reference"), str) for row in rows):
        raise UserError(
            "reward function 'reference_f1': a row has no text in the column `reference`; add the column, or use "
            "another reward."
        )
    return [token_f1(completion, row["reference"]) for completion, row in zip(completions, rows, strict=True)]


BUILT_IN: dict[str, RewardFunction] = {"reference_f1": reference_f1}


def find_reward_function(path: str) -> tuple[str, str]:
    """(file, function) of a user's reward, ("", name) of a built-in; nothing is imported yet."""
    if path in BUILT_IN:
        return "", path
    file, colon, name = path.rpartition(":")
    if not colon or not Path(file).is_file():
        known = ", ".join(BUILT_IN)
        raise UserError(
            f"reward function '{path}': write it as file.py:function with an existing file, or one of: {known}."
        )
    return file, name
