"""Each kind of reward, their weighted sum, and the metrics of each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForSequenceClassification

from align.config.parts import Data, FileSource
from align.config.rewards import ModelReward, Rewards
from align.data.chat import encode_prompt, stop_token_ids
from align.data.experience import Experience, build_experience
from align.data.prepare import PromptRow, prepare_reward_pairs
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForSequenceClassification
from align.reward import json_http, remote
from align.reward.mixture import Scorer
from align.reward.model import ModelScorer
from align.reward.moments import Moments
from align.reward.serve import build_server
from align.rollout.base import Completion

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_labels": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
}
QUESTIONS = ["What is 2 + 3?", "What is 7?", "And 20 + 22?", "Half of 5?"]
ANSWERS = ["#### 5", "7", "42 apples", "2.5"]
TEXTS = ["It is 5", "It is 8, I think.", "\\boxed{42}", "so"]
FINISHED = [True, True, True, False]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer without merges, so that every text has exactly one encoding."""
    return train_tokenizer(["a"], 259)


@pytest.fixture(scope="module")
def other_tokenizer() -> Any:
    return train_tokenizer(["What is it? It is this or that. I think so."] * 9, 300)


def save_reward_model(folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    HunYuanForSequenceClassification(HunYuanConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model", tokenizer)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, other_tokenizer) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("other") / "model", other_tokenizer)


@pytest.fixture(scope="module")
def scored_batch(tokenizer) -> tuple[Experience, list[PromptRow], list[Completion]]:
    """Arguments of `Scorer.score`: batch, prompt rows and completions."""
    (end,) = stop_token_ids(tokenizer)
    rows, completions = [], []
    for question, answer, text, done in zip(QUESTIONS, ANSWERS, TEXTS, FINISHED, strict=True):
        messages = [{"role": "user", "content": question}]
        prompt = encode_prompt(tokenizer, messages)
        ids = tokenizer(text)["input_ids"] + ([end] if done else [])
        rows.append(PromptRow(tuple(prompt), messages, "a reference", {"prompt": question, "answer": answer}))
        completions.append(Completion(list(prompt), ids, [0.0] * len(ids), done, 0))
    batch = build_experience(
        [c.prompt_ids for c in completions], [c.token_ids for c in completions], [c.logprobs for c in completions]
    )
    return batch, rows, completions


class Scorers:
    """Makes scorers that are closed after the test, and collects their messages."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.scorers, self.messages = tokenizer, [], []

    def __call__(self, *rewards: dict, **options: Any) -> Scorer:
        parsed = TypeAdapter(Rewards).validate_python(list(rewards))
        names = {reward.init_from for reward in parsed if isinstance(reward, ModelReward)}
        settings = {
            "load_models": lambda: {name: ModelScorer(Path(name), "float32", micro_batch_tokens=64) for name in names},
            "say": self.messages.append,
        }
        self.scorers.append(Scorer(parsed, options.pop("prompts", []), self.tokenizer, **settings | options))
        return self.scorers[-1]


@pytest.fixture
def scorer(tokenizer) -> Iterator[Scorers]:
    made = Scorers(tokenizer)
    yield made
    for one in made.scorers:
        one.close()


@pytest.fixture
def functions(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def length(prompts, completions, rows): return [len(c) for c in completions]\n"
        "def constant(prompts, completions, rows): return [0.1 for c in completions]\n"
        "def reference(prompt, completion, row): return len(row['reference']) + len(prompt)\n"
        "def picky(prompt, completion, row): return None if completion == 'so' else 1.0\n"
        "def huge(prompt, completion, row): return 1e200\n"
        "def broken(prompt, completion, row): raise ValueError('no')\n"
    )


def one_by_one(folder: Path, sequences: list[list[int]]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]


# --- each kind ----------------------------------------------------------------------------------


def test_a_reward_model_scores_token_ids(scorer, model, scored_batch) -> None:
    scores, metrics = scorer({"kind": "model", "init_from": str(model)}).score(*scored_batch)
    expected = one_by_one(model, [c.prompt_ids + c.token_ids for c in scored_batch[2]])
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.05
    assert metrics[f"reward/{model}"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_model_with_another_tokenizer_gets_the_texts_in_its_own_format(
    scorer, other_model, other_tokenizer, scored_batch, tmp_path
) -> None:
    """The expected token ids are those that reward-model training makes from the same conversations with this model's
    tokenizer."""
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": q, "chosen": t, "rejected": "-", "chosen_finished": f} for q, t, f in zip(QUESTIONS, TEXTS, FINISHED)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(train=[FileSource(kind="file", path=str(pairs))], max_length=128)
    prepared = prepare_reward_pairs(data, other_tokenizer, seed=0).train
    expected = sorted(one_by_one(other_model, [row["chosen_ids"] for row in prepared]))
    one = scorer({"kind": "model", "init_from": str(other_model), "name": "other"})
    for _ in range(2):
        assert sorted(one.score(*scored_batch)[0].tolist()) == pytest.approx(expected, abs=1e-5)
    messages = [
        "  reward 'other': its tokenizer or chat template differs from the policy's; prompts and completions are "
        "re-tokenized"
    ]
    assert messages == scorer.messages


def test_functions_get_prompts_texts_rows_and_the_reference(scorer, functions, scored_batch) -> None:
    one = scorer(
        {"kind": "function", "path": "mine.py:length", "weight": 2.0},
        {"kind": "function", "path": "mine.py:reference", "batched": False},
    )
    start = time.perf_counter()
    scores, metrics = one.score(*scored_batch)
    elapsed = time.perf_counter() - start
    assert scores.tolist() == [2 * len(t) + len("a reference") + len(q) for t, q in zip(TEXTS, QUESTIONS)]
    figures = {k.removeprefix("reward/mine.py:length"): v for k, v in metrics.items() if "length" in k}
    lengths = [7, 17, 10, 2]
    assert figures[""] == np.mean(lengths)  # before the weight
    assert figures["/std"] == pytest.approx(np.std(lengths))
    assert (figures["/min"], figures["/max"], figures["/failures"]) == (2, 17, 0)
    assert 0 <= metrics["time/reward/mine.py:length"] <= elapsed + 1e-3  # rounded to milliseconds


def test_verifiers(scorer, scored_batch) -> None:
    rewards: list[dict] = [
        {"kind": "math"},
        {"kind": "exact", "column": "reference"},
        {"kind": "regex", "pattern": "It is (\\d+)"},
        {"kind": "regex", "name": "the number", "pattern": "It is (\\d+)", "column": "answer"},
        {"kind": "format", "sections": ["think"]},
        {"kind": "length", "max_tokens": 10},
    ]
    expected = {
        "math": [1, 0, 1, 0],
        "exact": [0, 0, 0, 0],
        "regex": [1, 1, 0, 0],
        "the number": [0, 0, 0, 0],  # the column holds more than the number
        "format": [0, 0, 0, 0],
        "length": [1, 0, 0, 1],  # a token per byte; the first three also have an end token, so "\\boxed{42}" has 11
    }
    for reward in rewards:
        name = reward.get("name", reward["kind"])
        scores, metrics = scorer(reward).score(*scored_batch)
        assert scores.tolist() == expected[name], name
        assert metrics[f"reward/{name}/failures"] == (0.25 if name == "math" else 0.0)  # "so" has no answer


def test_a_pattern_that_backtracks_for_ever_is_stopped(scorer, tokenizer, scored_batch) -> None:
    batch, rows, completions = scored_batch
    ids = tokenizer("a" * 40 + "!")["input_ids"]
    evil = [*completions[:2], Completion(completions[2].prompt_ids, ids, [0.0] * len(ids), True, 0), completions[3]]
    one = scorer({"kind": "regex", "pattern": "(a+)+$", "timeout_s": 0.5})
    with pytest.raises(UserError, match=r"'regex' took longer than 0\.5 s for completion 2 \('aaaa"):
        one.score(batch, rows, evil)


def test_a_missing_column_is_a_users_error(scorer, scored_batch) -> None:
    with pytest.raises(
        UserError, match="'math': a row has no value in the column 'solution', only in answer, prompt, "
    ):
        scorer({"kind": "math", "column": "solution"}, prompts=scored_batch[1])
    scorer({"kind": "math", "column": "reference"}, prompts=scored_batch[1])


# --- a server ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(model) -> Iterator[Any]:
    with build_server(model, dtype="float32", micro_batch_tokens=64) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_served_model_gives_the_scores_of_a_local_one(
    scorer, server, model, scored_batch, other_tokenizer, monkeypatch
) -> None:
    requests: list[dict] = []
    original = remote.RewardClient.score
    monkeypatch.setattr(remote.RewardClient, "score", lambda self, r: requests.append(r) or original(self, r))
    local, _ = scorer({"kind": "model", "init_from": str(model)}).score(*scored_batch)
    served, _ = scorer({"kind": "remote", "url": server.url, "batch_size": 3}).score(*scored_batch)
    assert served.tolist() == pytest.approx(local.tolist(), abs=1e-6)
    assert [len(r["completions"]) for r in requests] == [3, 1]
    assert requests[0]["completions"] == [
        c.token_ids for c in scored_batch[2][:3]
    ]  # same tokenizer: token ids are sent
    scorer.tokenizer = other_tokenizer  # a policy with another tokenizer: texts are sent; the scores stay the same
    monkeypatch.setattr("align.reward.components.Samples.texts", TEXTS)
    as_texts, _ = scorer({"kind": "remote", "url": server.url, "send_rows": True}).score(*scored_batch)
    assert as_texts.tolist() == pytest.approx(local.tolist(), abs=1e-6)
    assert requests[-1]["completions"] == TEXTS
    assert requests[-1]["rows"][0]["answer"] == "#### 5"


def test_a_server_that_is_down_at_the_start_or_later(scorer, model, scored_batch, monkeypatch) -> None:
    monkeypatch.setattr(json_http, "FIRST_PAUSE_S", 0.02)
    server = build_server(model, dtype="float32", micro_batch_tokens=64)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    reward = {"kind": "remote", "url": server.url, "retries": 2, "failure_score": 0.0}
    one = scorer(reward)
    assert one.score(*scored_batch)[0].isfinite().all()
    server.shutdown()
    thread.join()
    server.server_close()
    with pytest.raises(UserError, match=r"no response .Connection refused. in 3 tries"):
        one.score(*scored_batch)  # a failure_score is for single completions, not for a server that is gone
    with pytest.raises(UserError, match=r"no response .Connection refused. in 3 tries"):
        scorer(reward)


def test_the_server_refuses_invalid_token_ids_and_long_texts(server) -> None:
    client = remote.RewardClient(server.url, timeout_s=5, retries=0)
    with pytest.raises(UserError, match=r"token ids must be from 0 to 258"):
        client.score({"prompts": [[1]], "completions": [[259]]})
    with pytest.raises(UserError, match="more than 128 tokens"):
        client.score({"prompts": ["x" * 200], "completions": ["y"]})
    assert client.score({"prompts": ["x"], "completions": [""]})[0] is not None


# --- failures -----------------------------------------------------------------------------------------


def test_nan_of_a_reward_model_names_the_completion(scorer, model, scored_batch, monkeypatch) -> None:
    one = scorer({"kind": "model", "init_from": str(model), "name": "rm"})
    from align.reward import model as scoring

    def with_nan(model: Any, batch: Experience) -> torch.Tensor:
        return torch.where(batch.lengths == scored_batch[0].lengths[2], float("nan"), 1.0)

    monkeypatch.setattr(scoring, "sequence_scores", with_nan)
    with pytest.raises(UserError, match="reward model 'rm': no finite score for completion 2 "):
        one.score(*scored_batch)


def test_nan_of_a_server_names_the_completion_or_has_a_score(scorer, server, scored_batch, monkeypatch) -> None:
    monkeypatch.setattr(remote.RewardClient, "score", lambda self, r: [1.0, None, 2.0, 3.0])
    reward = {"kind": "remote", "url": server.url}
    with pytest.raises(UserError, match=r"no finite score for completion 1 .'It is 8, I think.'.\. Fix the server"):
        scorer(reward).score(*scored_batch)
    scores, metrics = scorer({**reward, "failure_score": -1.0}).score(*scored_batch)
    assert scores.tolist() == [1.0, -1.0, 2.0, 3.0]
    assert metrics["reward/remote/failures"] == 0.25


def test_a_failed_completion_gets_the_failure_score_and_a_message(scorer, functions, scored_batch) -> None:
    reward = {"kind": "function", "path": "mine.py:picky", "batched": False}
    with pytest.raises(UserError, match="returned None for completion 3"):
        scorer(reward).score(*scored_batch)
    scores, metrics = scorer({**reward, "failure_score": -2.0}).score(*scored_batch)
    assert scores.tolist() == [1.0, 1.0, 1.0, -2.0]
    assert metrics["reward/mine.py:picky/failures"] == 0.25
    assert scorer.messages == ["  reward 'mine.py:picky': 1 of 4 completions failed (returned None)"]


def test_a_batch_without_any_score_stops_the_run(scorer, functions, scored_batch) -> None:
    one = scorer({"kind": "function", "path": "mine.py:broken", "batched": False, "failure_score": 0.0})
    with pytest.raises(UserError, match=r"none of 4 completions could be scored .*ValueError: no"):
        one.score(*scored_batch)


def test_a_sum_beyond_float32_is_refused(scorer, functions, scored_batch) -> None:
    with pytest.raises(UserError, match="the sum of all rewards: no finite score for completion 0"):
        scorer({"kind": "function", "path": "mine.py:huge", "batched": False}).score(*scored_batch)


# --- normalising ---------------------------------------------------------------------------------------------


def test_running_normalisation_covers_all_batches_and_survives_a_restart(scorer, functions, scored_batch) -> None:
    reward = {"kind": "function", "path": "mine.py:length", "normalise": "running", "weight": 3.0}
    batch, rows, completions = scored_batch
    first, second = scorer(reward), scorer(reward)
    all_lengths: list[int] = []
    for number, picked in enumerate(([0, 1, 2, 3], [1, 1, 2, 0], [3, 3, 3, 3])):
        index = torch.tensor(picked)
        part = batch.rows(index), [rows[i] for i in picked], [completions[i] for i in picked]
        lengths = [len(TEXTS[i]) for i in picked]
        all_lengths += lengths
        expected = 3.0 * (np.array(lengths) - np.mean(all_lengths)) / np.std(all_lengths)
        scores, metrics = first.score(*part)
        assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-5), number
        assert metrics["reward/mine.py:length"] == np.mean(lengths)
        second.load_state_dict(json.loads(json.dumps(second.state_dict())))  # like a run that is resumed each time
        assert second.score(*part)[0].tolist() == scores.tolist()
        restarted = scorer(reward)
        restarted.load_state_dict(json.loads(json.dumps(second.state_dict())))
        second = restarted


def test_equal_scores_do_not_divide_by_zero(scorer, functions, scored_batch) -> None:
    one = scorer({"kind": "function", "path": "mine.py:constant", "normalise": "running", "clip": 5.0})
    for _ in range(3):
        assert one.score(*scored_batch)[0].tolist() == [0.0] * 4


def test_clipping_is_after_normalising_and_before_the_weight(scorer, functions, scored_batch) -> None:
    raw = np.array([7, 17, 10, 2])
    one = scorer({"kind": "function", "path": "mine.py:length", "clip": 8.0, "weight": 0.5})
    assert one.score(*scored_batch)[0].tolist() == [3.5, 4.0, 4.0, 1.0]
    one = scorer({"kind": "function", "path": "mine.py:length", "clip": 1.0, "weight": 0.5, "normalise": "running"})
    expected = 0.5 * np.clip((raw - raw.mean()) / raw.std(), -1, 1)
    assert one.score(*scored_batch)[0].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_processes_normalise_by_the_moments_of_all_completions(scorer, functions, scored_batch) -> None:
    """Two processes with half of the batch each give the scores that one process gives to the whole."""
    reward = {"kind": "function", "path": "mine.py:length", "normalise": "running"}
    whole, _ = scorer(reward).score(*scored_batch)
    halves = [Moments.of([7.0, 17.0]), Moments.of([10.0, 2.0])]
    batch, rows, completions = scored_batch
    for rank, picked in enumerate(([0, 1], [2, 3])):
        seen: list[Moments] = []
        one = scorer(reward, gather=lambda moments, seen=seen: seen.append(moments) or halves)
        part, _ = one.score(
            batch.rows(torch.tensor(picked)), [rows[i] for i in picked], [completions[i] for i in picked]
        )
        assert part.tolist() == pytest.approx(whole[picked].tolist(), rel=1e-6)
        assert seen == [halves[rank]]


def test_a_sequence_beyond_the_models_context_is_refused(scorer, tmp_path, tokenizer, scored_batch) -> None:
    folder = save_reward_model(tmp_path / "short", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    longest = int(scored_batch[0].lengths.max())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest}))
    assert scorer({"kind": "model", "init_from": str(folder)}).score(*scored_batch)[0].isfinite().all()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest - 1}))
    with pytest.raises(
        UserError, match=f"of {longest} tokens exceed the model's max_position_embeddings {longest - 1}"
    ):
        scorer({"kind": "model", "init_from": str(folder)}).score(*scored_batch)


@pytest.mark.slow
def test_the_command_serves_until_sigterm(scorer, model, scored_batch) -> None:
    command = [sys.executable, "-m", "align.cli", "serve-reward", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url is not None, line
        served, _ = scorer({"kind": "remote", "url": url.group()}).score(*scored_batch)
        process.terminate()
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    local, _ = scorer({"kind": "model", "init_from": str(model)}).score(*scored_batch)
    assert served.tolist() == pytest.approx(local.tolist(), abs=1e-6)
