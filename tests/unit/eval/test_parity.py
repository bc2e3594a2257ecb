"""vLLM, transformers and the harness's own HFLM give the same verdict for every sample, one engine for the module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.eval import Options, evaluate
from align.eval.model import Pair, Request
from align.eval.opening import Engine, open_model
from align.eval.records import RecordStore
from align.train.checkpoint import load_policy, load_tokenizer
from tests.unit.eval.local_tasks import TASKS, save_checkpoint, write_tasks

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 2e-4
"""Largest difference of a target's log-probability, a sum over up to three tokens, in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    save_checkpoint(folder / "a")
    save_checkpoint(folder / "b", seed=1)
    files = write_tasks(folder / "tasks")
    for backend in ("vllm", "hf"):
        options = Options(backend=backend, dtype="float32", batch_size=8, cache_gib=0.1)
        evaluate([folder / "a", folder / "b"], files, out=folder / backend, options=options)
    return folder


def scores(folder: Path, model: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / model / "scores.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["a", "b"])
def test_both_engines_give_the_same_verdicts_and_texts(folder: Path, model: str) -> None:
    """`b` is sampled after its weights replaced those of `a` in the running vLLM engine."""
    ours, theirs = (scores(folder / backend, model) for backend in ("vllm", "hf"))
    assert len(ours) == 16 * len(TASKS)
    for one, other in zip(ours, theirs, strict=True):
        assert (one["task"], one["document"], one["values"]) == (other["task"], other["document"], other["values"])
        assert one["shown"].get("answer") == other["shown"].get("answer")
    records = [list(RecordStore(folder / backend / model / "records.jsonl")) for backend in ("vllm", "hf")]
    theirs = {(record.task, record.place): record for record in records[1]}
    for record in records[0]:
        other = theirs[record.task, record.place]
        assert (record.status, record.prompt_hash, record.greedy) == (other.status, other.prompt_hash, other.greedy)
        assert record.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
    assert {record.status for record in records[0]} == {"finished", "truncated", "scored"}


def test_the_two_checkpoints_differ(folder: Path) -> None:
    assert [row["values"] for row in scores(folder / "vllm", "a")] != [
        row["values"] for row in scores(folder / "vllm", "b")
    ]


def test_verdicts_equal_those_of_the_harness(folder: Path) -> None:
    """`simple_evaluate` with HFLM and the same tasks: the same value of every metric of every document."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = load_policy(folder / "a", "float32", frozen=True)
    tokenizer = load_tokenizer(folder / "a")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=510)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    ours = {(row["task"], row["document"]): row for row in scores(folder / "vllm", "a")}
    compared = 0
    for task, samples in found["samples"].items():
        for sample in samples:
            row = ours[task, str(sample["doc_id"])]
            for metric in sample["metrics"]:
                label = metric if sample["filter"] == "none" else f"{metric} ({sample['filter']})"
                if label in row["values"]:
                    assert row["values"][label] == float(sample[metric]), (task, sample["doc_id"], label)
                    compared += 1
    assert compared == 16 * (2 + 2 + 2 + 2 + 1)
    results = json.loads((folder / "vllm" / "results.json").read_text())["models"]["a"]["tasks"]
    for task, metrics in results.items():
        for label, metric in metrics["metrics"].items():
            name, _, part = label.partition(" ")
            theirs = found["results"][task][f"{name},{part.strip('()') or 'none'}"]
            assert metric["mean"] == pytest.approx(theirs, rel=1e-4), (task, label)


def test_log_probabilities_equal_the_models(folder: Path) -> None:
    """A witness without the encoder and the engines: log_softmax of one forward pass for each pair."""
    model = load_policy(folder / "a", "float32", frozen=True)
    tokenizer = load_tokenizer(folder / "a")
    ids = tokenizer("the cat sat on a mat and the dog ran to the old red house").input_ids
    pairs = [Pair(tuple(ids[:n]), tuple(ids[n : n + k])) for n, k in [(1, 1), (1, 9), (5, 1), (7, 3), (4, 2)]]
    pairs += [Pair(tuple(ids[:5]), (token,)) for token in (3, 40, 200)]
    expected, greedy = [], []
    for pair in pairs:
        logits = model(torch.tensor([[*pair.prefix_ids, *pair.target_ids]])).logits[0]
        logprobs = logits[len(pair.prefix_ids) - 1 : -1].log_softmax(-1)
        target = torch.tensor(pair.target_ids)
        expected.append(logprobs.gather(1, target[:, None])[:, 0].tolist())
        greedy.append(bool((logprobs.argmax(-1) == target).all()))
    for backend in ("vllm", "hf"):
        opened = open_model(folder / "a", tokenizer, Engine(backend, "float32", 100, 8, 0.1))
        found = dict(opened.score(pairs))
        requests = [
            Request(tuple(ids[:5]), 12, stop=stop, stop_token_ids=(tokenizer.eos_token_id,), temperature=t, seed=s)
            for stop in ((), (" ",), ("e", "a"))
            for t, s in ((0.0, 0), (1.0, 1), (1.0, 2), (1.0, 1))
        ]
        made = dict(opened.generate(requests))
        opened.close()
        assert [found[i].greedy for i in range(len(pairs))] == greedy
        for i, values in enumerate(expected):
            assert found[i].logprobs == pytest.approx(values, abs=TOLERANCE)
        for i, request in enumerate(requests):
            assert not any(stop in made[i].text for stop in request.stop)
            assert len(made[i].token_ids) <= 12
            assert made[i].finished or len(made[i].token_ids) == 12
        assert made[1] == made[3]
        assert made[1].token_ids != made[2].token_ids
