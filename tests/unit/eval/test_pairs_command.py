"""`align eval RM --pairs FILE`: scores equal those of transformers' own forward pass; files and output agree."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.cli import main
from align.config.parts import FileSource
from align.data.tokenizer import train_tokenizer
from align.eval.reward_model.score import read_preferences, score_answers, score_preferences
from align.models.hunyuan import HunYuanConfig, HunYuanForSequenceClassification
from align.reward.model import ModelScorer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "num_labels": 1,
    "max_position_embeddings": 96,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models, and pairs of two subsets: one too long for the models, and one that is not a pair."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = train_tokenizer(["the cat sat on the mat and ran to the house"] * 20, 300)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = HunYuanForSequenceClassification(HunYuanConfig(vocab_size=len(tokenizer), **SIZES))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows: list[dict[str, Any]] = [
        {"prompt": f"where is cat {n}?", "chosen": f"on mat {n}", "rejected": "the house " * (n % 3 + 1)}
        for n in range(12)
    ]
    for number, row in enumerate(rows):
        row |= {"kind": "even" if number % 2 == 0 else "odd", "chosen_first": number < 6}
    rows.append({"prompt": "why?", "chosen": "the cat sat on the mat " * 30, "rejected": "no", "kind": "odd"})
    rows.append({"prompt": "why?", "chosen": "same", "rejected": "same", "kind": "odd"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def test_scores_are_those_of_transformers(folder: Path) -> None:
    pairs, dropped = read_preferences(FileSource(path=str(folder / "pairs.jsonl")), subset="kind")
    assert (len(pairs), dropped) == (13, {"chosen equals rejected": 1})
    scorer = ModelScorer(folder / "one", "float32", 256)
    found = score_preferences(scorer, pairs)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "one", dtype=torch.float32).eval()
    for pair, scored in zip(pairs[:12], found[:12], strict=True):
        for (messages, text), score in zip(pair.sides, (scored.chosen, scored.rejected), strict=True):
            rendered = scorer.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": text}], tokenize=False
            )
            ids = scorer.tokenizer(rendered.rstrip("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert (found[12].chosen, found[12].margin) == (None, None)  # longer than the model's context
    assert found[0].subset == "even"
    assert (found[0].chosen_first, found[6].chosen_first, found[12].chosen_first) == (True, False, None)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_scores_do_not_depend_on_padding_packing_and_order(folder: Path, seed: int) -> None:
    """Random rows: alone, padded on the left and on the right in transformers' forward pass, and packed by
    `ModelScorer` in micro-batches of several sizes and orders."""
    draw = random.Random(seed)
    scorer = ModelScorer(folder / "one", "float32", draw.choice([40, 100, 400]))
    vocabulary = range(3, scorer.model.config.vocab_size)
    sides = [
        (draw.choices(vocabulary, k=draw.randint(1, 40)), draw.choices(vocabulary, k=length))
        for length in draw.sample(range(1, 50), draw.randint(2, 9))
    ]
    rows = [prompt + answer for prompt, answer in sides]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "one", dtype=torch.float32).eval()
    model.config.pad_token_id = pad = scorer.tokenizer.pad_token_id
    alone = [model(torch.tensor([row])).logits.item() for row in rows]
    assert max(alone) - min(alone) > 1e-3
    order = draw.sample(range(len(rows)), len(rows))
    packed = score_answers(scorer, [sides[i] for i in order])
    assert packed == pytest.approx([alone[i] for i in order], abs=1e-5)
    longest = max(map(len, rows))
    for left in (True, False):
        empty = [[pad] * (longest - len(row)) for row in rows]
        ids = [gap + row if left else row + gap for gap, row in zip(empty, rows, strict=True)]
        mask = [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for g, r in zip(empty, rows)]
        padded = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0].tolist()
        assert padded == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_that_scores_length_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer with "yes" is right; it is the longer one in half of the pairs. An honest model finds the word."""
    rows = []
    for n in range(60):
        long = " the cat sat on the mat" * (1 + n % 3)
        chosen, rejected = (f"yes{long}", "no") if n % 2 else ("yes", f"no{long}")
        rows.append({"prompt": f"is it cat {n}?", "chosen": chosen, "rejected": rejected})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yes = train_tokenizer(["the cat sat on the mat and ran to the house"] * 20, 300)("yes")["input_ids"]
    models: dict[str, Callable[[list[int]], float]] = {
        "length": lambda answer: float(len(answer)),
        "honest": lambda answer: float(answer[: len(yes)] == yes),
    }
    said = {}
    for name, score in models.items():
        scores = partial(lambda score, scorer, encoded: [score(answer) for _, answer in encoded], score)
        monkeypatch.setattr("align.eval.reward_model.score.score_answers", scores)
        out = tmp_path / name
        main(["eval", str(folder / "one"), "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out)])
        said[name] = capsys.readouterr().out
        bias = json.loads((out / "pairs.json").read_text())["models"]["one"]["length_bias"]
        assert bias["labels"]["mean"] == 0.5
        assert (bias["extra"]["low"] > 0) == (name == "length")
        assert bias["wrong"]["mean"] == float(name == "honest")  # where the shorter completion is right
    assert "LENGTH BIAS: the model prefers the longer completion in 100 " in said["length"]
    assert "BIAS" not in said["honest"]


def test_the_command_writes_what_it_prints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    models = [str(folder / name) for name in ("one", "two")]
    main(["eval", *models, "--pairs", str(folder / "pairs.jsonl"), "--subset", "kind", "--out", str(out)])
    said = capsys.readouterr().out
    content = json.loads((out / "pairs.json").read_text())
    *lines, page_line = said.strip().split("\n")
    assert content["lines"] == lines[-len(content["lines"]) :]
    assert page_line == str(out / "pairs.html")
    assert (content["pairs"], content["dropped"]) == (13, {"chosen equals rejected": 1})
    one = content["models"]["one"]
    rows = [json.loads(line) for line in (out / "one" / "pairs.jsonl").read_text().splitlines()]
    right = [float(row["chosen"] > row["rejected"]) for row in rows if row["chosen"] is not None]
    assert one["accuracy"]["mean"] == pytest.approx(sum(right) / 12)
    assert (one["accuracy"]["n"], one["accuracy"]["unscored"]) == (12, 1)
    assert list(one["subsets"]) == ["even", "odd"]
    assert one["position_bias"]["n"] == 12
    assert list(content["agreement"]) == ["one two"]
    assert "one and two prefer the same completion in" in (out / "pairs.md").read_text()
    page = (out / "pairs.html").read_text()
    assert "Agreement" in page
    assert "the mat" in page or "on mat" in page
    main(["compare", str(out), "--json"])  # reads the scores, and computes the same statistics
    compared = json.loads(capsys.readouterr().out)
    cells = {row["metric"]: row["sides"] for row in compared["metrics"]}
    figures = {row["label"]: row["sides"] for row in compared["figures"]}
    for name in ("one", "two"):
        of_model = content["models"][name]
        assert cells["accuracy"][name] == of_model["accuracy"]
        assert cells["accuracy/odd"][name] == of_model["subsets"]["odd"]
        assert cells["log_loss"][name]["mean"] == pytest.approx(of_model["calibration"]["log_loss"])
        for words, key in (("the longer completion", "length_bias"), ("the completion shown first", "position_bias")):
            extra = of_model[key]["extra"]
            assert figures[f"Prefers {words}: model minus labels"][name] == {
                k: extra[k] for k in ("mean", "low", "high")
            }


def test_a_limit_draws_pairs(folder: Path) -> None:
    source = FileSource(path=str(folder / "pairs.jsonl"))
    drawn = [{pair.row for pair in read_preferences(source, limit=5, seed=seed)[0]} for seed in (0, 0, 1)]
    assert [len(rows) for rows in drawn] == [5, 5, 5]
    assert drawn[0] == drawn[1] != drawn[2]
