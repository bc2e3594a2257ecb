"""Rows as they are shown, and the description of their lengths, by hand."""

from __future__ import annotations

from align.data.show import LengthBias, LengthBin, bar, histogram, length_bias, sides_of

LETTERS = "abcdefghij"


def decode(ids: object) -> str:
    return "".join(LETTERS[i] for i in ids)  # type: ignore[attr-defined]


def test_a_row_has_a_segment_per_run_of_the_loss() -> None:
    (side,) = sides_of({"input_ids": [0, 1, 2, 3, 4, 5], "labels": [-100, -100, 2, 3, -100, 5]}, decode)
    assert side.segments == [("ab", False), ("cd", True), ("e", False), ("f", True)]
    assert side.to_dict() == {
        "text": "abcdef",
        "input_ids": [0, 1, 2, 3, 4, 5],
        "labels": [-100, -100, 2, 3, -100, 5],
    }


def test_a_prompt_is_not_in_the_loss() -> None:
    (side,) = sides_of({"input_ids": [0, 1]}, decode)
    assert side.segments == [("ab", False)]
    assert sides_of({"input_ids": []}, decode)[0].segments == []


def test_a_pair_has_its_prompt_once() -> None:
    dpo = sides_of({"prompt_ids": [0, 1], "chosen_ids": [2, 9], "rejected_ids": [3, 9]}, decode)
    reward = sides_of({"chosen_ids": [0, 1, 2, 9], "rejected_ids": [0, 1, 3, 9]}, decode)
    assert dpo == reward
    assert [(side.name, side.segments) for side in dpo] == [
        ("prompt", [("ab", False)]),
        ("chosen", [("cj", True)]),
        ("rejected", [("dj", True)]),
    ]
    shorter = sides_of({"chosen_ids": [0, 1, 2], "rejected_ids": [0, 1]}, decode)
    assert [side.ids for side in shorter] == [[0, 1], [2], []]


def test_user_turns_inside_an_answer_are_not_in_the_loss() -> None:
    rows = {"prompt_ids": [0], "chosen_ids": [2, 3, 9], "chosen_labels": [2, -100, 9], "rejected_ids": [4]}
    _, chosen, rejected = sides_of({**rows, "rejected_labels": [4]}, decode)
    assert chosen.segments == [("c", True), ("d", False), ("j", True)]
    assert rejected.segments == [("e", True)]


def test_a_labelled_row_has_the_name_of_its_label() -> None:
    row = {"prompt_ids": [0, 1], "completion_ids": [2, 3], "completion_labels": [-100, 3]}
    for label, name in ((1, "desirable"), (0, "undesirable")):
        sides = sides_of({**row, "label": [label]}, decode)
        assert [(side.name, side.segments) for side in sides] == [
            ("prompt", [("ab", False)]),
            (name, [("c", False), ("d", True)]),
        ]


def test_the_histogram_covers_every_row() -> None:
    assert histogram([1, 8, 9, 16, 17, 64], bins=8) == [
        LengthBin(1, 8, 2),
        LengthBin(9, 16, 2),
        LengthBin(17, 24, 1),
        *(LengthBin(low, low + 7, 0) for low in (25, 33, 41, 49)),
        LengthBin(57, 64, 1),
    ]
    assert histogram([1000], bins=8) == [*(LengthBin(128 * n + 1, 128 * n + 128, 0) for n in range(7)), (897, 1024, 1)]
    assert histogram([0, 3]) == [LengthBin(1, 8, 2)]
    assert histogram([]) == []


def test_the_length_bias_by_hand() -> None:
    assert length_bias([(4, 2), (1, 3), (5, 5), (10, 2)]) == LengthBias(0.5, 0.25, 5.0, 3.0)
    assert length_bias([]) is None


def test_a_bar_is_proportional() -> None:
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 4) == "██"
    assert bar(0.0, 4) == ""
    assert bar(1 / 32, 4) == "▏"
