"""A whole PPO stage: every method runs and resumes bit for bit; stages stop cleanly and save only finite weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.pipeline import run
from align.recipes import ppo
from align.rollout import started_server
from align.rollout.hf_engine import HuggingFaceEngine
from align.run import interrupt
from align.train import state
from tests.integration.forked import replace_popen
from tests.unit.rl.runs import lines, recipe

KINDS = {
    "ppo": {},
    "ppo_with_options": {
        "kl": {"coef": 0.1, "estimator": "k3", "apply_to": "loss", "target": 0.5, "horizon": 20},
        "critic": {"lam": 1.0, "max_grad_norm": 0.5},
        "importance": {"correction": "mask", "level": "sequence"},
        "ema_decay": 0.5,
        "mask_truncated": True,
        "overlong_buffer": 4,
        "loss_average": "completions",
    },
    "ppo_lora": {"lora": {"rank": 2, "save": "merged"}, "critic": {"trainable": "head"}},
    "grpo": {"advantage_estimator": "grpo", "kl": {"estimator": "k3", "apply_to": "loss"}, "dynamic_sampling": 2},
    "gspo": {"advantage_estimator": "grpo", "ratio": "sequence", "clip_range": 3e-4, "loss_average": "completions"},
    "dr_grpo": {"advantage_estimator": "dr_grpo", "loss_average": "constant"},
    "rloo": {"advantage_estimator": "rloo", "dual_clip": 3.0, "clip_range_high": 0.28},
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus", "completions_per_prompt": 1},
}


def quietly(made, run_dir: Path, **options) -> None:
    run(made, run_dir, say=lambda line: None, **options)


FAST = {"ppo", "grpo"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in KINDS])
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path, start, monkeypatch, name) -> None:
    made = recipe(tmp_path, **KINDS[name])
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    quietly(made, uninterrupted)
    assert [line["step"] for line in lines(uninterrupted)] == [1, 2, 3, 4]

    sampled = count_calls(monkeypatch, HuggingFaceEngine, "generate", fail_at=None)
    with monkeypatch.context() as patched:
        count_calls(patched, ppo, "update", fail_at=3)
        with pytest.raises(KeyboardInterrupt):
            quietly(made, interrupted)
    before = len(sampled)
    quietly(made, interrupted, resume=True)
    if not made.stages["ppo"].dynamic_sampling:
        # The samples of the third iteration were kept, so they are not sampled again.
        assert (before, len(sampled)) == (3, 4)
    assert lines(interrupted) == lines(uninterrupted)
    assert lines(interrupted, "samples.jsonl") == lines(uninterrupted, "samples.jsonl")
    weights = [(folder / "ppo/model/model.safetensors").read_bytes() for folder in (uninterrupted, interrupted)]
    assert weights[0] == weights[1]


def count_calls(monkeypatch, owner, name: str, *, fail_at: int | None) -> list[int]:
    """Count the calls of `owner.name` in the returned list; call number `fail_at` raises KeyboardInterrupt."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("file", [7, 9], ids=["policy", "counters"])
def test_a_full_disk_at_a_checkpoint_loses_nothing(tmp_path, start, monkeypatch, file) -> None:
    made = recipe(tmp_path, checkpoint_every=1)
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    quietly(made, uninterrupted)
    with monkeypatch.context() as patched:
        original, calls = state.save_file, []

        def full(tensors, path):
            calls.append(1)
            original(tensors, path)
            if len(calls) == file:  # a checkpoint has three files, so this is in the third
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        patched.setattr(state, "save_file", full)
        with pytest.raises(UserError, match="the disk is full; free some space and continue with --resume"):
            quietly(made, interrupted)
    assert sorted(path.name for path in (interrupted / "ppo/checkpoints").iterdir()) == ["drawn.safetensors", "last"]
    assert json.loads((interrupted / "ppo/checkpoints/last/state.json").read_text(encoding="utf-8"))["step"] == 2
    quietly(made, interrupted, resume=True)
    assert lines(interrupted) == lines(uninterrupted)


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_resumes(tmp_path, start, monkeypatch) -> None:
    made = recipe(tmp_path)  # checkpoints after steps 2 and 4
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    quietly(made, uninterrupted)
    with monkeypatch.context() as patched:
        answers = iter([False, False, True])
        patched.setattr(ppo, "should_stop", lambda: next(answers))
        with pytest.raises(interrupt.Stopped):
            quietly(made, interrupted)
    assert json.loads((interrupted / "ppo/checkpoints/last/state.json").read_text(encoding="utf-8"))["step"] == 3
    quietly(made, interrupted, resume=True)
    assert lines(interrupted) == lines(uninterrupted)
    weights = [(folder / "ppo/model/model.safetensors").read_bytes() for folder in (uninterrupted, interrupted)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("poisoned", [2, 4], ids=["at a checkpoint", "at the end"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, start, monkeypatch, poisoned) -> None:
    made, run_dir = recipe(tmp_path, checkpoint_every=2 if poisoned == 2 else 10), start("run")
    real = ppo.update

    def update(stage, models, *arguments, step, **options):
        metrics = real(stage, models, *arguments, step=step, **options)
        if step + 1 == poisoned:
            next(models.policy.model.parameters()).data[-1, -1] = float("inf")
        return metrics

    monkeypatch.setattr(ppo, "update", update)
    with pytest.raises(UserError, match="1 weights are infinite or not a number, so the model is not saved"):
        quietly(made, run_dir)
    assert not (run_dir / "ppo" / "model").exists()
    assert not (run_dir / "ppo" / "manifest.json").exists()
    assert not (run_dir / "ppo" / "checkpoints" / "last").exists()


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, start, monkeypatch) -> None:
    """Earlier versions saved the state of all learners of an unsharded run in one file."""
    made = recipe(tmp_path, ema_decay=0.5)
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    quietly(made, uninterrupted)
    with monkeypatch.context() as patched:
        count_calls(patched, ppo, "update", fail_at=3)
        with pytest.raises(KeyboardInterrupt):
            quietly(made, interrupted)
    last = interrupted / "ppo" / "checkpoints" / "last"
    tensors = load_file(last / "state.safetensors")
    for name in ("policy", "critic"):
        for key, tensor in load_file(last / name / "state.safetensors").items():
            kind, rest = key.split(".", 1)
            tensors[f"other.ema.{rest}" if kind == "ema" else f"{kind}.{name}.{rest}"] = tensor
        shutil.rmtree(last / name)
    save_file(tensors, last / "state.safetensors")
    quietly(made, interrupted, resume=True)
    assert lines(interrupted) == lines(uninterrupted)
    weights = [(folder / "ppo/model/model.safetensors").read_bytes() for folder in (uninterrupted, interrupted)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_sample_the_next_batch_during_the_update(tmp_path, start, monkeypatch) -> None:
    replace_popen(monkeypatch, started_server)
    rollout = {"engine": "remote", "start_servers": 1, "cache_gib": 0.1, "max_sequences": 8}
    made = recipe(tmp_path, rollout=rollout, overlap=True, steps=3)
    folder = start("run")
    quietly(made, folder)
    versions = {(line["step"], line["weight_version"]) for line in lines(folder, "samples.jsonl")}
    assert versions == {(1, 0), (2, 0), (3, 1)}
    assert all(line["mismatch_max"] < 1e-3 for line in lines(folder)[:1])
