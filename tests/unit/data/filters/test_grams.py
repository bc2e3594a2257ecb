"""N-grams, near duplicates and contamination against sets of strings."""

from __future__ import annotations

import random

import numpy as np
import pytest

from align.data.filters.contamination import ItemIndex
from align.data.filters.duplicates import equal_rows, near_duplicates
from align.data.filters.grams import CHARACTERS, WORDS, gram_hashes, gram_size, text_hash, units

VOCABULARY = [f"w{number}" for number in range(12)]


def documents(seed: int, count: int) -> list[list[str]]:
    """Word lists of 0 to 30 words; many share long runs."""
    rng = random.Random(seed)
    made: list[list[str]] = []
    for _ in range(count):
        if made and rng.random() < 0.6:
            words = [rng.choice(VOCABULARY) if rng.random() < 0.1 else word for word in rng.choice(made)]
        else:
            words = rng.choices(VOCABULARY, k=rng.randrange(31))
        made.append(words)
    return made


def gram_set(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


@pytest.mark.parametrize("near", [0.2, 0.5, 0.8, 1.0])
def test_near_duplicates_equal_a_comparison_of_all_pairs(near: float) -> None:
    found_any = 0
    for seed in range(8):
        rows = documents(seed, 60)
        sets, kept, expected = [gram_set(words) for words in rows], list[int](), list[int | None]()
        for row, grams in enumerate(sets):
            similar = [
                other
                for other in kept
                if grams and len(grams & sets[other]) >= near * max(len(grams), len(sets[other])) - 1e-9
            ]
            expected.append(similar[0] if similar else None)
            if not similar:
                kept.append(row)
        found = near_duplicates([gram_hashes(words, WORDS) for words in rows], near)
        assert found == expected
        found_any += sum(match is not None for match in found)
    assert found_any > 8


def test_the_contained_share_equals_sets() -> None:
    for seed in range(6):
        items, texts = documents(seed, 30), documents(seed + 100, 20)
        texts += [["before", *item, "after"] for item in items[:10]]
        index = ItemIndex(" ".join(words) for words in items)
        assert index.too_short == sum(len(words) < WORDS for words in items)
        for text in texts:
            shares = [len(gram_set(item) & gram_set(text)) / max(1, len(gram_set(item))) for item in items]
            long_enough = [
                share if len(gram_set(item)) >= 8 or share == 1.0 else 0.0 for item, share in zip(items, shares)
            ]
            match = index.best_match(" ".join(text), 0.35)
            if max(long_enough) < 0.35:
                assert match is None
            else:
                assert match is not None
                assert match.share == pytest.approx(max(long_enough)) == pytest.approx(long_enough[match.item])


def test_a_chinese_item_is_found_in_a_mixed_text() -> None:
    items = [
        "小明有十二个苹果，他给了小红三个，又买了五个，现在他一共有多少个苹果？",
        "What is the capital of the country of France?",
    ]
    index = ItemIndex(items)
    text = "请回答下面的问题。小明有十二个苹果，他给了小华三个，又买了五个，现在他一共有多少个苹果？答案是十四。"
    match = index.best_match(text, 0.35)
    assert match is not None
    assert match.item == 0
    assert index.best_match("今天的天气很好，我们一起去公园散步，然后去买苹果。", 0.35) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello,   WORLD!", "hello world"),
        ("ＡＢＣ １２３", "abc 123"),
        ("你好，世界", "你好世界"),
        ("Straße", "STRASSE"),
    ],
)
def test_case_width_and_punctuation_are_ignored(first: str, second: str) -> None:
    assert units(first) == units(second)
    assert text_hash(first) == text_hash(second) != 0


def test_characters_of_unspaced_scripts_are_units() -> None:
    assert units("abc你好 def") == ["abc", "你", "好", "def"]
    assert gram_size(units("你好世界 ok")) == CHARACTERS
    assert gram_size(units("only words here 你")) == WORDS
    assert units("don't stop") == ["don", "t", "stop"]


def test_order_and_every_unit_matter() -> None:
    words = ["a", "b", "c", "d", "e", "f"]
    grams = gram_hashes(words, 3)
    assert len(grams) == 4
    assert len(np.intersect1d(grams, gram_hashes(words[::-1], 3))) == 0
    assert text_hash("a b c") != text_hash("a c b")
    assert text_hash("") == text_hash("?!") == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [("2 + 2", "2 * 2"), ("4 / 2", "4 - 2"), ("a < b?", "a > b?"), ("Nice 😀", "Nice 😢"), ("-5", "5")],
)
def test_symbols_and_operators_tell_texts_apart(first: str, second: str) -> None:
    assert text_hash(first) != text_hash(second)
    assert units(first) == units(second)  # n-grams are of words


def test_equal_rows_names_the_first() -> None:
    assert equal_rows([5, 0, 7, 5, 0, 7, 5]) == [None, None, None, 0, None, 2, 0]
