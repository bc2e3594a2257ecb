"""Rows of KTO: tokenised completions with a label, counted by hand, and what `align data` prints of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli import main
from align.config.stages import KtoStage
from align.data import prepare
from align.data.balance import require_both_labels, weight_note
from align.errors import UserError

TURNS = 20
"""Tokens of `<|im_start|>user\\na<|im_end|>\\n<|im_start|>assistant\\n`, as counted in test_chat."""
U = {"role": "user", "content": "a"}


def stage(path: str = "rows.jsonl", **settings: Any) -> KtoStage:
    data = {"train": [{"path": path}], "max_length": settings.pop("max_length", 2048)}
    return KtoStage.model_validate({"kind": "kto", "data": data | settings.pop("data", {}), **settings})


def row(completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": "a", "completion": completion, "label": label}


def found(path: str, tokenizer: Any, **settings: Any) -> list[tuple[str, str, int]]:
    """(prompt, completion, label) of each token row, sorted."""
    made = prepare.prepare_stage(stage(path, **settings), tokenizer, seed=0)
    return sorted(
        (tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["completion_ids"]), *row["label"])
        for row in made.train
    )


def test_tokens_by_hand(tokenizer: Any, jsonl: Any) -> None:
    made = prepare.prepare_stage(stage(jsonl([row("bc", True), row("d", 0)])), tokenizer, seed=0)
    good, bad = sorted(made.train, key=lambda row: row["label"], reverse=True)
    end = tokenizer.eos_token_id
    b, c, d = tokenizer("bcd")["input_ids"]
    assert len(good["prompt_ids"]) == TURNS
    assert good["completion_ids"] == good["completion_labels"] == [b, c, end]
    assert bad["completion_ids"] == [d, end]
    assert (good["label"], bad["label"]) == ([1], [0])
    report = made.report
    assert (report.tokens, report.loss_tokens, report.desirable, report.undesirable) == (2 * TURNS + 5, 5, 1, 1)


def test_a_pair_is_two_rows(tokenizer: Any, jsonl: Any) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_finished": False}
    labelled = [row("b", True), row("c", False)]
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert found(jsonl([pair]), tokenizer) == [(prompt, "b<|im_end|>", 1), (prompt, "c", 0)]
    assert found(jsonl(labelled), tokenizer) == [(prompt, "b<|im_end|>", 1), (prompt, "c<|im_end|>", 0)]
    made = prepare.prepare_stage(stage(jsonl([pair, *labelled])), tokenizer, seed=0)
    assert (made.report.rows_read, made.report.rows_train, made.report.split) == (3, 4, 1)
    assert "1 pairs trained as two rows each" in made.report.summary()


def test_a_pair_is_never_split_between_training_and_held_out_rows(tokenizer: Any, jsonl: Any) -> None:
    pairs = [{"prompt": f"a{n}", "chosen": "b", "rejected": "c"} for n in range(40)]
    made = prepare.prepare_stage(stage(jsonl(pairs), data={"held_out_fraction": 0.3}), tokenizer, seed=0)
    sides = [{tuple(row["prompt_ids"]) for row in rows} for rows in (made.train, made.held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert made.report.desirable == made.report.undesirable == len(sides[0])


def test_only_assistant_tokens_of_a_completion_are_in_the_loss(tokenizer: Any, jsonl: Any) -> None:
    turns = [{"role": "assistant", "content": "b"}, U, {"role": "assistant", "content": "c"}]
    path = jsonl([{"prompt": [U], "completion": turns, "label": True}, row("d", False)])
    made = prepare.prepare_stage(stage(path), tokenizer, seed=0)
    long = next(row for row in made.train if row["label"] == [1])
    kept = [label for label in long["completion_labels"] if label != -100]
    assert tokenizer.decode(kept) == "b<|im_end|>c<|im_end|>"


def test_reasons_of_dropped_rows(tokenizer: Any, jsonl: Any) -> None:
    rows: list[dict[str, Any]] = [
        row("b", True),
        row("c", False),
        row("x" * 30, True),
        {"prompt": "a", "completion": "b"},
        {"messages": [U, {"role": "assistant", "content": "b"}], "label": None},
        row("d", "good"),
        row("d", -1),
        {"prompt": "a", "chosen": "b", "rejected": "x" * 30},
        {"prompt": "a", "label": True},
        {**row("d", True), "kto_tag": 0},
        {**row("x", "1.0"), "kto_tag": True},
        row("y", "0.0"),
    ]
    report = prepare.prepare_stage(stage(jsonl(rows), max_length=40), tokenizer, seed=0).report
    assert report.dropped == {
        "longer than max_length": 2,
        "no label": 2,
        "label is not true or false": 2,
        "columns of no known shape (label, prompt)": 1,
        "label and kto_tag contradict each other": 1,
    }
    assert (report.rows_read, report.rows_train, report.desirable) == (12, 4, 2)


@pytest.mark.parametrize("settings", [{}, {"near": 0.5}, {"part": "answer"}])
def test_rows_with_different_labels_are_no_duplicates(settings: dict[str, Any], tokenizer: Any, jsonl: Any) -> None:
    text = "one two three four five"
    rows = [row(text, True), row(text, False), row(text, 1), row(f"{text} six", False)]
    filters = [{"kind": "duplicates", **settings}]
    made = prepare.prepare_stage(stage(jsonl(rows), data={"filters": filters}), tokenizer, seed=0)
    repeated = 2 if settings.get("near") else 1
    assert made.report.dropped == {"filter: repeats an earlier row": repeated}
    assert (made.report.desirable, made.report.undesirable) == (1, 3 - repeated)


def test_what_to_do_if_every_row_is_dropped(tokenizer: Any, jsonl: Any) -> None:
    rows = [row("bbbbb", "good"), {**row("ccccc", None), "kto_tag": "bad"}, row("x" * 30, True), row("d", True)]
    path = jsonl([*rows, {**row("ddddd", True), "kto_tag": 0}])
    filters = [{"kind": "length", "min_chars": 5, "part": "answer"}, {"kind": "garbled"}]
    with pytest.raises(UserError) as error:
        prepare.prepare_stage(stage(path, max_length=40, data={"filters": filters}), tokenizer, seed=0)
    for advice in (
        f"Set the label to true, false, 1 or 0; {path} line 1 has label 'good'.",
        "Raise data.max_length.",
        f"Relax or remove filters in data.filters (length, garbled); the first dropped row is {path} line 4.",
        f"Correct the rows; the first is {path} line 5.",
    ):
        assert advice in str(error.value)
    with pytest.raises(UserError, match="the only row was dropped"):
        prepare.prepare_stage(stage(jsonl([row("b", "good")])), tokenizer, seed=0)


def test_another_label_is_another_row(tokenizer: Any, jsonl: Any) -> None:
    """The fingerprint, which decides whether data have changed, depends on the labels."""
    made = [
        prepare.prepare_stage(stage(jsonl([row("b", label), row("c", not label)])), tokenizer, seed=0)
        for label in (True, False)
    ]
    assert made[0].report.fingerprint != made[1].report.fingerprint


# --- balance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights", "note"),
    [
        (50, 50, {}, None),
        (40, 30, {}, None),  # 4 / 3
        (30, 40, {"undesirable_weight": 0.75}, None),
        (30, 40, {"undesirable_weight": 0}, "^undesirable_weight is 0, so 40 undesirable rows train nothing$"),
        (1, 40, {"desirable_weight": 0}, "^desirable_weight is 0, so 1 desirable row trains nothing$"),
        (30, 0, {"undesirable_weight": 0}, None),
        (
            1,
            9999,
            {},
            "0.0001 times .* to 9999 to 13332, or undesirable_weight to 0.0000751 to 0.0001$",
        ),
        (13334, 10000, {}, "1.34 times"),
        (80, 20, {}, "have 4 times .* desirable_weight to 0.25 to 0.333, or undesirable_weight to 3 to 4$"),
        (20, 80, {}, "0.25 times .* desirable_weight to 4 to 5.33, or undesirable_weight to 0.188 to 0.25$"),
        (20, 80, {"desirable_weight": 2}, "0.5 times .* to 4 to 5.33, or undesirable_weight to 0.375 to 0.5$"),
    ],
)
def test_weights_that_balance(desirable: int, undesirable: int, weights: dict[str, float], note: str | None) -> None:
    said = weight_note(stage(**weights), desirable, undesirable)
    if note is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(note, said), said


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("counts", [(1, 1333), (3, 1), (1, 3), (7, 9973), (9973, 7), (1, 10**7), (10**7, 1), (17, 11)])
def test_advised_weights_are_accepted(counts: tuple[int, int], weight: float) -> None:
    """Both ends of both ranges, as they are printed, give no note."""
    weights = {"desirable_weight": weight, "undesirable_weight": weight}
    said = weight_note(stage(**weights), *counts)
    assert said is not None
    assert "e+" not in said
    assert "e-" not in said
    advice = re.findall(r"((?:un)?desirable_weight) to ([\d.]+) to ([\d.]+)", said)
    assert [name for name, *_ in advice] == ["desirable_weight", "undesirable_weight"]
    for name, *ends in advice:
        for end in ends:
            assert weight_note(stage(**(weights | {name: float(end)})), *counts) is None, (name, end)


def test_the_notes_of_one_prompt_and_of_held_out_rows(tokenizer: Any, jsonl: Any) -> None:
    def notes(rows: list[dict[str, Any]], held_out: list[dict[str, Any]], **settings: Any) -> tuple[str, ...]:
        data = {"held_out": [{"path": jsonl(held_out, "held_out.jsonl")}]}
        made = prepare.prepare_stage(stage(jsonl(rows), data=data, **settings), tokenizer, seed=0)
        return made.report.notes

    both, other = [row("b", True), row("c", False)], {"prompt": "d", "completion": "b", "label": True}
    (one,) = notes(both, both)
    assert one.startswith("all rows have the same prompt, so the estimate of the KL")
    assert notes(both, both, loss_type="apo_zero_unpaired") == ()
    assert notes([*both, other, {**other, "label": False}], both) == ()
    (_, held) = notes(both, [row("c", 0)])
    assert held.startswith("all held-out rows are undesirable, so the eval_ metrics of desirable completions and")


def test_one_label_needs_the_weight_of_the_other_to_be_zero() -> None:
    require_both_labels(stage(undesirable_weight=0), 5, 0)
    require_both_labels(stage(desirable_weight=0), 0, 5)
    with pytest.raises(UserError, match="all 5 rows are undesirable"):
        require_both_labels(stage(undesirable_weight=0), 0, 5)
    with pytest.raises(UserError, match="the only row is desirable"):
        require_both_labels(stage(), 1, 0)


# --- align data -------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"What is {n}?", "completion": "b" * (n + 1), "label": n != 2} for n in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "name": "look",
        "model": {"kind": "scratch", "preset": "tiny", "tokenizer": "tokenizer"},
        "stages": {"kto": {"kind": "kto", "data": {"train": [{"path": "rows.jsonl"}]}}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return "recipe.yaml"


def test_rows_are_shown_with_their_labels(recipe: str, capsys: Any, tokenizer: Any) -> None:
    main(["data", "show", recipe, "kto", "--rows", "4"])
    out = capsys.readouterr().out
    assert "labels      3 desirable, 1 undesirable" in out
    assert "note        desirable rows have 3 times the weight" in out
    # One, two and four characters, and three; each with an end of turn.
    assert "answers     mean 3 tokens if desirable, 4 if undesirable" in out
    assert "undesirable (4 tokens)\n⟦bbb<|im_end|>⟧" in out
    assert "desirable (5 tokens)\n⟦bbbb<|im_end|>⟧" in out
    main(["data", "show", recipe, "kto", "--rows", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    report = found["report"]
    assert (report["desirable"], report["undesirable"]) == (3, 1)
    tokens = {"desirable_tokens": pytest.approx(10 / 3), "undesirable_tokens": 4.0}
    assert report["labels"] == {**tokens, "contradictory": 0}
    sides = [next(side for side in row if side != "prompt") for row in found["rows"]]
    assert sorted(sides) == ["desirable"] * 3 + ["undesirable"]
    for row in found["rows"]:
        (side,) = (row[name] for name in row if name != "prompt")
        assert side["labels"] == side["input_ids"]
        assert tokenizer.decode(side["input_ids"]) == side["text"]
    lengths = [len(row["prompt"]["input_ids"]) + len(row[s]["input_ids"]) for row, s in zip(found["rows"], sides)]
    assert report["lengths"]["mean"] == pytest.approx(sum(lengths) / 4)


def test_rows_with_both_labels_are_counted(recipe: str, capsys: Any) -> None:
    """Three rows have one prompt and completion; the fourth shares only the prompt, the fifth only the completion."""
    found = [("a", "b", True), ("a", "b", False), ("a", "b", True), ("a", "c", True), ("d", "b", False)]
    rows = [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in found]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(["data", "stats", recipe, "kto"])
    assert "            3 rows occur with both labels\n" in capsys.readouterr().out


def test_check_prints_the_labels(recipe: str, capsys: Any) -> None:
    main(["check", recipe, "--data"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith("  kto: 4 rows read: 4 training rows (3 desirable, 1 undesirable; ")
    assert "set desirable_weight to 0.334 to 0.444, or undesirable_weight to 2.25 to 3" in line


def test_a_label_without_rows_has_no_mean_length(recipe: str, capsys: Any) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": "bc", "label": True} for n in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    values["stages"]["kto"]["undesirable_weight"] = 0.0
    Path(recipe).write_text(yaml.safe_dump(values), encoding="utf-8")
    main(["data", "stats", recipe, "kto"])
    assert "answers     mean 3 tokens if desirable\n" in capsys.readouterr().out
