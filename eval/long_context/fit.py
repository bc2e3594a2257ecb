"""Prompts of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable

Count = Callable[[str], int]
"""Number of tokens of a prompt with this text, chat template and special tokens included."""
FILLED, LONGEST_FILLER = 8, 64
"""Tokens that are left to a filler, because counting a long prompt takes long, and the most that a filler has."""
TRIES = 24
"""Largest number of prompts that are counted to find the size."""


def fit(build: Callable[[int, str], str], count: Count, tokens: int, *, largest: int) -> tuple[str, int]:
    """(the longest prompt of at most `tokens` tokens, its tokens), which is exact unless no filler fits.

    build: f(size, filler) -> prompt; its tokens grow with the size. A filler of a few characters makes up for the last
    tokens. largest: largest size. Raises ValueError if size 0 is too long.
    """
    counted = {0: count(build(0, ""))}
    if counted[0] > tokens:
        raise ValueError(f"the prompt without any text has {counted[0]} tokens")
    low, high = 0, min(largest, 1 + (tokens - counted[0]) // 2)
    while (found := count(build(high, ""))) <= tokens and high < largest:
        low, counted[high] = high, found
        high = min(largest, 2 * high)
    counted[high] = found
    if found <= tokens:
        low = high
    for number in range(TRIES):
        if high - low <= 1 or tokens - counted[low] <= FILLED:
            break
        share = (tokens - FILLED / 2 - counted[low]) / (counted[high] - counted[low]) if number % 4 < 3 else 0.5
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        counted[guess] = count(build(guess, ""))
        low, high = (guess, high) if counted[guess] <= tokens else (low, guess)
    prompt, length = build(low, ""), counted[low]
    for filler in _fillers(tokens - length):
        if length == tokens:
            break
        longer = build(low, filler)
        found = count(longer)
        if length < found <= tokens:
            prompt, length = longer, found
    return prompt, length


def _fillers(gap: int) -> list[str]:
    """Texts of about `gap` tokens in tokenizers with many or few merges; none for a gap that is too large."""
    if gap > LONGEST_FILLER:
        return []
    exact = [" ." * gap, "." * gap, " ." * (gap // 2), " ." * (gap // 2) + "."]
    others = [" ." * (gap - less) + end for less in range(1, gap) for end in ("", ".", "\n", " a", " -")]
    return [text for text in [*exact, *others[:40]] if text]
