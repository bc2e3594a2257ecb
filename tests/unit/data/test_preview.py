"""The output of `align data show` and `align data stats`, against rows made by hand."""

from __future__ import annotations

import json
import re
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


def test_names_that_never_occur_are_listed(folder: Path, capsys: Any) -> None:
    source = "{path: chats.jsonl, ignore: [id, toolz], roles: {user: user, Docter: assistant}}"
    settings = f"stages.sft.data.train=[{source}]"
    out = _shown(capsys, "stats", "recipe.yaml", "sft", settings)
    assert "unmatched   ignore: toolz (chats.jsonl): none of 8 rows has it" in out
    assert "unmatched   roles: Docter (chats.jsonl): none of 8 rows has it" in out
    assert out.count("unmatched") == 2
    main(["check", "recipe.yaml", "--data", settings])
    assert "ignore: toolz (chats.jsonl): no row has it" in capsys.readouterr().out


def test_roles_are_found_in_renamed_columns_and_json_text(folder: Path, capsys: Any) -> None:
    talk = json.dumps([{"role": "Doctor", "content": "Breathe."}, {"role": "Patient", "content": "I do."}])
    _write("talks.jsonl", [{"talk": talk}])
    source = "{path: talks.jsonl, columns: {messages: talk}, roles: {Doctor: user, Patient: assistant, Nurse: user}}"
    out = _shown(capsys, "stats", "recipe.yaml", "sft", f"stages.sft.data.train=[{source}]")
    assert "1 to train on" in out
    assert out.count("unmatched") == 1
    assert "roles: Nurse" in out


def test_items_that_the_filter_cannot_find_are_counted(folder: Path, capsys: Any) -> None:
    _write("bench.jsonl", [{"question": "Two words"}, {"question": "What is the name of the longest river?"}])
    filters = "stages.sft.data.filters=[{kind: contamination, against: [{name: rivers, path: bench.jsonl}]}]"
    out = _shown(capsys, "stats", "recipe.yaml", "sft", filters)
    assert "too short   1 items of rivers have too few words to be found" in out


def test_a_stream_shows_the_counts_of_its_first_rows(folder: Path, capsys: Any) -> None:
    overrides = ["stages.sft.data.train=[{path: chats.jsonl, streaming: true}]", "stages.sft.max_steps=5"]
    report = json.loads(_shown(capsys, "stats", "recipe.yaml", "sft", *overrides, "--json"))["report"]
    assert report["streams"] is True
    assert (report["rows_read"], report["rows_train"]) == (8, 7)
    assert report["dropped"] == {"no assistant turn": 1}
    out = _shown(capsys, "show", "recipe.yaml", "sft", *overrides)
    assert "rows        the first rows of a stream: 8 read, 7 to train on" in out
    assert out.count("⟦") == 3


def test_the_two_ranges_of_held_out_rows_of_a_stream_are_told_apart(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.recipes import preview

    monkeypatch.setattr(preview, "STREAMED", 10)
    _write("many.jsonl", [{"prompt": f"Question {n}", "completion": f"Answer {n}"} for n in range(600)])
    changes = ["stages.sft.data.train=[{path: many.jsonl, streaming: true}]", "stages.sft.max_steps=5"]
    out = _shown(capsys, "stats", "recipe.yaml", "sft", *changes, "stages.sft.data.held_out_fraction=0.2")
    found = re.search(
        r"stream: (\d+) read, (\d+) to train on, (\d+) held out\n +evaluated: (\d+) .* first 600 rows", out
    )
    assert found is not None, out
    read, train, held_out, evaluated = map(int, found.groups())
    assert read == train + held_out == 256  # one batch
    assert held_out < evaluated < 200


def test_the_prompts_and_pairs_of_an_evaluation_are_counted(folder: Path, capsys: Any) -> None:
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    sources = {"prompts": [{"path": "pairs.jsonl"}], "preferences": [{"path": "pairs.jsonl"}]}
    recipe["stages"]["compare"] = {"kind": "evaluate", "models": ["sft"], **sources}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    out = _shown(capsys, "show", "recipe.yaml", "compare")
    assert "rows        3 read, 3 to evaluate" in out
    assert "Name a river." in out
    main(["check", "recipe.yaml", "--data"])
    out = capsys.readouterr().out
    assert "  compare: 3 rows read: 3 prompts" in out
    assert "  compare: preferences: 3 rows read: 3 pairs" in out


def test_the_time_of_a_stage_is_estimated(folder: Path, capsys: Any) -> None:
    out = _shown(capsys, "stats", "recipe.yaml", "sft", "stages.sft.data.max_length=256")
    assert re.search(r"^time        under a second as a lower bound: .* operations in the matrices", out, re.MULTILINE)
    time = json.loads(_shown(capsys, "stats", "recipe.yaml", "dpo", "stages.dpo.data.max_length=256", "--json"))[
        "report"
    ]["time"]
    assert time["kind"] == "lower bound"
    assert time["seconds"] > 0
    assert "time  " not in _shown(capsys, "stats", "recipe.yaml", "sample")


def test_files_that_are_not_read_are_named(folder: Path, capsys: Any) -> None:
    Path("rows").mkdir()
    Path("chats.jsonl").rename("rows/train.jsonl")
    for name in ("test.jsonl", "notes.txt", "LICENSE"):
        Path("rows", name).write_text("{}")
    settings = "stages.sft.data.train=[{path: rows, split: train}]"
    out = _shown(capsys, "stats", "recipe.yaml", "sft", settings)
    assert "not read    3 files in rows: LICENSE, notes.txt, test.jsonl" in out
