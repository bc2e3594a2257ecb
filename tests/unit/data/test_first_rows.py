"""The preflight check of first rows: wrong data of a later stage is found before any stage runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import load_recipe
from align.config.parts import FileSource
from align.data.sources import check_first_rows
from align.errors import UserError
from align.preflight import problems

LENGTH = {"kind": "length", "max_tokens": 8}
ROWS = {
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "label": {"prompt": "a", "completion": "b", "label": True},
    "other": {"question": "a", "source": "b"},
}
CHATS, PAIRS, LABELS, OTHER = ([{"path": f"{name}.jsonl"}] for name in ROWS)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"kind": "sft", "data": {"train": CHATS, "held_out": PAIRS}}, ["data.held_out: pair.jsonl: the columns are"]),
        ({"kind": "pretrain", "data": {"train": PAIRS}}, ["data.train: pair.jsonl: the columns are"]),
        ({"kind": "reward_model", "data": {"train": LABELS}}, ["data.train: label.jsonl: the columns are"]),
        ({"kind": "dpo", "data": {"train": PAIRS, "held_out": CHATS}}, ["data.held_out: chat.jsonl: the columns are"]),
        ({"kind": "kto", "data": {"train": OTHER}}, ["data.train: other.jsonl: the columns are"]),
        ({"kind": "kto", "data": {"train": LABELS, "held_out": PAIRS}}, []),
        ({"kind": "sample", "train": OTHER}, ["train: other.jsonl: the columns are"]),
        ({"kind": "ppo", "prompts": OTHER, "rewards": [LENGTH]}, ["prompts: other.jsonl: the columns are"]),
        (
            {"kind": "evaluate", "models": ["base"], "prompts": OTHER, "preferences": CHATS},
            ["prompts: other.jsonl: the columns are", "preferences: chat.jsonl: the columns are"],
        ),
    ],
)
def test_the_first_rows_of_every_source_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], wrong: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    model = {"kind": "scratch", "preset": "tiny", "tokenizer": {"data": CHATS}}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": model, "stages": {"last": settings}}))
    found = problems(load_recipe("r.yaml"), ["last"])
    assert len(found) == len(wrong)
    for line, start in zip(found, wrong):
        assert line.startswith(f"stages.last.{start}")


def test_a_reward_function_may_read_any_column_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "tests": "b"}\n')
    check_first_rows(FileSource(path=str(file), columns={"prompt": "question", "checks": "tests"}), ("prompt",))
    with pytest.raises(UserError, match=r"`columns` sets `promt`.*Did you mean `prompt`"):
        check_first_rows(FileSource(path=str(file), columns={"promt": "question"}), ("prompt",))


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt": "a", "answer": "b", "rating": 1}, "`columns: {completion: answer, label: rating}`"),
        ({"prompt": "a", "completion": "b", "source": "c"}, "`columns: {standard name: name in the file}`"),
        ({"conversations": [], "feedback": 1}, "`columns: {label: feedback}`"),
    ],
)
def test_only_columns_with_a_plausible_name_are_suggested(tmp_path: Path, row: dict[str, Any], advice: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError) as refused:
        check_first_rows(FileSource(path=str(file)), ("unpaired", "preference"))
    assert advice in str(refused.value)
    assert "source" not in str(refused.value).partition("Rename")[2].replace("another source", "")
