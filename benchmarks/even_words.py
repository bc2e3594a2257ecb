"""The reward of bench_ppo.py: (words with even numbers - words with odd numbers) / all words; 0 without words.

An untrained model scores about zero, the value that the critic predicts at first, so the first updates favour neither
short nor long sequences.
"""

from __future__ import annotations

from typing import Any


def surplus(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Scores of the completions, whose words are `w0`, `w1`, ...; the stop token is not a word."""
    return [_surplus(completion.split()) for completion in completions]


def _surplus(words: list[str]) -> float:
    return sum(1 - 2 * (int(word[1:]) % 2) for word in words) / max(1, len(words))
