"""A PPO recipe on one process and on several makes the same updates from the same completions, and resumes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from align.config.rollout import Rollout
from align.rollout.base import SamplingSettings
from align.run.folder import read_jsonl
from align.train.checkpoint import load_policy
from tests.integration.kills import kill_last_rank
from tests.integration.runs import ROUTED, fork, metrics, run, small_model, weights

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 3
MEASURED = (
    *("score_mean", "kl", "kl_k3", "entropy", "mismatch_mean", "explained_variance", "policy_loss", "update_kl"),
    *("value_loss", "clip_fraction", "aux_loss", "router_entropy", "policy_grad_norm", "critic_grad_norm"),
)
"""Metrics that must agree between two runs."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": f"Say {n}" + " please" * (n % 3)} for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": "parallel_ppo",
        "model": small_model([{"kind": "python_docs", "view": "text", "limit": 20}], initializer_range=0.2, **ROUTED),
        "stages": {
            "ppo": {
                "kind": "ppo",
                "prompts": [{"kind": "file", "path": str(folder / "prompts.jsonl")}],
                "max_prompt_length": 48,
                "rewards": [{"kind": "length", "min_tokens": 4, "max_tokens": 8}],
                "rollout": {"engine": "huggingface", "max_new_tokens": 12, "max_model_length": 64},
                "optimizer": {"learning_rate": 2e-3, "eps": 1e-5, "max_grad_norm": 0.3, "weight_decay": 0.01},
                "critic": {"learning_rate": 5e-3},
                "kl": {"coef": 0.1},
                "steps": STEPS,
                "batch_size": 16,
                "mini_batch_size": 8,
                "epochs": 2,
                "micro_batch_tokens": 120,
                "ema_decay": 0.6,
                "checkpoint_every": 2,
            },
        },
    }
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def difference(one: dict, other: dict) -> dict[str, float]:
    """Difference of each metric, relative to its size or to 0.05."""
    return {key: abs(one[key] - other[key]) / max(abs(other[key]), 0.05) for key in MEASURED}


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    run(recipe, run_dir, forks=True)
    return run_dir


TWO = ("--nproc", "2", "parallel.expert_parallel_size=2")
EVERY_ROUND = "stages.ppo.checkpoint_every=1"


@pytest.fixture(scope="module")
def two(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    run(recipe, run_dir, *TWO)
    return run_dir


def require_equal_updates(one: Path, other: Path) -> None:
    ours, theirs = metrics(one, "ppo"), metrics(other, "ppo")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    found = difference(ours[0], theirs[0])
    assert max(found.values()) < 1e-5, found
    expected = weights(other, "ppo")
    assert expected.keys() == weights(one, "ppo").keys()
    # AdamW amplifies rounding differences of gradients near zero in every iteration.
    assert max((tensor - expected[name]).abs().max().item() for name, tensor in weights(one, "ppo").items()) < 5e-3


def test_two_ranks_with_half_of_the_experts_each_update_as_one_process(single: Path, two: Path) -> None:
    require_equal_updates(two, single)


def test_vllm_samples_from_the_updated_weights(recipe: Path, tmp_path: Path) -> None:
    """vLLM in its own process gets the updated weights: its log-probabilities match the trainer's after an update."""
    words = ("--nproc", "2", "stages.ppo.rollout.engine=vllm", "stages.ppo.steps=2")
    run(recipe, tmp_path / "run", *words, forks=True)
    lines = metrics(tmp_path / "run", "ppo")
    assert lines[1]["kl_k3"] > 1e-4  # the policy has moved
    assert max(line["mismatch_max"] for line in lines) < 1e-3


def test_the_checkpoint_of_two_ranks_loads_in_vllm_and_transformers(two: Path) -> None:
    from align.rollout.vllm_engine import VllmEngine

    folder = two / "ppo" / "model"
    model = load_policy(folder, "float32").eval()
    rollout = Rollout(max_model_length=64, cache_gib=0.05, max_sequences=8)
    engine = VllmEngine(folder, rollout, dtype="float32", seed=0)
    try:
        ((completion,),) = engine.generate([[5, 6, 7]], SamplingSettings(16, seed=1))
    finally:
        engine.close()
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4


@pytest.fixture(scope="module")
def killed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, killed during the updates of the second iteration, resumed, and killed again while that
    iteration's checkpoint was written."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    stage, state = run_dir / "ppo", "state-00001-of-00002.safetensors"
    drawn, following = stage / "checkpoints" / "drawn.safetensors", stage / "checkpoints" / "next"

    def in_the_updates() -> bool:
        lines = stage / "metrics.jsonl"
        sampled = len(read_jsonl(lines)) == 1 and drawn.stat().st_mtime > lines.stat().st_mtime
        return sampled and time.time() - drawn.stat().st_mtime > 0.2

    def in_a_checkpoint() -> bool:
        return (following / "policy").is_dir() and not (following / "critic" / state).exists()

    kill_last_rank(fork(recipe, run_dir, *TWO, EVERY_ROUND), in_the_updates)
    assert len(read_jsonl(stage / "metrics.jsonl")) == 1
    kill_last_rank(fork(recipe, run_dir, *TWO, EVERY_ROUND, "--resume"), in_a_checkpoint)
    assert following.is_dir()
    assert (stage / "checkpoints" / "last").is_dir()
    return run_dir


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [(TWO, 0.0), (("--nproc", "1"), 1e-4), (("--nproc", "2", "parallel.zero_stage=0"), 1e-4)],
    ids=["two ranks", "one rank", "two ranks, zero 0"],
)
def test_a_killed_run_resumes_on_any_number_of_processes(
    recipe: Path, two: Path, killed: Path, tmp_path: Path, words: tuple[str, ...], tolerance: float
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(killed, run_dir)
    assert "resuming at step 1" in run(recipe, run_dir, "--resume", *words, EVERY_ROUND, forks=True)
    found = [difference(*lines) for lines in zip(metrics(run_dir, "ppo"), metrics(two, "ppo"), strict=True)]
    assert max(max(line.values()) for line in found) <= tolerance, found
    expected = weights(two, "ppo")  # EMA weights
    apart = max((tensor - expected[name]).abs().max().item() for name, tensor in weights(run_dir, "ppo").items())
    assert apart <= tolerance


def test_a_failing_reward_on_rank_0_ends_all_ranks_with_its_error(recipe: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(prompts, completions, rows): raise ValueError('not today')\n")
    rewards = f"stages.ppo.rewards=[{{kind: function, path: '{tmp_path}/mine.py:broken'}}]"
    shutil.copytree(two / "base", tmp_path / "run" / "base")
    before = time.monotonic()
    output = run(recipe, tmp_path / "run", *TWO, rewards, code=2, forks=True)
    assert "ValueError: not today" in output
    assert "Traceback" not in output
    assert time.monotonic() - before < 240  # takes about ten seconds; a rank left in a collective would wait forever
