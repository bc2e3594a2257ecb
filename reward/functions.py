"""Reward functions: a few of ours, and users' own from a file."""

from __future__ import annotations

import importlib.util
import math
import traceback
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


def load_reward_function(path: str) -> RewardFunction:
    """A built-in by its name, or `file.py:function`."""
    if path in BUILT_IN:
        return BUILT_IN[path]
    file, name = find_reward_function(path)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file; name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: importing it raised {_described(error)}; mend the file.") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{file}: it defines no function '{name}'; write `def {name}(prompts, completions, rows)`.")
    return getattr(module, name)


def _described(error: Exception) -> str:
    """The error with the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name} line {frame.lineno})"


def call_reward_function(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    rows: list[dict[str, Any]],
) -> list[float]:
    """The function's scores, checked: as many as completions, all finite numbers."""
    try:
        returned = function(prompts, completions, rows)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward function '{name}' raised {_described(error)}; mend the function.") from error
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError):
        raise UserError(
            f"reward function '{name}' must return a list of numbers, one for each completion, but returned "
            f"{repr(returned)[:60]}."
        ) from None
    if len(scores) != len(completions):
        raise UserError(
            f"reward function '{name}' returned {len(scores)} scores for {len(completions)} completions; return one "
            "for each."
        )
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"reward function '{name}' returned {score} for completion {row} ({completions[row][:60]!r}); return "
                "finite numbers."
            )
    return scores
