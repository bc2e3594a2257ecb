"""Tokenised rows: counted by hand with one-byte tokens, and equal to TRL's own tokenisation."""

from __future__ import annotations

import re
from types import SimpleNamespace

import datasets
import pytest

from align.config.parts import Data, FileSource
from align.data import prepare
from align.data.shapes import Message
from align.errors import UserError

TURNS = 20
"""Tokens of `<|im_start|>user\\na<|im_end|>\\n<|im_start|>assistant\\n`, as counted in test_chat."""


def talk(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def data(path: str, **options) -> Data:
    return Data(train=[FileSource(path=path)], **options)


def test_text_is_packed_without_losing_a_token(tokenizer, jsonl):
    texts = ["abc", "defgh", "i"]
    made = prepare.prepare_text(data(jsonl([{"text": t} for t in texts]), max_length=8), tokenizer, seed=0)
    blocks = [row["input_ids"] for row in made.train]
    assert [len(block) for block in blocks] == [8, 4]  # 9 characters and 3 end tokens
    stream = tokenizer.decode([token for block in blocks for token in block])
    assert sorted(stream.removesuffix("<|im_end|>").split("<|im_end|>")) == sorted(texts)
    assert all(row["labels"] == row["input_ids"] for row in made.train)
    report = made.report
    assert (report.rows_read, report.rows_train, report.tokens, report.loss_tokens) == (3, 3, 12, 10)


def test_a_packed_row_knows_its_documents(tokenizer, jsonl):
    """Documents of 4, 6, 2 and 9 tokens in some order, split after every eighth token.

    Each piece ends with an end token or is continued in the next row.
    """
    texts = ["abc", "defgh", "i", "jklmnopq"]
    settings = data(jsonl([{"text": t} for t in texts]), max_length=8)
    made = prepare.prepare_text(settings, tokenizer, attend_across=False, seed=0)
    end, pieces = tokenizer.eos_token_id, []
    for number, row in enumerate(made.train):
        ids = row["input_ids"]
        for length in row["documents"]:
            pieces.append(ids[:length])
            ids = ids[length:]
        assert ids == []
        assert all(piece.index(end) == len(piece) - 1 for piece in pieces[:-1] if end in piece), number
    assert sum(map(len, pieces)) == 21
    assert sum(piece[-1] == end for piece in pieces) == 4
    assert len(pieces) == 4 + 2  # two documents are split at the ends of rows of 8, 8 and 5 tokens
    assert made.report.loss_tokens == 21 - len(pieces)


def test_sft_labels_by_hand(tokenizer, jsonl):
    path = jsonl([{"messages": talk("a", "bc")}])
    made = prepare.prepare_sft(data(path), tokenizer, assistant_only_loss=True, seed=0)
    row = made.train[0]
    assert len(row["input_ids"]) == TURNS + 4
    end = tokenizer.eos_token_id
    b, c = tokenizer("bc")["input_ids"]
    assert row["labels"] == [-100] * TURNS + [b, c, end, -100]
    assert (made.report.tokens, made.report.loss_tokens, made.held_out) == (24, 3, None)
    every = prepare.prepare_sft(data(path), tokenizer, assistant_only_loss=False, seed=0)
    assert every.train[0]["labels"] == row["input_ids"]
    assert every.report.loss_tokens == 23  # the first token has no predecessor


def test_sft_prompt_turns_are_context(tokenizer, jsonl):
    row = {"prompt": [*talk("a", "xx"), {"role": "user", "content": "b"}], "completion": talk("", "yz")[1:]}
    made = prepare.prepare_sft(data(jsonl([row])), tokenizer, assistant_only_loss=True, seed=0)
    labels = [label for label in made.train[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == "yz<|im_end|>"


def test_sft_truncation_keeps_the_start_and_counts(tokenizer, jsonl):
    rows = [
        {"messages": talk("a", "bc")},
        {"messages": talk("a", "b" * 30)},
        {"messages": talk("a" * 40, "b")},
    ]
    rows += [{"messages": [{"role": "user", "content": "a"}]}]
    made = prepare.prepare_sft(data(jsonl(rows), max_length=24), tokenizer, assistant_only_loss=True, seed=0)
    report = made.report
    assert report.dropped == {"no assistant turn": 1, "no answer token within max_length": 1}
    assert (report.rows_read, report.rows_train, report.truncated, report.loss_tokens) == (4, 2, 1, 3 + 4)
    ends = {tokenizer.decode(row["input_ids"]).rpartition("assistant\n")[2] for row in made.train}
    assert ends == {"bc<|im_end|>\n", "bbbb"}
    assert report.summary() == (
        "4 rows read: 2 training rows (48 tokens, 7 in the loss), 1 truncated, 1 dropped: no answer token within "
        "max_length, 1 dropped: no assistant turn"
    )
    with pytest.raises(UserError, match=r"all 4 rows were dropped \(no answer token.*: 3.*\). Raise data.max_length"):
        prepare.prepare_sft(data(jsonl(rows), max_length=9), tokenizer, assistant_only_loss=True, seed=0)


def pairs(n: int = 4) -> list[dict]:
    return [{"prompt": "a", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(n)]


def test_pairs_by_hand(tokenizer, jsonl):
    rows = [
        *pairs(1),
        {"prompt": "a", "chosen": "x", "rejected": "x"},
        {"prompt": "a", "chosen": "y" * 40, "rejected": "z"},
    ]
    settings = data(jsonl(rows), max_length=TURNS + 10)
    dpo = prepare.prepare_dpo_pairs(settings, tokenizer, seed=0)
    row = dpo.train[0]
    decoded = {name: tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert decoded == {
        "prompt_ids": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "chosen_ids": "good0<|im_end|>",
        "rejected_ids": "bad0<|im_end|>",
    }
    reward = prepare.prepare_reward_pairs(settings, tokenizer, seed=0)
    assert reward.train.column_names == ["chosen_ids", "rejected_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        assert reward.train[0][side] == row["prompt_ids"] + row[side]
    for made in (dpo, reward):
        assert made.report.dropped == {"chosen equals rejected": 1, "longer than max_length": 1}
        assert (made.report.rows_read, made.report.rows_train) == (3, 1)


def test_a_truncated_completion_has_no_end_of_turn(tokenizer, jsonl):
    rows = [{"prompt": "a", "chosen": "good", "rejected": "cut of", "rejected_finished": False}]
    made = prepare.prepare_dpo_pairs(data(jsonl(rows)), tokenizer, seed=0).train[0]
    assert tokenizer.decode(made["rejected_ids"]) == "cut of"
    assert tokenizer.decode(made["chosen_ids"]) == "good<|im_end|>"
    reward = prepare.prepare_reward_pairs(data(jsonl(rows)), tokenizer, seed=0).train[0]
    assert reward["rejected_ids"] == made["prompt_ids"] + made["rejected_ids"]
    finished = [{**rows[0], "rejected_finished": True}]
    made = prepare.prepare_dpo_pairs(data(jsonl(finished)), tokenizer, seed=0).train[0]
    assert tokenizer.decode(made["rejected_ids"]) == "cut of<|im_end|>"


def test_token_ids_are_trained_as_they_are(tokenizer, jsonl):
    talks = prepare.prepare_sft(
        data(jsonl([{"messages": talk("a", "bc")}])), tokenizer, assistant_only_loss=True, seed=0
    )
    (made,) = talks.train
    mask = [int(label != -100) for label in made["labels"]]
    rows = [
        {"input_ids": made["input_ids"], "labels": made["labels"]},
        {"input_ids": [0, *made["input_ids"]], "attention_mask": [0] + [1] * len(mask), "assistant_masks": [0, *mask]},
        {"input_ids": [1, len(tokenizer)]},
        {"input_ids": [1, 2**70]},
    ]
    found = prepare.prepare_sft(data(jsonl(rows)), tokenizer, assistant_only_loss=True, seed=0)
    assert [row["labels"] for row in found.train] == [made["labels"]] * 2
    assert [row["input_ids"] for row in found.train] == [made["input_ids"]] * 2
    assert found.report.dropped == {"input_ids has an id that the tokenizer lacks": 2}
    text = prepare.prepare_text(data(jsonl([{"input_ids": [5, 6]}, {"text": "ab"}])), tokenizer, seed=0)
    expected = [5, 6, tokenizer.eos_token_id, *tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    assert sorted(token for row in text.train for token in row["input_ids"]) == sorted(expected)


def test_user_turns_inside_an_answer_have_no_label(tokenizer, jsonl):
    chosen, rejected = talk("c", "A2"), talk("other", "B2")
    row = {"prompt": "a", "chosen": [*talk("x", "A1")[1:], *chosen]} | {"rejected": [*talk("x", "B")[1:], *rejected]}
    made = prepare.prepare_dpo_pairs(data(jsonl([row]), max_length=200), tokenizer, seed=0)
    (pair,) = made.train
    for side, answers in (("chosen", ["A1", "A2"]), ("rejected", ["B", "B2"])):
        ids, labels = pair[f"{side}_ids"], pair[f"{side}_labels"]
        assert [label for label in labels if label != -100] == tokenizer(
            "".join(f"{answer}<|im_end|>" for answer in answers)
        )["input_ids"]
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert made.report.loss_tokens == len("A1A2BB2") + 4


def trl_arguments(**options) -> SimpleNamespace:
    defaults = {
        "dataset_num_proc": None,
        "max_length": 64,
        "truncation_mode": "keep_start",
        "shuffle_dataset": False,
    }
    return SimpleNamespace(**defaults, dataset_text_field="text", **options)


def test_trl_accepts_the_rows_and_tokenises_the_same(tokenizer, jsonl):
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    conversations = [{"messages": talk("a" * n, "b" * n) + talk("c", "d")} for n in range(1, 6)]
    raw = datasets.Dataset.from_list(conversations)
    arguments = trl_arguments(assistant_only_loss=True)
    myself = SimpleNamespace(completion_only_loss=False, chat_template=tokenizer.chat_template)
    theirs = SFTTrainer._prepare_dataset(myself, raw, tokenizer, arguments, False, None, "train")
    settings = data(jsonl(conversations), max_length=64)
    ours = prepare.prepare_sft(settings, tokenizer, assistant_only_loss=True, seed=0).train

    def contents(rows, *columns):
        return sorted([row[column] for column in columns] for row in rows)

    assert contents(ours, "input_ids", "labels") == contents(theirs, "input_ids", "labels")
    kept = SFTTrainer._prepare_dataset(myself, ours, tokenizer, arguments, False, None, "train")
    assert contents(kept, "input_ids", "labels") == contents(ours, "input_ids", "labels")

    as_messages = [
        {
            "prompt": talk(r["prompt"], "")[:1],
            "chosen": talk("", r["chosen"])[1:],
            "rejected": talk("", r["rejected"])[1:],
        }
        for r in pairs()
    ]
    raw, settings = datasets.Dataset.from_list(as_messages), data(jsonl(pairs()), max_length=64)
    (line_break,) = tokenizer("\n")["input_ids"]  # written by the template after the end of a turn

    def trimmed(rows, *columns):
        assert all(row[column][-1] == line_break for row in rows for column in columns)
        return sorted([row[column][:-1] for column in columns] for row in rows)

    columns = ("chosen_ids", "rejected_ids")
    theirs = RewardTrainer._prepare_dataset(None, raw, tokenizer, trl_arguments(), "train")
    ours = prepare.prepare_reward_pairs(settings, tokenizer, seed=0).train
    assert contents(ours, *columns) == trimmed(theirs, *columns)
    kept = RewardTrainer._prepare_dataset(None, ours, tokenizer, trl_arguments(), "train")
    assert contents(kept, *columns) == contents(ours, *columns)

    ours = prepare.prepare_dpo_pairs(settings, tokenizer, seed=0).train
    theirs = DPOTrainer._prepare_dataset(None, raw, tokenizer, trl_arguments(), "train")
    assert contents(theirs, "prompt_ids") == contents(ours, "prompt_ids")
    assert contents(ours, *columns) == trimmed(theirs, *columns)
    assert len(ours) == 4


def test_held_out_by_fraction_and_by_source(tokenizer, jsonl):
    rows = [{"prompt": f"q{n % 50}", "completion": f"a{n}"} for n in range(100)]  # each prompt twice
    options = {"assistant_only_loss": True, "seed": 0}
    made = prepare.prepare_sft(data(jsonl(rows), held_out_fraction=0.3), tokenizer, **options)
    report = made.report
    assert report.rows_train + report.rows_held_out == 100
    assert report.rows_held_out == len(made.held_out) >= 10

    def prompts(split):
        return {tokenizer.decode(row["input_ids"]).split("<|im_end|>")[0] for row in split}

    assert not prompts(made.train) & prompts(made.held_out)
    other = jsonl(rows[:3], "other.jsonl")
    made = prepare.prepare_sft(
        Data(train=[FileSource(path=jsonl(rows))], held_out=[FileSource(path=other)]), tokenizer, **options
    )
    assert (made.report.rows_train, made.report.rows_held_out, made.report.rows_read) == (100, 3, 103)
    with pytest.raises(UserError, match=r"leaves no (training|held-out) row"):
        prepare.prepare_sft(data(jsonl(rows[:1]), held_out_fraction=0.3), tokenizer, **options)


def test_a_question_with_and_without_system_prompt_is_in_one_split(tokenizer, jsonl):
    plain = [{"prompt": f"q{n}", "completion": "a"} for n in range(60)]
    talks = [{"messages": talk(f"q{n}", "b"), "system": f"s{n % 7}"} for n in range(60)]
    made = prepare.prepare_sft(
        data(jsonl(plain + talks), held_out_fraction=0.3), tokenizer, assistant_only_loss=True, seed=0
    )

    def questions(split):
        return {re.search(r"user\n(q\d+)<", tokenizer.decode(row["input_ids"]))[1] for row in split}

    held_out = questions(made.held_out)
    assert len(held_out) >= 8
    assert len(made.held_out) == 2 * len(held_out)
    assert not held_out & questions(made.train)


def test_fingerprint_follows_every_id(tokenizer, jsonl):
    def fingerprint(rows, seed=0):
        return prepare.prepare_reward_pairs(data(jsonl(rows)), tokenizer, seed=seed).report.fingerprint

    assert fingerprint(pairs()) == fingerprint(pairs())
    changed = pairs()
    changed[2]["rejected"] = "bad?"
    assert len({fingerprint(pairs()), fingerprint(changed), fingerprint(pairs(), seed=1), fingerprint(pairs(3))}) == 4


def test_prompts(tokenizer, jsonl):
    rows = [{"prompt": "a", "reference": "r", "level": 3}, {"prompt": "a" * 30, "reference": "r", "level": 4}]
    sources = [FileSource(path=jsonl(rows))]
    prompts, report = prepare.prepare_prompts(sources, tokenizer, max_prompt_length=TURNS, seed=0)
    (prompt,) = prompts
    assert tokenizer.decode(prompt.ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert (len(prompt.ids), prompt.reference, prompt.row["level"]) == (TURNS, "r", 3)
    assert report.dropped == {"longer than max_prompt_length": 1}
    with pytest.raises(UserError, match="Raise max_prompt_length"):
        prepare.prepare_prompts(sources, tokenizer, max_prompt_length=TURNS - 1, seed=0)


def test_wrong_format_is_reported_before_tokenising(tokenizer, jsonl):
    with pytest.raises(UserError, match=r"rows.jsonl: the columns are text, .* needs chosen and .*`columns: {stand"):
        prepare.prepare_dpo_pairs(data(jsonl([{"text": "a"}])), tokenizer, seed=0)
