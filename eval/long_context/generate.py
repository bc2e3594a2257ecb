"""The samples of each task, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from align.config.long_context import WITH_DEPTH, Language, LongContext, LongTask
from align.errors import UserError
from align.eval.long_context.fit import LONGEST_FILLER, Count, fit
from align.eval.long_context.texts import codes, haystack, keys, made_up

NEAR = 60
"""Words among which the end of a sentence is looked for, so that a needle does not divide a sentence."""
ENGLISH = ("variable_tracking", "common_words", "frequent_words")
WITHOUT_TEXT = ("common_words", "frequent_words")
COMMON, FREQUENT = 10, 3
"""Number of words asked for in `common_words` and `frequent_words`, as in RULER."""
FEWEST = 64
"""Smallest number of words in `frequent_words`: the three words are then more frequent than all others."""
Build = Callable[[int, str], str]
"""f(size of the text, filler) -> prompt."""


@dataclass(frozen=True)
class LongSample:
    """One test.

    id: distinguishes the samples of a grid.
    length: length of the cell in tokens; the prompt has `tokens` of them.
    depth: place of the needle in percent; None if it has none.
    prompt: text of the user's message.
    opening: beginning of the answer, for models without a chat template.
    expected: texts that the answer must contain.
    tokens: tokens of the prompt as counted: length - max_new_tokens unless no filler fits exactly.
    """

    id: str
    task: LongTask
    length: int
    depth: float | None
    language: Language
    prompt: str
    opening: str
    expected: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class _Test:
    """Request of a task: a prompt of any size, the beginning of the answer, and the expected texts."""

    build: Build
    opening: str
    expected: tuple[str, ...]
    largest: int


@dataclass(frozen=True)
class Spot:
    """One sample of the grid before it is generated. See `LongSample`."""

    task: LongTask
    language: Language
    length: int
    depth: float | None
    number: int

    @property
    def id(self) -> str:
        depth = [] if self.depth is None else [f"{self.depth:g}"]
        return "-".join(map(str, (self.task, self.language, self.length, *depth, self.number)))


def spots(settings: LongContext) -> list[Spot]:
    """All samples of the grid, in a fixed order."""
    found = []
    for task in settings.tasks:
        languages: list[Language] = ["en"] if task in ENGLISH else settings.languages
        depths: list[float | None] = [*settings.depths] if task in WITH_DEPTH else [None]
        found += [
            Spot(task, language, length, depth, number)
            for language in languages
            for length in settings.lengths
            for depth in depths
            for number in range(settings.samples)
        ]
    return found


class Generator:
    """Generates samples; a haystack is read once."""

    def __init__(self, settings: LongContext):
        self.settings = settings
        self._texts: dict[Language, list[str]] = {}

    def expected(self, spot: Spot) -> tuple[str, ...]:
        """Texts that the answer to a sample must contain; needs neither haystack nor tokenizer."""
        return _test(self.settings, spot, []).expected

    def opening(self, spot: Spot) -> str:
        """Beginning of the answer; see `LongSample`."""
        return _test(self.settings, spot, []).opening

    def sample(self, spot: Spot, count: Count) -> LongSample:
        """The sample. count: tokens of a request with this user message.

        Raises UserError if its length is too short for the task, or the haystack for the length.
        """
        settings, words = self.settings, list[str]()
        if spot.task not in WITHOUT_TEXT:
            if spot.language not in self._texts:
                self._texts[spot.language] = haystack(spot.language, settings)
            words = self._texts[spot.language]
            start = random.Random(f"{settings.seed} {spot.id} start").randrange(len(words))
            words = [*words[start:], *words[:start]]
        test, target = _test(settings, spot, words), spot.length - settings.max_new_tokens
        try:
            prompt, tokens = fit(test.build, count, target, largest=test.largest)
        except ValueError as error:
            raise UserError(
                f"long context '{spot.task}': length {spot.length} is too short ({error}, and max_new_tokens is "
                f"{settings.max_new_tokens}). Raise lengths, or lower max_new_tokens."
            ) from None
        if words and tokens < target - LONGEST_FILLER:
            raise UserError(
                f"long context '{spot.task}': the haystack for {spot.language} fills {tokens} tokens of length "
                f"{spot.length}. Set haystacks to a longer text, or lower lengths."
            )
        return LongSample(
            spot.id, spot.task, spot.length, spot.depth, spot.language, prompt, test.opening, test.expected, tokens
        )


def samples(settings: LongContext, count: Count) -> Iterator[LongSample]:
    """All samples of the grid, in a fixed order. See `Generator.sample`."""
    generator = Generator(settings)
    return (generator.sample(spot, count) for spot in spots(settings))


def _test(settings: LongContext, spot: Spot, words: Sequence[str]) -> _Test:
    draw = random.Random(f"{settings.seed} {spot.id}")
    match spot.task:
        case "variable_tracking":
            return _variables(draw, words, settings)
        case "common_words":
            return _common_words(draw, spot.length)
        case "frequent_words":
            return _frequent_words(draw, spot.length)
        case _:
            return _needles(draw, spot.task, spot.language, words, spot.depth, settings)


# --- needles ---------------------------------------------------------------------------------------------------

_NEEDLE = {"en": "Remember this note: the code of {key} is {value}.", "zh": "请记住这条信息：{key}的密码是{value}。"}
_INTRODUCTION = {
    "en": "Read the text below. Notes with codes are hidden in it, and there is a question at the end.",
    "zh": "请阅读下面的文章。文章中藏有带密码的信息，最后有一个问题。",
}
_QUESTION = {
    ("en", False): "What is the code of {keys} in the text above? Answer with the code only.",
    ("en", True): "What are all the codes of {keys} in the text above? Answer with the codes only.",
    ("zh", False): "上文中{keys}的密码是什么？只回答密码。",
    ("zh", True): "上文中{keys}的所有密码是什么？只回答密码。",
}
_OPENING = {
    ("en", False): "The code of {keys} is",
    ("en", True): "The codes of {keys} are",
    ("zh", False): "{keys}的密码是",
    ("zh", True): "{keys}的密码是",
}


def _needles(
    draw: random.Random,
    task: LongTask,
    language: Language,
    words: Sequence[str],
    depth: float | None,
    settings: LongContext,
) -> _Test:
    """One asked needle at `depth` and others at random places, or several asked ones at random places."""
    names = keys(draw, 1 if task in ("single", "multi_value") else settings.needles, language)
    values = codes(draw, settings.needles if task == "multi_value" else len(names))
    owners = names * len(values) if task == "multi_value" else names
    needles = [_NEEDLE[language].format(key=key, value=value) for key, value in zip(owners, values, strict=True)]
    places = [draw.random() if depth is None or i else depth / 100 for i in range(len(needles))]
    asked = names if task == "multi_query" else names[:1]
    expected = values if task in ("multi_query", "multi_value") else values[:1]
    shown = _list(asked, language)
    question = _QUESTION[language, len(expected) > 1].format(keys=shown)

    def build(size: int, filler: str) -> str:
        text = _hide(needles, places, words, size, filler, "" if language == "zh" else " ")
        return f"{_INTRODUCTION[language]}\n\n{text}\n\n{question}"

    opening = _OPENING[language, len(expected) > 1].format(keys=shown)
    return _Test(build, opening, tuple(expected), len(words))


def _hide(
    needles: Sequence[str], places: Sequence[float], words: Sequence[str], size: int, filler: str, space: str
) -> str:
    """The first `size` words, with each needle at its place, after a sentence if one ends near it."""
    order = sorted(range(len(needles)), key=lambda i: places[i])
    parts, done = [], 0
    for i in order:
        place = _after_sentence(words, round(places[i] * size), done, size)
        parts += ["".join(words[done:place]) + (filler if place == size else ""), needles[i]]
        filler = "" if place == size else filler
        done = place
    parts += ["".join(words[done:size]) + filler]
    return space.join(part.strip() for part in parts if part.strip())


def _after_sentence(words: Sequence[str], place: int, first: int, last: int) -> int:
    """The place after the nearest end of a sentence, or the place itself; not before `first` or after `last`."""
    if place in (0, last):
        return max(place, first)
    for distance in range(NEAR):
        for near in (place - distance, place + distance):
            if first <= near <= last and near > 0 and words[near - 1].endswith((".", "!", "?", "。", "！", "？")):
                return near
    return max(place, first)


def _list(items: Sequence[str], language: Language) -> str:
    if len(items) == 1:
        return items[0]
    return "、".join(items) if language == "zh" else f"{', '.join(items[:-1])} and {items[-1]}"


def _variables(draw: random.Random, words: Sequence[str], settings: LongContext) -> _Test:
    """Two chains of assignments in order, hidden in the text; the variables of one are asked for."""
    count = settings.hops + 1
    names = made_up(draw, 2 * count, upper=True)
    values = [str(number) for number in draw.sample(range(10_000, 100_000), 2)]
    needles, places = [], []
    for chain, value in zip((names[:count], names[count:]), values, strict=True):
        needles += [f"Variable {chain[0]} is {value}."]
        needles += [f"Variable {b} is equal to variable {a}." for a, b in pairwise(chain)]
        places += sorted(draw.random() for _ in chain)
    question = (
        f"Which variables have the value {values[0]} in the text above? Follow the assignments, and name all {count}."
    )

    def build(size: int, filler: str) -> str:
        text = _hide(needles, places, words, size, filler, " ")
        return f"Read the text below. Values of variables are hidden in it.\n\n{text}\n\n{question}"

    return _Test(build, f"The variables with the value {values[0]} are", tuple(names[:count]), len(words))


# --- lists of words --------------------------------------------------------------------------------------------


def _common_words(draw: random.Random, length: int) -> _Test:
    """A numbered list in which ten words are more common than the others: 30 times against 3, or 6 against 1 in prompts
    below 4,096 tokens."""
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    largest = length // 4
    words = made_up(draw, COMMON + largest)
    common, others = words[:COMMON], words[COMMON:]
    seed = draw.random()

    def build(size: int, filler: str) -> str:
        chosen = common * often + others[:size] * seldom
        random.Random(seed).shuffle(chosen)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(chosen, start=1))
        return (
            "Read this numbered list. Some of its words are more common than the others.\n\n"
            f"{listed}{filler}\n\n"
            f"Which {COMMON} words are the most common in the list above? Answer with the words only."
        )

    return _Test(build, f"The {COMMON} most common words are", tuple(common), largest)


def _frequent_words(draw: random.Random, length: int) -> _Test:
    """Words whose counts fall with the square of their rank. The most frequent one is noise, the next are asked for."""
    vocabulary = ["...", *made_up(draw, max(20, length // 50))]
    seed = draw.random()

    def build(size: int, filler: str) -> str:
        total = (size + FEWEST) * 6 / math.pi**2
        counts = [int(total / rank**2) for rank in range(1, len(vocabulary) + 1)]
        text = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        random.Random(seed).shuffle(text)
        return (
            f"Count the words of this coded text. Ignore the dots.\n\n{' '.join(text)}{filler}\n\n"
            f"Which {FREQUENT} words are the most frequent in the text above? Answer with the words only."
        )

    return _Test(
        build, f"The {FREQUENT} most frequent words are", tuple(vocabulary[1 : FREQUENT + 1]), largest=2 * length
    )
