"""`align data show` and `align data stats`: what they print, against rows made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli import main

from .conftest import turn

CHATS = [
    {"messages": [turn("user", f"What is {n} plus one?"), turn("assistant", f"It is {n + 1}.")], "id": n}
    for n in range(6)
]
PAIRS = [
    {"prompt": "Name a colour.", "chosen": "A very dark blue.", "rejected": "Blue."},
    {"prompt": "Name an animal.", "chosen": "A cat.", "rejected": "A cat, or a dog, or a cow."},
    {"prompt": "Name a river.", "chosen": "The long Nile.", "rejected": "Nile."},
]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe whose model has not been made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    broken = {"messages": [turn("user", "no answer")], "id": 6}
    repeated = {**CHATS[0], "id": 7}
    _write("chats.jsonl", [*CHATS, broken, repeated])
    _write("pairs.jsonl", PAIRS)
    recipe = {
        "name": "look",
        "model": {"kind": "scratch", "preset": "tiny", "tokenizer": "tokenizer"},
        "stages": {
            "sft": {"kind": "sft", "batch_size": 2, "data": {"train": [{"path": "chats.jsonl"}]}},
            "sample": {"kind": "sample", "init_from": "sft", "train": [{"path": "pairs.jsonl"}]},
            "rm": {"kind": "reward_model", "init_from": "sft", "data": {"train": [{"path": "pairs.jsonl"}]}},
            "dpo": {"kind": "dpo", "init_from": "sft", "data": {"train": [{"path": "pairs.jsonl"}]}},
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return tmp_path


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["data", *arguments])
    return capsys.readouterr().out


def test_the_answer_is_marked_and_every_row_is_accounted_for(folder: Path, capsys: Any) -> None:
    out = _shown(capsys, "show", "recipe.yaml", "sft", "--rows", "7")
    assert "rows        8 read, 7 to train on" in out
    assert "dropped     1: no assistant turn" in out
    assert 'chats.jsonl line 7: {"messages": [{"role": "user", "content": "no answer"}]' in out
    assert "columns id (8 rows)" in out
    assert "1 rows equal an earlier row" in out
    assert "steps       4 optimizer steps" in out
    for n in range(6):
        assert f"What is {n} plus one?<|im_end|>\n<|im_start|>assistant\n⟦It is {n + 1}.<|im_end|>⟧" in out


def test_json_has_the_ids_and_labels_of_the_row(folder: Path, capsys: Any, tokenizer: Any) -> None:
    found = json.loads(_shown(capsys, "show", "recipe.yaml", "sft", "--row", "3", "--json"))
    (row,) = found["rows"]
    assert row["text"] == tokenizer.decode(row["input_ids"])
    kept = [token for token in row["labels"] if token != -100]
    answer = row["text"].rpartition("assistant\n")[2].removesuffix("\n")
    assert tokenizer.decode(kept) == answer
    assert found["report"]["dropped"] == {"no assistant turn": 1}
    assert sum(rows for *_, rows in found["report"]["lengths"]["bins"]) == found["report"]["rows_train"] == 7


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_pairs_show_the_bias_to_length(folder: Path, capsys: Any, tokenizer: Any, stage: str) -> None:
    report = json.loads(_shown(capsys, "stats", "recipe.yaml", stage, "--json"))
    assert report["rows"] == []
    lengths = [
        [len(tokenizer(pair[side], add_special_tokens=False)["input_ids"]) + 1 for side in ("chosen", "rejected")]
        for pair in PAIRS
    ]
    bias = report["report"]["length_bias"]
    assert bias["chosen_longer"] == pytest.approx(2 / 3)
    assert bias["rejected_longer"] == pytest.approx(1 / 3)
    assert bias["chosen_tokens"] == pytest.approx(sum(chosen for chosen, _ in lengths) / 3)
    assert bias["rejected_tokens"] == pytest.approx(sum(rejected for _, rejected in lengths) / 3)
    out = _shown(capsys, "show", "recipe.yaml", stage, "--rows", "3")
    assert "⟦A cat.<|im_end|>⟧" in out
    assert "⟦Blue.<|im_end|>⟧" in out


def test_prompts_are_shown_up_to_the_header_of_the_answer(folder: Path, capsys: Any) -> None:
    out = _shown(capsys, "show", "recipe.yaml", "sample", "--rows", "1")
    assert "3 to train on" in out
    assert out.rstrip().endswith("<|im_start|>assistant")
    assert "⟦" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "--row", "7"], "--row 7: the stage has 7 rows. Choose a smaller number."),
        (["sft", "--rows", "-1"], "--rows -1: must not be negative. Correct the option."),
        (["dpoo"], "the recipe has no stage 'dpoo'. Use one of sft, sample, rm, dpo."),
    ],
)
def test_wrong_arguments(folder: Path, capsys: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "show", "recipe.yaml", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_check_counts_the_rows_of_every_stage(folder: Path, capsys: Any) -> None:
    main(["check", "recipe.yaml", "--data"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "recipe.yaml: ok"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == ["sft", "sample", "rm", "dpo"]
    assert lines[1].startswith("  sft: 8 rows read: 7 training rows (")
    assert "1 dropped: no assistant turn" in lines[1]
    main(["check", "recipe.yaml", "--data", "stages.dpo.data.train=[{kind: stage, stage: sample}]"])
    assert "  dpo: its rows are made by stage 'sample', which has not been run" in capsys.readouterr().out


def test_what_libraries_print_is_not_in_the_json(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    from align.recipes import preview

    prepare = preview.prepare_stage

    def noisy(*args: Any, **options: Any) -> Any:
        print("[WARNING] a library")
        return prepare(*args, **options)

    monkeypatch.setattr(preview, "prepare_stage", noisy)
    assert json.loads(_shown(capsys, "stats", "recipe.yaml", "sft", "--json"))["rows"] == []
