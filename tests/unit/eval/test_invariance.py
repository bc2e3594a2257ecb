"""Verdicts and log-probabilities do not depend on the batch size and on the order of the documents."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from align.eval import Options, evaluate
from align.eval.evaluation import records_of
from align.eval.model import Pair, Request
from align.rollout.hf_requests import HuggingFaceModel
from align.train.checkpoint import load_policy
from tests.unit.eval.local_tasks import WORDS, make_tokenizer, save_checkpoint

TOLERANCE = 1e-5
TASKS = {
    "letters": 'prompt: "{{ q }}"\nchoices: [" a", " the", " on"]\nanswer: "{{ right }}"\n',
    "choices": 'prompt: "{{ q }}"\nchoices: options\nanswer: "{{ right }}"\n',
    "words": "prompt: '{{ q }}'\nverifier: {kind: regex, pattern: '[aeiou]'}\nstop: ['e']\nmax_new_tokens: 8\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance")
    save_checkpoint(folder / "a")
    return folder


def words(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


@pytest.mark.parametrize("seed", range(3))
def test_results_of_requests_do_not_depend_on_their_batch(folder: Path, seed: int) -> None:
    """Random requests and pairs, one at a time in order, and in batches of several sizes in other orders."""
    draw = random.Random(seed)
    tokenizer, policy = make_tokenizer(), load_policy(folder / "a", "float32", frozen=True)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(tokenizer(words(draw, most))["input_ids"])

    requests = [
        Request(ids(25), draw.randint(1, 8), draw.choice([0.0, 0.7, 1.0]), draw.choice([0.9, 1.0]), seed=n)
        for n in range(12)
    ]
    pairs = [Pair(ids(25), ids(4)) for _ in range(12)]
    pairs += [Pair(pairs[0].prefix_ids, (token,)) for token in (3, 40, 200)]

    def run(size: int) -> tuple[dict[Request, Any], dict[Pair, Any]]:
        model = HuggingFaceModel(policy, tokenizer, max_length=500, batch_size=size)
        texts, scored = (draw.sample(items, len(items)) if size > 1 else items for items in (requests, pairs))
        return (
            {texts[i]: found for i, found in model.generate(texts)},
            {scored[i]: found for i, found in model.score(scored)},
        )

    expected_texts, expected_scores = run(1)
    for size in (2, 5, 64):
        texts, scores = run(size)
        assert texts == expected_texts
        for pair, found in scores.items():
            assert found.logprobs == pytest.approx(expected_scores[pair].logprobs, abs=TOLERANCE)
            assert found.greedy == expected_scores[pair].greedy


def test_verdicts_of_documents_do_not_depend_on_their_order(folder: Path, tmp_path: Path) -> None:
    """`evaluate` on the same rows in several orders, with several batch sizes: by question, the same verdict and the
    same log-probabilities."""
    draw = random.Random(0)
    rows = [
        {"q": f"{words(draw, 12)} {n}", "options": [f" {words(draw, 3)}" for _ in range(3)], "right": n % 3}
        for n in range(12)
    ]
    found = []
    for number, size in enumerate((1, 3, 64)):
        place = tmp_path / str(number)
        place.mkdir()
        ordered = draw.sample(rows, len(rows)) if number else rows
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
        for name, text in TASKS.items():
            (place / f"{name}.yaml").write_text(f"name: {name}\ndata: rows.jsonl\n{text}")
        options = Options(backend="hf", dtype="float32", batch_size=size)
        tasks = [str(place / f"{name}.yaml") for name in (reversed(TASKS) if number else TASKS)]
        results = evaluate([folder / "a"], tasks, out=place / "out", options=options)
        question = [row["q"] for row in ordered]
        verdicts = {
            (row["task"], question[int(row["document"])]): (row["values"], row["shown"].get("answer"))
            for row in results.all_verdicts("a")
        }
        logprobs = {
            (record.task, question[int(record.document)], record.place.number): record.logprobs
            for record in records_of(results, "a")
        }
        found.append((verdicts, logprobs))
    assert len(found[0][0]) == 36
    assert len({str(values) for values in found[0][0].values()}) > 3
    for verdicts, logprobs in found[1:]:
        assert verdicts == found[0][0]
        assert logprobs.keys() == found[0][1].keys()
        for key, values in logprobs.items():
            assert values == pytest.approx(found[0][1][key], abs=TOLERANCE)
