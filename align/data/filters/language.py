"""Identify the language of a text with py3langid, a naive Bayes classifier of byte n-grams for 139 languages."""

from __future__ import annotations

from collections.abc import Collection

from align.errors import UserError

LETTERS = 20
"""Fewest letters of a text whose language is identified."""
_EXCERPT = 2000
"""Characters that are read: identification takes time proportional to the length."""
_MEMBERS = {"zh": ("wuu", "yue")}
"""Languages that count as another one, because py3langid takes short texts of it for them."""


def language_of(text: str) -> str | None:
    """ISO 639 code of the most probable language; None for a text of fewer than `LETTERS` letters."""
    import py3langid  # loads a model of 5 MB on first use

    excerpt = text[:_EXCERPT]
    if sum(map(str.isalpha, excerpt)) < LETTERS:
        return None
    return str(py3langid.classify(excerpt)[0])


def with_members(languages: Collection[str]) -> frozenset[str]:
    """The languages and those that count as one of them. Raises `UserError` for a code that py3langid lacks."""
    import py3langid

    known = {label for label, _ in py3langid.rank("")}
    if unknown := sorted(set(languages) - known):
        raise UserError(
            f"keep: py3langid does not identify the language '{unknown[0]}'. Use ISO 639 codes: en, zh, de."
        )
    return frozenset(languages).union(*(_MEMBERS.get(language, ()) for language in languages))
