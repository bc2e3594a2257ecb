"""Items of tasks that are planted in training data are found, and the scores without them are given."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from align.config.load import load_recipe
from align.data.filters.contamination import ItemIndex
from align.errors import UserError
from align.eval import Options, evaluate, evaluation
from align.eval.contamination import TrainingData
from tests.unit.eval.local_tasks import StandIn, make_tokenizer, save_checkpoint

WORDS = [start + vowel + end for start in "bcdfghjklm" for vowel in "aeio" for end in "nrst"]
PLANTED = range(0, 60, 3)
"""Every third of 60 items: 20."""


def sentence(seed: int, words: int = 24) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def reworded(text: str, seed: int) -> str:
    """The text with one word in twelve replaced."""
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), k=len(words) // 12):
        words[place] = "other"
    return " ".join(words)


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of 60 items, and a run whose training data has 20 of them: ten in rows of their own, the first of which
    has other words, and ten in one long row. Its held-out data has all 60."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "a")

    def open_model(checkpoint: Path, tokenizer: Any, engine: Any) -> StandIn:
        return StandIn(make_tokenizer(), engine.max_length)

    monkeypatch.setattr(evaluation, "open_model", open_model)
    items = [sentence(seed) for seed in range(60)]
    write(tmp_path / "items.jsonl", [{"q": item} for item in items])
    (tmp_path / "items.yaml").write_text(
        'name: items\ndata: items.jsonl\nprompt: "{{ q }}"\nverifier: {kind: regex, pattern: "e"}\nmax_new_tokens: 4\n'
    )
    planted = [items[i] for i in PLANTED]
    planted[0] = reworded(planted[0], 0)
    texts = [sentence(seed, 60) for seed in range(1000, 1100)] + planted[:10]
    texts.append(f"{sentence(2000, 300)} {' and '.join(planted[10:])} {sentence(2001, 300)}")
    write(tmp_path / "train.jsonl", [chat(text) for text in texts])
    write(tmp_path / "held.jsonl", [chat(item) for item in items])
    (tmp_path / "recipe.yaml").write_text(
        "name: t\nmodel: {kind: pretrained, path: a}\nstages:\n  sft:\n    kind: sft\n"
        "    data: {train: [{path: train.jsonl}], held_out: [{path: held.jsonl}]}\n"
    )
    (tmp_path / "run").mkdir()
    recipe = load_recipe("recipe.yaml").model_dump(mode="json")
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def test_twenty_planted_items_are_found(folder: Path) -> None:
    options = Options(dtype="float32", contamination=folder / "run")
    results = evaluate([folder / "a"], ["items.yaml"], out=folder / "o", options=options)
    found = results.content["contamination"]["tasks"]["items"]
    assert sorted(map(int, found["flagged"])) == list(PLANTED)
    assert results.content["contamination"]["rows"] == 111
    assert found["flagged"]["0"]["share"] < 1.0
    assert found["flagged"]["3"]["share"] == 1.0
    assert found["flagged"]["57"]["where"].startswith("sft: ")
    scores = {row["document"]: row["values"]["regex"] for row in results.verdicts("a", "items")}
    of_flagged = [value for document, value in scores.items() if int(document) in PLANTED]
    others = [value for document, value in scores.items() if int(document) not in PLANTED]
    parts = found["scores"]["a"]["regex"]
    assert (parts["all"]["n"], parts["clean"]["n"], parts["flagged"]["n"]) == (60, 40, 20)
    assert parts["clean"]["mean"] == pytest.approx(sum(others) / 40)
    assert parts["flagged"]["mean"] == pytest.approx(sum(of_flagged) / 20)
    assert any("20 of 60 documents are in the training data" in note for note in results.content["notes"])
    page = (folder / "o" / "report.html").read_text(encoding="utf-8")
    assert page.count("of its n-grams</h3>") == 20
    assert reworded(sentence(0), 0) in page  # the training text beside the item
    assert "<td>20 of 60</td>" in page


def test_a_file_may_be_named_instead_of_a_run(folder: Path) -> None:
    data = TrainingData.of(folder / "held.jsonl")
    assert [text.partition("\n")[0] for _, text in data.texts()] == [sentence(seed) for seed in range(60)]
    with pytest.raises(UserError, match="neither the folder of a run nor"):
        TrainingData.of(folder / "nothing")


def test_all_items_of_a_text_match() -> None:
    """`best_match` gives one; a long text may have several."""
    items = [sentence(1), sentence(2), sentence(3)]
    index = ItemIndex([*items, "two words"])
    found = index.matches(f"{items[2]} then {items[0]}", 0.9)
    assert sorted((match.item, match.share) for match in found) == [(0, 1.0), (2, 1.0)]
    assert index.short_items == [3]
