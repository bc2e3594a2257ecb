"""Counts of sentences and of words in capitals, by rules: no model and no download."""

from __future__ import annotations

import re

_END = re.compile(r"""(?:[.!?]+|\.\s\.\s\.)["'”’)\]}*_]*(?=\s)|[。！？]+["'”’」』）)]*""")
_SHORT = frozenset(
    """mr mrs ms dr prof rev gen col sgt capt lt cmdr sen rep gov hon st mt jr sr vs etc fig al ca cf no vol inc ltd co
    corp jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat dept univ approx e.g i.e a.m
    p.m""".split()  # noqa: SIM905
)
"""Abbreviations after which a point does not end a sentence, unless a word follows that usually begins one."""
_STARTERS = frozenset(
    """a after also although an and as at because both but by during each even finally first for from he her here his
    how however i if in it its many most my next no not now of on once one our she since so some that the their then
    there these they this those though to today we what when where which while who why with yes you
    your""".split()  # noqa: SIM905
)
_OPENING = "\"'“‘([*_"
_SUFFIX = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b", re.IGNORECASE)
_WORD = re.compile(r"""[^\s,;:@#$%&?!"()\[\]{}<>“”‘’`]+""")


def count_sentences(text: str) -> int:
    """Number of sentences; a rest without a closing mark counts as one. Line breaks do not end a sentence.

    A mark ends a sentence if white space follows. After a usual abbreviation or an initial, a point does so only before
    a word that usually begins a sentence; three points do so only before a capital.
    """
    text = text.strip()
    count, start = 0, 0
    for end in _END.finditer(text):
        if _ends(text, end):
            count, start = count + 1, end.end()
    return count + bool(text[start:].strip())


def _ends(text: str, end: re.Match[str]) -> bool:
    if not end.group().startswith("."):
        return True
    following = text[end.end() :].split(maxsplit=1)
    word = following[0].lstrip(_OPENING) if following else ""
    if end.group().startswith(("..", ". .")):
        return not word[:1].islower()
    line = text[: end.start()].rpartition("\n")[2].split()
    last = line[-1].lower() if line else ""
    if last not in _SHORT and not re.fullmatch(r"[a-z](?:\.[a-z])*", last):
        return True
    is_label = len(line) == 1 and len(last) == 1  # of a list: "A. Paris"
    return is_label or (word[:1].isupper() and re.split(r"[^\w.]", word.lower())[0] in _STARTERS)


def capital_words(text: str) -> int:
    """Number of words with capitals and without lower-case letters, divided as in the Penn Treebank: DON'T is two.

    Marks such as commas and brackets divide words; points, hyphens and other apostrophes do not.
    """
    return sum(word.isupper() for word in _WORD.findall(_SUFFIX.sub(r" \g<0>", text)))
