"""Rejection sampling: which completions each rule keeps, and stages that train on them by the stage's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import load_recipe
from align.config.stages import RejectionSampleStage
from align.data.answers import AnswerReader
from align.data.prepare import PromptRow
from align.errors import UserError
from align.pipeline import run
from align.recipes.rejection_sample import Tally, candidates, rows_of
from align.rollout.base import Completion
from tests.chat_templates import SHAPES, tokenizer_for
from tests.integration.runs import small_model
from tests.unit.rl.runs import REWARD

END = "<|im_end|>"
SAMPLED = [f"b{END}", f"abc{END}", f"b {END}", f" {END}", "abcd", f"c{END}", f"d{END}"]
SCORES = [0.5, 1.0, 0.5, 2.0, 3.0, 1.0, 0.0]
"""Of `SAMPLED`: the third repeats the first, the fourth is empty, the fifth is truncated."""
ROW = PromptRow((1, 2), [{"role": "user", "content": "a"}], None, {"tools": [{"name": "t"}], "answer": 3})


def stage(**settings: Any) -> RejectionSampleStage:
    values = {"kind": "rejection_sample", "train": [{"path": "x.jsonl"}], "rewards": [{"kind": "exact"}], **settings}
    return RejectionSampleStage.model_validate(values)


def kept(tally: Tally, **settings: Any) -> list[dict[str, Any]]:
    tokenizer = tokenizer_for(SHAPES["chatml"])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLED]
    group = [Completion([1, 2], i, [0.0] * len(i), t.endswith(END), 0) for i, t in zip(ids, SAMPLED)]
    return rows_of(stage(**settings), ROW, candidates(group, SCORES, AnswerReader(tokenizer), tally), tally)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({}, ["abc"]),
        ({"threshold": 1.5}, []),
        ({"keep": "correct"}, ["abc", "c"]),
        ({"keep": "correct", "rewards": [{"kind": "exact", "weight": 0.5}]}, ["abc", "c", "b"]),
        ({"keep": "threshold", "threshold": 0.5}, ["abc", "c", "b"]),
        ({"keep": "threshold", "threshold": 0.5, "per_prompt": 2}, ["abc", "c"]),
    ],
)
def test_each_rule_keeps_its_completions(settings: dict[str, Any], texts: list[str]) -> None:
    tally = Tally()
    rows = kept(tally, **settings)
    assert [row["completion"][0]["content"] for row in rows] == texts
    for row in rows:
        assert row["prompt"] == ROW.messages
        assert row["tools"] == ROW.row["tools"]
        assert (
            row["score"] == SCORES[[text.removesuffix(END) for text in SAMPLED].index(row["completion"][0]["content"])]
        )
    assert (tally.sampled, tally.truncated, tally.empty, tally.repeated) == (7, 1, 1, 1)
    assert (tally.kept, tally.prompts_kept, tally.prompts) == (len(texts), bool(texts), 1)
    assert tally.metrics("train")["train_score"] == pytest.approx(8 / 7)
    assert tally.metrics("train")["train_best_score"] == 3


@pytest.mark.parametrize(("settings", "makes"), [({"margin": 1.0}, 1), ({"margin": 1.1}, 0), ({"threshold": 1.1}, 0)])
def test_a_pair_is_the_best_and_the_worst(settings: dict[str, Any], makes: int) -> None:
    rows = kept(Tally(), keep="pairs", **settings)
    assert len(rows) == makes
    for row in rows:
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("abc", "d")
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)


def test_equal_scores_make_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.rollout.test_rejection_sample.SCORES", [1.0] * 7)
    assert kept(Tally(), keep="pairs") == []


def recipe(folder: Path, **sample: Any) -> Any:
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four", "five", "six")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    source = [{"kind": "file", "path": str(folder / "prompts.jsonl")}]
    keeps = {
        "kind": "rejection_sample",
        "train": source,
        "rewards": [{"kind": "function", "path": f"{folder / 'reward.py'}:score"}],
        "samples": 6,
        "rollout": {"engine": "huggingface", "max_new_tokens": 12, "max_model_length": 64},
        **sample,
    }
    train = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 1}
    stages = {
        "good": {**keeps, "keep": "threshold", "threshold": 0.1},
        "sft": {"kind": "sft", "data": {"train": [{"kind": "stage", "stage": "good"}], "max_length": 64}, **train},
        "pairs": {**keeps, "init_from": "sft", "keep": "pairs", "held_out": source},
        "dpo": {
            "kind": "dpo",
            "init_from": "sft",
            "data": {
                "train": [{"kind": "stage", "stage": "pairs"}],
                "held_out": [{"kind": "stage", "stage": "pairs", "split": "held_out"}],
                "max_length": 64,
            },
            **train,
        },
    }
    # Near-uniform logits: about one token in 300 is the end of a turn, so few completions would end.
    model = small_model([{"kind": "python_docs", "view": "text", "limit": 20}], initializer_range=0.4)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "t", "model": model, "stages": stages}, sort_keys=False)
    )
    return load_recipe(folder / "recipe.yaml")


def test_later_stages_train_on_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models seldom end a turn, so their completions count as finished here."""
    finished = lambda prompt, ids, logprobs, _, version: Completion(prompt, ids, logprobs, True, version)  # noqa: E731
    monkeypatch.setattr("align.rollout.hf_engine.Completion", finished)
    said: list[str] = []
    run(recipe(tmp_path), tmp_path / "run", say=said.append)
    rows = [json.loads(line) for line in (tmp_path / "run" / "good" / "data" / "train.jsonl").open()]
    manifest = {
        name: json.loads((tmp_path / "run" / name / "manifest.json").read_text())
        for name in ("good", "sft", "pairs", "dpo")
    }
    assert rows
    for row in rows:
        text = row["completion"][0]["content"]
        assert row["score"] >= 0.1
        assert abs(sum(c in "aeiou" for c in text) / len(text) - row["score"]) < 0.1  # white space was removed
    assert manifest["good"]["metrics"]["train_kept"] == len(rows)
    assert manifest["good"]["metrics"]["train_sampled"] == 36
    assert manifest["sft"]["data"]["rows_read"] == len(rows)
    splits = [(tmp_path / "run" / "pairs" / "data" / f"{split}.jsonl").open() for split in ("train", "held_out")]
    train, held_out = ([json.loads(line) for line in file] for file in splits)
    assert train != held_out  # the same prompts with other samples
    assert all(row["chosen_score"] > row["rejected_score"] for row in (*train, *held_out))
    assert manifest["dpo"]["data"]["rows_train"] == len(train)
    assert any(line.startswith("  train: ") and "completions" in line for line in said)


def test_a_stage_that_keeps_nothing_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.good: none of the 36 completions for train makes a row"):
        run(
            recipe(tmp_path, rewards=[{"kind": "regex", "pattern": "^never$"}]), tmp_path / "run", say=lambda line: None
        )
