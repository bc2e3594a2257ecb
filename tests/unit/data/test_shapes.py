"""Canonical forms of the shapes of rows, and the split by hash.

Witnesses: forms written by hand, and TRL's conversions.
"""

from __future__ import annotations

import copy
import json
import re
from decimal import Decimal
from random import Random
from typing import get_args

import datasets
import pytest
import trl

from align.config.parts import DataFormat
from align.data import shapes
from align.data.shapes import DropRow
from align.data.shapes.adapt import FORMATS, Adapter
from align.data.splits import is_held_out, prompt_key, split_by_prompt_hash
from align.errors import UserError

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
A2 = {"role": "assistant", "content": "other"}


def _turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


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
        ({"prompt": b"Hi", "completion": "a"}, "a user turn is a bytes, not text or messages"),
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


# --- messages ---------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1, "k": null}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # speakers, in any case
        ({"from": "human", "value": "u"}, U),
        ({"from": "Human", "value": "u"}, U),
        ({"role": " USER ", "content": "u"}, U),
        ({"from": "prompter", "value": "u"}, U),
        ({"from": "chatgpt", "value": "a"}, A),
        ({"role": "model", "content": "a"}, A),
        ({"role": "Assistant", "content": "a"}, A),
        ({"role": "developer", "content": "s"}, S),
        ({"role": "observation", "content": "7"}, RESULT),
        ({"role": "ipython", "content": "7"}, RESULT),
        # content
        ({"role": "user", "content": [{"type": "text", "text": "u"}]}, U),
        ({"role": "user", "content": [{"type": "input_text", "text": "u", "image_url": None}]}, U),
        ({"role": "user", "content": ["a", "b"]}, {"role": "user", "content": "ab"}),
        ({"role": "user", "content": 4}, {"role": "user", "content": "4"}),
        ({"role": "tool", "content": None}, {"role": "tool", "content": ""}),
        ({"role": "tool", "content": {"t": [1, None]}}, {"role": "tool", "content": '{"t": [1, null]}'}),
        ({**RESULT, "name": "f", "tool_call_id": 3}, {**RESULT, "name": "f", "tool_call_id": "3"}),
        # reasoning
        ({**A, "reasoning": "r"}, {**A, "reasoning_content": "r"}),
        ({**A, "thinking": "r", "reasoning_content": "r"}, {**A, "reasoning_content": "r"}),
        ({**A, "reasoning": "", "thinking": None}, A),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]},
            {**A, "reasoning_content": "r"},
        ),
        # tool calls
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1, "k": None}}}]}, CALLED),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"n":1,"k":null}'}]},
            CALLED,
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"n": 1, "k": None}}},
            CALLED,
        ),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"n": 1, "k": null}}'}, CALLED),
        ({"from": "function_call", "value": {"name": "f", "arguments": {"n": 1, "k": None}}}, CALLED),
        ({"from": "function_call", "value": '[{"name": "f", "arguments": {"n": 1, "k": null}}]'}, CALLED),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": ""}}]},
            {**CALLED, "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        ),
        ({**A, "tool_calls": [], "function_call": None}, A),
        # weight in the loss
        ({**A, "weight": 0}, {**A, "train": 0.0}),
        ({**A, "weight": 1}, A),
        ({**A, "weight": 0.5}, {**A, "train": 0.5}),
        ({**A, "train": False, "mask": True}, {**A, "train": 0.0}),
        ({**A, "mask": False}, A),
        ({**A, "train": 0.25}, {**A, "train": 0.25}),
        ({**U, "weight": 0}, U),
        ({**U, "weight": 1}, U),
        ({**U, "train": False}, U),
    ],
)
def test_one_message(given, expected):
    assert shapes.to_messages(given, "user") == [expected]
    assert shapes.to_messages([expected], "user") == [expected]  # a canonical message stays as it is


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"role": "Doctor", "content": "x"}, "unknown role 'Doctor'"),
        ({"role": "a" * 99, "content": "x"}, "unknown role '" + "a" * 39 + "…'"),
        ({"content": "x"}, "a message has no role"),
        ({"role": "user"}, "a message has no text"),
        ({"role": "assistant", "content": None}, "a message has no text"),
        ("text", "a message is not an object"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part of type 'image', but only text"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "part of type 'audio'"),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}, "part of type 'tool_use'"),
        ({"role": "user", "content": {"a": 1}}, "the content of a message is an object, not text"),
        ({**A, "reasoning": {"summary": []}}, "reasoning is an object, not text"),
        ({**A, "reasoning": "r", "thinking": "t"}, "two different texts of reasoning"),
        ({**U, "tool_calls": [CALL]}, "a user message has tool calls"),
        (
            {**A, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "arguments of a tool call is not valid JSON",
        ),
        ({**A, "tool_calls": [{"function": {"name": "f", "arguments": float("nan")}}]}, "not an object with a name"),
        ({**A, "tool_calls": [{"function": {"name": "f", "arguments": {"x": float("inf")}}}]}, "is not valid JSON"),
        ({**A, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "\\ud83d"}'}}]}, "is not valid JSON"),
        ({**A, "tool_calls": [{"function": {"arguments": {}}}]}, "not an object with a name and arguments"),
        ({"from": "function_call", "value": "f(1)"}, "a tool call is not valid JSON"),
        ({**A, "weight": -1}, "weight of a message is not"),
        ({**A, "weight": "high"}, "weight of a message is not"),
        ({**A, "weight": float("nan")}, "weight of a message is not"),
        ({**A, "mask": 0.5}, "mask is not true or false"),
        ({**A, "train": True, "weight": 0}, "contradict each other"),
        ({**U, "train": True}, "train is set on a user message"),
    ],
)
def test_unusable_messages(given, reason):
    with pytest.raises(DropRow, match=re.escape(reason)):
        shapes.to_messages([given], "user")


def test_messages_as_trl_reads_them():
    talk = [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a"}]
    for column in ("conversations", "messages"):
        row = {column: copy.deepcopy(talk)}
        found = shapes.conversation(row)["completion"]
        assert found == trl.maybe_convert_to_chatml(row)["messages"]


# --- rows -------------------------------------------------------------------------------------------------

HH = "\n\nHuman: How do I bake?\n\nAssistant: Flour.\n\nHuman: And then?\n\nAssistant:"
HH_TURNS = [
    {"role": "user", "content": "How do I bake?"},
    {"role": "assistant", "content": "Flour."},
    {"role": "user", "content": "And then?"},
]


@pytest.mark.parametrize(
    ("row", "shape", "messages"),
    [
        ({"conversations": [U, A], "system": "s"}, "messages", [S, U, A]),
        ({"messages": [S, U, A], "system": " s"}, "messages", [S, U, A]),
        ({"messages": [U, A], "system": ""}, "messages", [U, A]),
        ({"messages": json.dumps([U, A])}, "messages", [U, A]),
        ({"messages": [U, A], "conversations": [U, A2]}, "messages", [U, A]),
        ({"instruction": "u", "output": "a"}, "alpaca", [U, A]),
        ({"instruction": "u", "input": "", "output": "a", "text": "u a"}, "alpaca", [U, A]),
        ({"instruction": "u", "input": "x", "output": "a"}, "alpaca", [{"role": "user", "content": "u\nx"}, A]),
        ({"instruction": "", "input": "u", "output": "a"}, "alpaca", [U, A]),
        ({"instruction": "u", "output": "a", "history": [["u", "other"]], "system": "s"}, "alpaca", [S, U, A2, U, A]),
        ({"instruction": "u", "output": "a", "history": '[["u", "other"]]'}, "alpaca", [U, A2, U, A]),
        ({"prompt": "u", "completion": "a", "system": "s"}, "prompt_completion", [S, U, A]),
        ({"prompt": U, "completion": A}, "prompt_completion", [U, A]),
        ({"prompt": HH, "completion": "a"}, "prompt_completion", [*HH_TURNS, A]),
        ({"prompt": 2, "completion": True}, "prompt_completion", _turns("2", "true")),
    ],
)
def test_conversations_of_every_shape(row, shape, messages):
    found = shapes.conversation(row)
    assert shapes.shape_of(row, ("messages", "prompt_completion")) == shape
    assert found["prompt"] + found["completion"] == messages
    assert (found["prompt"] == []) == (shape != "prompt_completion")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": [U, A], "rejected": [U, A2]},  # UltraFeedback
        {"prompt": "u", "chosen": [U, A], "rejected": "other", "messages": [U, A]},
        {"prompt": [U], "chosen": A, "rejected": A2},
        {"conversations": [{"from": "human", "value": "u"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": A2},
        {"messages": [U, A], "chosen": [U, A], "rejected": [U, A2]},
        {"instruction": "u", "input": "", "output": ["a", "other"]},
        {"instruction": "u", "chosen": "a", "rejected": "other"},
        {"prompt": "u ", "chosen": [U, A], "rejected": [U, A2]},
    ],
)
def test_pairs_of_every_shape(row):
    assert shapes.shape_of(row) == "preference"
    assert shapes.pair(row) == {"prompt": [U], "chosen": [A], "rejected": [A2]}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"chosen": HH + " a", "rejected": HH + " other"}, HH_TURNS, [A], [A2]),
        ({"prompt": HH, "chosen": "a", "rejected": "other"}, HH_TURNS, [A], [A2]),
        ({"prompt": HH, "chosen": HH + " a", "rejected": HH + " other"}, HH_TURNS, [A], [A2]),
        ({"prompt": "u", "chosen": [S, U, A], "rejected": [S, U, A2]}, [S, U], [A], [A2]),
        ({"prompt": [S, U], "chosen": [U, A], "rejected": [U, A2]}, [S, U], [A], [A2]),
        ({"prompt": "u", "chosen": "a", "rejected": "other", "system": "s"}, [S, U], [A], [A2]),
        ({"prompt": "u", "chosen": [U, A, U, A], "rejected": [U, A, U, A2]}, [U, A, U], [A], [A2]),
        ({"chosen": [U, A, U, A], "rejected": [U, A2, U, A2]}, [U], [A, U, A], [A2, U, A2]),
        ({"prompt": [U], "chosen": [A, U, A], "rejected": [A2, U, A2]}, [U], [A, U, A], [A2, U, A2]),
        ({"chosen": [U, A, U, A], "rejected": [U, A, S | {"role": "user"}, A2]}, [U], None, None),
        ({"prompt": "u", "chosen": [CALLED, RESULT, A], "rejected": [A2]}, [U], [CALLED, RESULT, A], [A2]),
    ],
)
def test_pairs_of_several_turns(row, prompt, chosen, rejected):
    found = shapes.pair(row)
    assert found["prompt"] == prompt
    assert chosen is None or (found["chosen"], found["rejected"]) == (chosen, rejected)
    assert {found[side][i]["role"] for side in ("chosen", "rejected") for i in (0, -1)} == {"assistant"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "u", "chosen": [A, U], "rejected": "b"}, "chosen does not end with an assistant turn"),
        ({"prompt": "u", "chosen": [U, A], "rejected": [S, A2]}, "share no prompt"),
        ({"prompt": "x", "chosen": [U, A], "rejected": [U, A2]}, "begin with another prompt than the column prompt"),
        ({"prompt": "u", "chosen": "a", "rejected": 2.5, "system": {"a": 1}}, "system is an object, not text"),
        ({"instruction": "u", "output": ["a", "a"]}, "chosen equals rejected"),
    ],
)
def test_unusable_pairs_of_several_turns(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.pair(row)


def test_pairs_as_trl_splits_them():
    random = Random(0)
    for _ in range(50):
        talk = [{"role": ("user", "assistant")[n % 2], "content": str(random.random())} for n in range(5)]
        talk = talk[: random.choice([1, 3, 5])]
        row = {"chosen": [*talk, A], "rejected": [*talk, A2]}
        assert shapes.pair(row) == trl.extract_prompt(copy.deepcopy(row))
        repeated = {"prompt": talk, **row}
        assert shapes.pair(repeated) == shapes.pair(row)


def test_unpaired_rows_are_trls_unpaired_pairs():
    pairs = datasets.Dataset.from_list([{"prompt": [U], "chosen": [A], "rejected": [A2]}])
    expected = list(trl.unpair_preference_dataset(pairs))
    for label, row in ((True, expected[0]), (False, expected[1])):
        answer = row["completion"][0]
        assert row["label"] is label
        for given in (
            row,
            {"prompt": "u", "completion": answer["content"], "label": label},
            {"messages": [U, answer], "label": label},
            {"messages": [U, answer], "kto_tag": label},
            {"conversations": [U, answer], "kto_tag": int(label)},
            {"instruction": "u", "output": answer["content"], "kto_tag": str(label)},
            {"prompt": [U], "completion": [U, answer], "label": label},
        ):
            assert shapes.shape_of(given) == "unpaired"
            assert shapes.unpaired(given) == row


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "u", "completion": "a", "label": "good"}, "label is not true or false"),
        ({"prompt": "u", "completion": "a", "label": 2}, "label is not true or false"),
        ({"messages": [A, U], "label": True}, "does not end with an assistant turn"),
        ({"messages": [A], "label": True}, "no prompt"),
    ],
)
def test_unusable_unpaired_rows(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.unpaired(row)


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [5, 6, 7], [-100, 6, 7]),
        ({"input_ids": [5, 6, 7], "assistant_masks": [0, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "completion_mask": [False, True, True]}, [5, 6, 7], [-100, 6, 7]),
        (
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
            [5, 6, 7],
            [-100, 6, -100],
        ),
        ({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}, [5, 6], [5, 6]),
        ({"input_ids": "[5, 6]", "labels": "[-100, 6]"}, [5, 6], [-100, 6]),
    ],
)
def test_token_ids(row, ids, labels):
    assert shapes.shape_of(row) == "token_ids"
    assert shapes.token_ids(row) == {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [-1]}, "negative id"),
        ({"input_ids": [1.0]}, "input_ids is not a list of integers"),
        ({"input_ids": "one"}, "input_ids is not valid JSON"),
        ({"input_ids": [5], "labels": [5, 6]}, "labels and input_ids differ in length"),
        ({"input_ids": [5], "labels": [6]}, "neither -100 nor that of input_ids"),
        ({"input_ids": [5], "assistant_masks": [2]}, "assistant_masks is not a list of 0 and 1"),
    ],
)
def test_unusable_token_ids(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.token_ids(row)


@pytest.mark.parametrize(
    ("reference", "text"),
    [(4, "4"), (4.5, "4.5"), (True, "true"), (2**70, str(2**70)), (["a", 1], '["a", 1]'), (Decimal("1.10"), "1.10")],
)
def test_references_become_text(reference, text):
    assert shapes.prompt({"prompt": "u", "reference": reference}) == ([U], text)


# --- recognition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "accepted", "shape"),
    [
        ({"prompt": "u", "messages": [U, A]}, ("messages", "prompt_completion"), "messages"),
        ({"prompt": "u", "instruction": "u", "output": "a"}, ("prompt", "messages"), "prompt"),
        ({"text": "t", "input_ids": [1]}, shapes.SHAPES, "text"),
        ({"prompt": "u", "completion": "a", "label": True}, ("prompt_completion",), "prompt_completion"),
        ({"prompt": None, "text": "t"}, shapes.SHAPES, "text"),
        ({"question": "u", "answer": "a"}, shapes.SHAPES, None),
        ({}, shapes.SHAPES, None),
    ],
)
def test_a_row_has_the_most_specific_accepted_shape(row, accepted, shape):
    assert shapes.shape_of(row, accepted) == shape


def test_columns_that_are_not_used():
    row = {"messages": [{**U, "id": 1, "name": None}, A], "conversations": [U], "prompt": "u", "tools": [], "score": 1}
    assert shapes.unused_columns(row, "messages") == {"conversations", "prompt", "score", "messages[].id"}
    assert shapes.unused_columns({"instruction": "u", "input": "x", "output": "a"}, "alpaca") == set()


def test_a_column_that_cannot_be_read_stops_only_its_users():
    broken = shapes.Unreadable("a.jsonl line 3", "is nested too deeply")
    assert shapes.conversation({"messages": [U, A], "meta": broken})["completion"] == [U, A]
    for row in ({"messages": broken}, {"messages": [U, A], "system": broken}, {"prompt": "u", "completion": broken}):
        with pytest.raises(UserError, match=r"a.jsonl line 3: the column '\w+' is nested too deeply. Correct or"):
            shapes.conversation(row)


@pytest.mark.parametrize(
    ("settings", "row", "expected"),
    [
        (
            {"columns": {"prompt": "q", "completion": "r"}},
            {"q": "u", "r": 4, "prompt": 1},
            {"prompt": "u", "completion": 4},
        ),
        ({"columns": {"prompt": "q"}}, {"text": "t"}, {"text": "t"}),
        ({"columns": {"a": "b", "b": "a"}}, {"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({"ignore": ("tools",)}, {"text": "t", "tools": 1}, {"text": "t"}),
        ({"format": "text"}, {"messages": [U], "text": "t", "id": 1, "tools": []}, {"text": "t", "id": 1, "tools": []}),
        ({"format": "sharegpt"}, {"messages": [U], "conversations": [A]}, {"conversations": [A]}),
        (
            {"roles": {"Doctor": "assistant"}},
            {"messages": [{"role": "Doctor", "content": "a"}], "note": {"role": "Doctor"}},
            {"messages": [A], "note": {"role": "Doctor"}},
        ),
        (
            {"roles": {"Doctor": "assistant"}},
            {"messages": '[{"role": "Doctor", "content": "a"}]', "prompt": "[1]", "chosen": {"from": "Doctor"}},
            {"messages": [A], "prompt": "[1]", "chosen": {"from": "assistant"}},
        ),
    ],
)
def test_settings_of_a_source(settings, row, expected):
    before = copy.deepcopy(row)
    assert Adapter(**settings)(row) == expected
    assert row == before


def test_every_format_names_a_shape():
    assert set(FORMATS) == set(get_args(DataFormat))
    assert set(FORMATS.values()) == set(shapes.SHAPES)


# --- template variables -----------------------------------------------------------------------------------

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"k": {"default": None}}}}
WRAPPED = {"type": "function", "function": TOOL}


@pytest.mark.parametrize(
    ("row", "variables"),
    [
        ({"tools": [WRAPPED]}, {"tools": [WRAPPED]}),
        ({"tools": [TOOL]}, {"tools": [WRAPPED]}),
        ({"tools": json.dumps([TOOL])}, {"tools": [WRAPPED]}),
        ({"tools": [json.dumps(TOOL)]}, {"tools": [WRAPPED]}),
        ({"tools": "[]"}, {}),
        ({"tools": None, "chat_template_kwargs": ""}, {}),
        ({"chat_template_kwargs": {"x": None}}, {"x": None}),
        (
            {"enable_thinking": False, "reasoning_effort": "high"},
            {"enable_thinking": False, "reasoning_effort": "high"},
        ),
        ({"enable_thinking": True, "chat_template_kwargs": '{"enable_thinking": true}'}, {"enable_thinking": True}),
    ],
)
def test_template_variables(row, variables):
    assert shapes.template_variables(row) == variables


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": {"a": 1}}, "tools is not a list of objects"),
        ({"tools": "x"}, "tools is not valid JSON"),
        ({"tools": [{"x": float("nan")}]}, "tools is not valid JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
        ({"chat_template_kwargs": {"messages": []}}, "must not set messages"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "contradict each other"),
    ],
)
def test_unusable_template_variables(row, reason):
    with pytest.raises(DropRow, match=reason):
        shapes.template_variables(row)


# --- splits -----------------------------------------------------------------------------------------------


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
    assert prompt_key([S, U]) == prompt_key([U]) != prompt_key([S])
