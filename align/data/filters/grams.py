"""Word n-grams as 64-bit hashes, for comparing texts.

Units are words in lower case, and single characters of scripts that are written without spaces. Punctuation and white
space separate units. Texts with more than half of their units in such characters are compared by n-grams of six
units, other texts by n-grams of three.

The hashes are equal in every process and on every machine.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import regex

Hashes: TypeAlias = npt.NDArray[np.uint64]

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_UNIT = regex.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
_COMPARED = regex.compile(rf"{_UNIT.pattern}|(?!`)\p{{S}}|[-*/%](?=\s?\d)")
"""A unit, a symbol, or an operator before a digit: `2 + 2` is not `2 * 2`, and `a < b` is not `a > b`."""
_IS_UNSPACED = regex.compile(_UNSPACED)
WORDS, CHARACTERS = 3, 6
"""Units of an n-gram of words and of one of characters."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def units(text: str) -> list[str]:
    """Words and single characters of a text, normalised by NFKC and case folding."""
    return _found(_UNIT, text)


def _found(pattern: regex.Pattern[str], text: str) -> list[str]:
    found: list[str] = pattern.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def gram_size(text_units: list[str]) -> int:
    """Units per n-gram for a text with these units."""
    unspaced = sum(len(unit) == 1 and _IS_UNSPACED.match(unit) is not None for unit in text_units)
    return CHARACTERS if 2 * unspaced > len(text_units) else WORDS


def gram_hashes(text_units: list[str], size: int) -> Hashes:
    """Sorted hashes [G] of the distinct n-grams of `size` units; empty if there are fewer units."""
    return np.unique(ordered_hashes(text_units, size))


def ordered_hashes(text_units: list[str], size: int) -> Hashes:
    """Hashes [U - size + 1] of the n-grams of `size` units, in order."""
    ids = np.fromiter((_unit_hash(unit) for unit in text_units), np.uint64, len(text_units))
    count = len(ids) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(size):  # uint64 arithmetic wraps around
        mixed = _scrambled((mixed ^ ids[offset : offset + count]) * _FACTOR)
    return mixed


def _scrambled(values: Hashes) -> Hashes:
    """A bijection that spreads every input bit over the output (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1 << 17)
def _unit_hash(unit: str) -> int:
    data = unit.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) | zlib.adler32(data) << 32


def text_grams(text: str) -> Hashes:
    """Sorted hashes [G] of the distinct n-grams of a text."""
    found = units(text)
    return gram_hashes(found, gram_size(found))


def with_label(hashes: Sequence[int] | Hashes, label: int) -> Hashes:
    """Sorted hashes [G] of the n-grams of a row with this label; rows with different labels share none."""
    return np.sort(_scrambled(np.asarray(hashes, np.uint64) ^ np.uint64(label + 1)))


def text_hash(text: str) -> int:
    """64-bit hash of the units, symbols and operators of a text; 0 for a text without any."""
    found = _found(_COMPARED, text)
    return int(ordered_hashes(found, len(found))[0]) if found else 0
