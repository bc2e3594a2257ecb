"""The reward of bench_ppo.py: (even - odd) / all words of a completion, by the words' numbers; 0 without words.

It is around zero for an untrained model, so a critic that starts at zero does not favour the end of a sequence.
"""

from __future__ import annotations

from typing import Any


def surplus(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Scores of the completions, whose words are `w0`, `w1`, ...; the stop token is not a word."""
    return [_surplus(completion.split()) for completion in completions]


def _surplus(words: list[str]) -> float:
    return sum(1 - 2 * (int(word[1:]) % 2) for word in words) / max(1, len(words))
