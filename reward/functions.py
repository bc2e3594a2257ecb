"""Reward functions: the built-in ones, which run in this process, and the lookup of a user's function by its path."""

from __future__ import annotations

from collections.abc import Callable

from align.config.paths import local_path
from align.errors import UserError
from align.reward.text import Row, accepted_values, spellings, token_f1

RewardFunction = Callable[[list[str], list[str], list[Row]], list[float]]
"""f(prompts, completions, rows) -> one score per completion."""

REFERENCE = "reference"
"""Column with a reference answer to the prompt."""


def reference_f1(prompts: list[str], completions: list[str], rows: list[Row]) -> list[float]:
    """Word F1 of each completion with its row's `reference`; the largest if the column has several texts."""
    references = [[spellings(value)[0] for value in accepted_values(row.get(REFERENCE))] for row in rows]
    if not all(references):
        raise UserError(
            "reward function 'reference_f1': a row has no value in the column 'reference'. Add the column, or use "
            "another reward."
        )
    pairs = zip(completions, references, strict=True)
    return [max(token_f1(completion, text) for text in texts) for completion, texts in pairs]


BUILT_IN: dict[str, RewardFunction] = {"reference_f1": reference_f1}


def find_reward_function(path: str) -> tuple[str, str]:
    """(file, function) of a user's reward, or ("", name) of a built-in. Imports nothing."""
    if path in BUILT_IN:
        return "", path
    file, colon, name = path.rpartition(":")
    if not colon or not local_path(file).is_file():
        known = ", ".join(BUILT_IN)
        raise UserError(
            f"reward function '{path}': it does not name a function in an existing file. Set `path` to "
            f"file.py:function, or to one of: {known}."
        )
    return str(local_path(file)), name
