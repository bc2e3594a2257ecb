r"""Final answers that are equal by algebra, by math-verify: `\frac{1}{\sqrt 2}` and `\frac{\sqrt 2}{2}`.

Sympy may take minutes for a short text, so this runs in the process of users' functions, which has a time limit.
"""

from __future__ import annotations

import logging

from align.errors import missing_dependency
from align.reward.json_schema import INSTALL
from align.reward.math_answer import LONGEST, canonical, expected_answer, final_answer
from align.reward.text import Row, accepted_values


def require_math_verify() -> None:
    """Raise UserError if math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise missing_dependency("math-verify", "the comparison by algebra", INSTALL) from None


def same_expression(answer: str, expected: str) -> bool:
    """True if math-verify can read both answers and finds them equal."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the limits that are off here
    if max(len(answer), len(expected)) > LONGEST:
        return False
    # Without dollar signs a pair of numbers is not read as LaTeX. The process has a time limit of its own.
    gold, found = (parse(f"${canonical(text)}$", parsing_timeout=None) for text in (expected, answer))
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def symbolic_row(prompt: str, completion: str, row: Row) -> float:
    """Score with the signature of a reward function: 1.0 if the final answer equals an expected one by algebra."""
    answer, values = final_answer(completion, row["format"]), accepted_values(row["expected"])
    return float(answer is not None and any(same_expression(answer, expected_answer(str(v))) for v in values))
