"""A reward function. align calls it in a separate process with all completions of an iteration."""

from __future__ import annotations


def vowels(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """Share of vowels among each completion's characters, between 0 and 1."""
    return [sum(character in "aeiou" for character in text) / max(1, len(text)) for text in completions]
