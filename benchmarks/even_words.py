"""The reward of bench_ppo.py: (even - odd) / all words of a completion, by their numbers; 0 where there is none.

Around zero for an untrained model, so that a critic that starts at zero does not make the end of a sequence look good.
"""

from __future__ import annotations

from typing import Any


def surplus(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Words are `w0`, `w1`, ...; the stop token is not among them."""
    return [_surplus(completion.split()) for completion in completions]


def _surplus(words: list[str]) -> float:
    return sum(1 - 2 * (int(word[1:]) % 2) for word in words) / max(1, len(words))
