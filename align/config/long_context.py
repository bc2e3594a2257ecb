"""Long-context tests: which tasks, at which lengths, depths and languages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.evaluation import TASK_NAME
from align.config.section import Positive, Section

LongTask = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"
]
Language = Literal["en", "zh"]
Percent = Annotated[float, Field(ge=0, le=100)]
WITH_DEPTH = ("single", "multi_key")
"""Tasks whose needle has a depth. Those of the others are spread over the whole text."""


class LongContext(Section):
    """A grid of tests of exact length."""

    kind: Literal["long_context"] = "long_context"
    """Tells a file with this grid from other tasks."""
    name: Annotated[str, Field(pattern=TASK_NAME)] = "long_context"
    """Name in results and report."""

    tasks: list[LongTask] = Field(default=["single"], min_length=1)
    """single: find the value of one key. multi_key: with other keys beside it. multi_value: all values of one key.
    multi_query: the values of several keys. variable_tracking: all variables with one value, through assignments.
    common_words: the most common words of a list. frequent_words: the most frequent words of a coded text."""
    lengths: list[Annotated[int, Field(ge=256)]] = Field(default=[1024, 4096], min_length=1)
    """Lengths in tokens: the prompt, chat template included, and the answer."""
    depths: list[Percent] = Field(default=[0, 25, 50, 75, 100], min_length=1)
    """Places of the needle in percent of the text, for `single` and `multi_key`."""
    languages: list[Language] = Field(default=["en"], min_length=1)
    """Languages of the needle and the question. The last three tasks are in English."""
    haystacks: dict[Language, str] = Field(default_factory=dict)
    """Text file, or JSONL file with a column `text`, in each language. Default for en: Python's documentation."""
    samples: Positive = 10
    """Samples per length, depth and language."""
    needles: Annotated[int, Field(ge=2, le=32)] = 4
    """Keys of `multi_key` and `multi_query`, and values of `multi_value`."""
    hops: Annotated[int, Field(ge=1, le=16)] = 4
    """Assignments of `variable_tracking` after the first."""
    max_new_tokens: Positive = 128
    """Maximum tokens of an answer. They are part of the length."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of keys, values and the places of the text."""

    @model_validator(mode="after")
    def _possible(self) -> LongContext:
        if self.max_new_tokens >= min(self.lengths):
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no tokens for a prompt of length {min(self.lengths)}; "
                "lower max_new_tokens, or raise lengths"
            )
        if "zh" in self.languages and "zh" not in self.haystacks:
            raise ValueError("languages has zh, but haystacks has no text for it; add `haystacks: {zh: FILE}`")
        return self
