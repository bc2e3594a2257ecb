"""Judge a row's texts by the filters of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from align.config.filters import (
    ContaminationFilter,
    DuplicateFilter,
    Filter,
    GarbledFilter,
    JsonFilter,
    KeywordFilter,
    LanguageFilter,
    LengthFilter,
    MarkdownFilter,
    PersonalFilter,
    RefusalFilter,
    RepetitionFilter,
    RowFilter,
    TruncatedFilter,
)
from align.data.filters import quality
from align.data.filters.contamination import ItemIndex
from align.data.filters.language import language_of, with_members
from align.data.filters.personal import personal_data
from align.data.filters.texts import Texts

Rule = Callable[[Texts], str | None]
"""Reason to drop a row with these texts, if any."""


class Judge:
    """The first reason among all filters but `duplicates`, in the order of the recipe.

    items: {name: texts} of the evaluation sets that `contamination` names. `too_short` counts those of each set that
    have too few words to be found.
    """

    def __init__(self, filters: Sequence[Filter], items: Mapping[str, Sequence[str]]):
        indices = {name: ItemIndex(texts) for name, texts in items.items()}
        self.too_short = {name: index.too_short for name, index in indices.items() if index.too_short}
        self._rules = [_rule(settings, indices) for settings in filters if not isinstance(settings, DuplicateFilter)]

    def __call__(self, texts: Texts) -> str | None:
        """The reason to drop a row with these texts, if any."""
        return next((reason for rule in self._rules if (reason := rule(texts)) is not None), None)


def _rule(settings: RowFilter, indices: Mapping[str, ItemIndex]) -> Rule:
    match settings:
        case LengthFilter():
            return lambda texts: _length(texts.part(settings.part), settings)
        case LanguageFilter():
            kept = with_members(settings.keep)
            return lambda texts: _language(texts.part(settings.part), kept)
        case RepetitionFilter():
            return _any_answer(
                lambda answer: quality.repeated_share(answer) > settings.max_share, "an answer repeats itself"
            )
        case GarbledFilter():
            return lambda texts: "garbled text" if quality.garbled(texts.part("all")) else None
        case TruncatedFilter():
            return _any_answer(quality.truncated, "an answer is truncated")
        case MarkdownFilter():
            return _any_answer(quality.broken_markdown, "broken Markdown in an answer")
        case JsonFilter():
            return _any_answer(quality.broken_json, "broken JSON in an answer")
        case RefusalFilter():
            return _any_answer(quality.refuses, "an answer is a refusal")
        case PersonalFilter():
            return lambda texts: _personal(texts.part(settings.part), settings)
        case KeywordFilter():
            patterns = [re.compile(pattern, re.IGNORECASE) for pattern in settings.patterns]
            return lambda texts: _keyword(texts.part(settings.part), patterns)
        case ContaminationFilter():
            against = {target.name: indices[target.name] for target in settings.against}
            return lambda texts: _contaminated(texts, against, settings.threshold)
        case _:
            assert_never(settings)


def _any_answer(fault: Callable[[str], bool], reason: str) -> Rule:
    return lambda texts: reason if any(map(fault, texts.answers)) else None


def _length(text: str, settings: LengthFilter) -> str | None:
    if len(text) < settings.min_chars:
        return f"{settings.part} shorter than {settings.min_chars} characters"
    if settings.max_chars is not None and len(text) > settings.max_chars:
        return f"{settings.part} longer than {settings.max_chars} characters"
    return None


def _language(text: str, kept: frozenset[str]) -> str | None:
    language = language_of(text)
    return None if language is None or language in kept else f"language {language}"


def _personal(text: str, settings: PersonalFilter) -> str | None:
    kind = personal_data(text, settings.find)
    return None if kind is None else f"personal data: {kind}"


def _keyword(text: str, patterns: Sequence[re.Pattern[str]]) -> str | None:
    found = next((pattern.pattern for pattern in patterns if pattern.search(text)), None)
    return None if found is None else f"keyword {found}"


def _contaminated(texts: Texts, indices: Mapping[str, ItemIndex], threshold: float) -> str | None:
    text = texts.part("all")
    found = next((name for name, index in indices.items() if index.best_match(text, threshold)), None)
    return None if found is None else f"contains an item of {found}"
