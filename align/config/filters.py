"""Filters of training data: each drops rows for one named reason, which the data report counts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from align.config.section import Fraction, Location, Positive, Section

Part = Literal["prompt", "answer", "all"]
"""prompt: every turn that is not the assistant's. answer: every assistant turn, the text of a `text` row, or both
answers of a pair. all: the whole row."""

PersonalData = Literal["email", "phone", "credit_card", "iban", "us_ssn", "cn_resident_id", "ip_address"]
"""Kinds of personal data. Card, IBAN and resident identity numbers must have a valid checksum."""


class LengthFilter(Section):
    """Drop rows whose text is too short or too long, in characters. `data.max_length` limits the tokens."""

    kind: Literal["length"]
    """Selects the length in characters."""
    part: Part = "answer"
    """Text to measure: `prompt`, `answer` or `all`."""
    min_chars: Annotated[int, Field(ge=0)] = 0
    """Fewest characters."""
    max_chars: Positive | None = None
    """Most characters. Default: no limit."""

    @model_validator(mode="after")
    def _ordered(self) -> LengthFilter:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError("max_chars is below min_chars, so every row would be dropped; lower min_chars")
        return self


class LanguageFilter(Section):
    """Drop rows that are not in one of some languages, as identified by py3langid.

    Texts of fewer than 20 letters are kept, because their language cannot be identified.
    """

    kind: Literal["language"]
    """Selects the language."""
    keep: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] = Field(min_length=1)
    """ISO 639 codes of the languages to keep, for example `[en, zh]`. `zh` includes Cantonese and Wu."""
    part: Part = "all"
    """Text to identify: `prompt`, `answer` or `all`."""


class RepetitionFilter(Section):
    """Drop rows with an answer that repeats itself: a loop of words, a line or a paragraph."""

    kind: Literal["repetition"]
    """Selects repetition."""
    max_share: Fraction = 0.3
    """Largest allowed share of an answer's word 5-grams (of Chinese and Japanese characters: 10-grams) that occurred
    earlier in the same answer."""


class GarbledFilter(Section):
    """Drop rows with garbled text: replacement characters, control characters, or UTF-8 that was read as Latin-1."""

    kind: Literal["garbled"]
    """Selects garbled text."""


class TruncatedFilter(Section):
    """Drop rows with an answer that stops in the middle of a sentence.

    An answer of at least 200 characters counts as truncated if it has sentences, and ends with a letter, a digit or a
    comma outside code.
    """

    kind: Literal["truncated"]
    """Selects truncated answers."""


class MarkdownFilter(Section):
    """Drop rows with broken Markdown in an answer: an unclosed code fence, or a table with rows of unequal length."""

    kind: Literal["markdown"]
    """Selects broken Markdown."""


class JsonFilter(Section):
    """Drop rows with broken JSON in an answer: a `json` code block, or an answer in braces, that does not parse."""

    kind: Literal["json"]
    """Selects broken JSON."""


class RefusalFilter(Section):
    """Drop rows with an answer that begins with a refusal, in English or Chinese."""

    kind: Literal["refusal"]
    """Selects refusals."""


class PersonalFilter(Section):
    """Drop rows with personal data."""

    kind: Literal["personal"]
    """Selects personal data."""
    find: list[PersonalData] = Field(default=["email", "phone", "credit_card", "iban"], min_length=1)
    """Kinds of personal data to find."""
    part: Part = "all"
    """Text to search: `prompt`, `answer` or `all`."""


class KeywordFilter(Section):
    """Drop rows with text that matches one of some regular expressions, in any case."""

    kind: Literal["keywords"]
    """Selects regular expressions."""
    patterns: list[str] = Field(min_length=1)
    """Regular expressions in Python's syntax, for example `["as an? .* by OpenAI", "ChatGPT"]`."""
    part: Part = "answer"
    """Text to search: `prompt`, `answer` or `all`."""

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a valid regular expression ({error}); correct it") from None
        return patterns


class DuplicateFilter(Section):
    """Drop rows that repeat an earlier row of the stage's training data."""

    kind: Literal["duplicates"]
    """Selects duplicates."""
    part: Part = "all"
    """Text to compare: `prompt`, `answer` or `all`. Letter case, punctuation and spacing are ignored; symbols and the
    operators before a digit are not."""
    near: Annotated[float, Field(gt=0, le=1)] | None = None
    """Also drop near duplicates: rows that share at least this fraction of the longer row's word 3-grams (of Chinese
    and Japanese characters: 6-grams) with an earlier row. Default: only equal texts."""


class EvaluationSet(Section):
    """An evaluation set whose items must not be trained on."""

    name: str
    """Name in the data report, for example `gsm8k`."""
    path: Location
    """File or folder in any format of a `file` source."""
    column: str | None = None
    """Column with the text of an item. Default: the prompt of a row that has one, otherwise its column `question`,
    `problem`, `query`, `turns` or `text`."""


class ContaminationFilter(Section):
    """Drop training rows that contain an item of an evaluation set."""

    kind: Literal["contamination"]
    """Selects contamination."""
    against: list[EvaluationSet] = Field(min_length=1)
    """The evaluation sets."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of an item's word 3-grams (of Chinese and Japanese characters: 6-grams) that a training row must have to be
    dropped. Items of fewer than eight n-grams count only if the row has all of them. Items without an n-gram, of one
    or two words, are never found."""


RowFilter = (
    LengthFilter
    | LanguageFilter
    | RepetitionFilter
    | GarbledFilter
    | TruncatedFilter
    | MarkdownFilter
    | JsonFilter
    | RefusalFilter
    | PersonalFilter
    | KeywordFilter
    | ContaminationFilter
)
"""Filters that judge a row by itself."""

Filter = Annotated[RowFilter | DuplicateFilter, Field(discriminator="kind")]


def _compared_once(filters: list[Filter]) -> list[Filter]:
    if sum(isinstance(settings, DuplicateFilter) for settings in filters) > 1:
        raise ValueError("has two filters of the kind duplicates, but rows are compared once; remove one of them")
    return filters


def _judge_prompts(filters: list[Filter]) -> list[Filter]:
    for settings in filters:
        part = getattr(settings, "part", None if settings.kind in ("garbled", "contamination") else "answer")
        if part != "answer":
            continue
        advice = "set its part to prompt" if hasattr(settings, "part") else "remove it"
        raise ValueError(f"has the filter '{settings.kind}' of answers, but the rows are prompts; {advice}")
    return filters


Filters = Annotated[list[Filter], AfterValidator(_compared_once)]
PromptFilters = Annotated[Filters, AfterValidator(_judge_prompts)]
"""Filters of prompts, which have no answer to judge."""
