"""Long-context tests."""

from __future__ import annotations

from typing import Any

from align.config.long_context import LongContext
from align.eval.long_context.generate import samples

from .here import Here, wrong


def generate(here: Here, text: str, name: str = "mine.txt", **settings: Any) -> None:
    """Generate the samples of a haystack, with one token per character."""
    here.write(name, text)
    section = {"haystacks": {"en": str(here.folder / name)}, "lengths": [2048]} | settings
    list(samples(LongContext.model_validate(section), len))


@wrong("haystack-missing", "A haystack that does not exist")
def _(here: Here) -> None:
    generate(here, "", haystacks={"en": str(here.folder / "missing.txt")})


@wrong("haystack-empty", "A haystack without text")
def _(here: Here) -> None:
    generate(here, " \n")


@wrong("haystack-short", "A haystack that is shorter than the prompt")
def _(here: Here) -> None:
    generate(here, "Too few words.")


@wrong("haystack-rows", "A JSONL haystack without the column `text`")
def _(here: Here) -> None:
    generate(here, '{"txt": "a"}\n', "mine.jsonl")


@wrong("haystack-encoding", "A haystack that is not UTF-8")
def _(here: Here) -> None:
    (here.folder / "mine.txt").write_bytes(b"caf\xe9")
    list(samples(LongContext(haystacks={"en": str(here.folder / "mine.txt")}), len))


@wrong("long-context-length", "A length that is too short for a task")
def _(here: Here) -> None:
    generate(here, "", tasks=["common_words"], lengths=[512])
