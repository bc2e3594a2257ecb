"""Canonical forms of the data formats, and the split by hash."""

from __future__ import annotations

import pytest

from align.data import shapes
from align.data.shapes import DropRow
from align.data.splits import is_held_out, prompt_key, split_by_prompt_hash

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
A2 = {"role": "assistant", "content": "other"}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [S, U, A]}, [], [S, U, A]),
        ({"prompt": "u", "completion": "a"}, [U], [A]),
        ({"prompt": [S, U], "completion": [A], "text": None}, [S, U], [A]),
        ({"messages": [{**U, "name": None}, {"from": "gpt", "value": "a"}]}, [], [U, A]),
    ],
)
def test_conversations(row, prompt, completion):
    assert shapes.conversation(row) == {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [U]}, "no assistant turn"),
        ({"messages": []}, "empty conversation"),
        ({"messages": None}, "columns of no known shape"),
        ({"prompt": "u", "completion": "  "}, "empty assistant turn"),
        ({"prompt": " ", "completion": "a"}, "empty user turn"),
        ({"messages": [U, {"role": "assistant", "content": ""}]}, "empty assistant turn"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image"}]}]}, "part of type 'image'"),
    ],
)
def test_unusable_conversations(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.conversation(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": "a", "rejected": "other"},
        {"prompt": [U], "chosen": [A], "rejected": [A2]},
        {"chosen": [U, A], "rejected": [U, A2]},
    ],
)
def test_pairs(row):
    assert shapes.pair(row) == {"prompt": [U], "chosen": [A], "rejected": [A2]}


def test_implicit_prompt_is_all_that_is_shared():
    pair = shapes.pair({"chosen": [S, U, A, U, A], "rejected": [S, U, A, U, A2]})
    assert pair == {"prompt": [S, U, A, U], "chosen": [A], "rejected": [A2]}


def test_implicit_prompt_of_strings_ends_at_a_word():
    pair = shapes.pair({"chosen": "Who? It is me.", "rejected": "Who? It isn't you."})
    assert [pair[k][0]["content"] for k in ("prompt", "chosen", "rejected")] == [
        "Who? It",
        "is me.",
        "isn't you.",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "u", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"chosen": [U, A], "rejected": [U, A]}, "chosen equals rejected"),
        ({"chosen": "same", "rejected": "same"}, "chosen equals rejected"),
        ({"chosen": [A], "rejected": [A2]}, "share no prompt"),
        ({"prompt": "u", "chosen": "a", "rejected": ""}, "empty assistant turn"),
    ],
)
def test_unusable_pairs(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.pair(row)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "u"}, None),
        ({"prompt": [U], "reference": "r"}, "r"),
        ({"prompt": "u", "completion": "a"}, "a"),
        ({"prompt": "u", "completion": "a", "reference": "r"}, "r"),
        ({"messages": [U, A]}, "a"),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "a"),
    ],
)
def test_prompts(row, reference):
    assert shapes.prompt(row) == ([U], reference)


def test_prompt_must_end_with_the_user():
    with pytest.raises(DropRow, match="user's turn"):
        shapes.prompt({"prompt": [U, A]})


def test_texts():
    assert shapes.text({"text": "t"}) == "t"
    assert shapes.text({"messages": [S, U, A]}) == "s\nu\na"
    assert shapes.text({"prompt": "u", "reference": "r"}) == "u\nr"


def test_split_follows_sha256_and_is_stable_when_rows_are_added():
    # sha256("a") = ca978112ca1bbdca...: 0xca978112 / 2**32 = 0.7914
    assert is_held_out("a", 0.792)
    assert not is_held_out("a", 0.791)
    rows = [f"prompt {n}" for n in range(2000)]
    train, held_out = split_by_prompt_hash(rows, 0.1, key=str)
    assert 150 < len(held_out) < 250
    assert sorted(train + held_out) == sorted(rows)
    more_train, more_held_out = split_by_prompt_hash([f"new {n}" for n in range(99)] + rows, 0.1, key=str)
    assert set(held_out) <= set(more_held_out)
    assert set(train) <= set(more_train)
    assert prompt_key([U]) == prompt_key([{**U, "extra": 1}]) != prompt_key([A])
