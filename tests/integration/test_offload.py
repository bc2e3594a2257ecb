"""Offloading the optimizer state and the weights to CPU memory or to a disk changes no result."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from align.run.folder import read_jsonl
from tests.integration.kills import kill_last_rank
from tests.integration.runs import exported, fork, metrics, run, small_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = {"sft": 5, "ppo": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}." * (1 + n % 4)} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_file = [{"kind": "file", "path": str(folder / "rows.jsonl")}]
    sft = {
        "kind": "sft",
        "data": {"train": rows_file, "max_length": 96},
        "optimizer": {"learning_rate": 5e-3, "expert_learning_rate_scale": 0.5, "weight_decay": 0.01},
        "batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": STEPS["sft"],
        "checkpoint_every": 2,
    }
    ppo = {
        "kind": "ppo",
        "prompts": rows_file,
        "max_prompt_length": 48,
        "rewards": [{"kind": "length", "min_tokens": 4, "max_tokens": 8}],
        "rollout": {"engine": "huggingface", "max_new_tokens": 8, "max_model_length": 64},
        "optimizer": {"learning_rate": 2e-3, "eps": 1e-5, "max_grad_norm": 0.3},
        "critic": {"learning_rate": 5e-3},
        "steps": STEPS["ppo"],
        "batch_size": 8,
        "mini_batch_size": 4,
        "micro_batch_tokens": 120,
        "checkpoint_every": 2,
    }
    content = {
        "name": "offload",
        "parallel": {"processes": 2, "expert_parallel_size": 2},
        "model": small_model(
            rows_file,
            hidden_size=256,  # DeepSpeed offloads only tensors of 1 MiB or more, as a layer's experts are here
            intermediate_size=512,
            num_shared_expert=1,
            initializer_range=0.05,
            router_aux_loss_coef=0.02,
        ),
        "stages": {"sft": sft, "ppo": ppo},
    }
    (folder / "offload.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "offload.yaml"


@pytest.fixture(scope="module")
def baseline(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without offloading."""
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    run(recipe, run_dir)
    return run_dir


def offload(place: str, folder: Path) -> list[str]:
    words = [f"parallel.offload.{what}={place}" for what in ("optimizer", "parameters")]
    if place == "nvme":
        require_async_io()
        words.append(f"parallel.offload.path={folder}")
    return words


def require_async_io() -> None:
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("nvme needs libaio with its headers (libaio-dev), which is not installed")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("nvme needs a C++ compiler for DeepSpeed's async_io; none is installed")


@pytest.fixture(scope="module", params=["cpu", "nvme"])
def offloaded(request: pytest.FixtureRequest, recipe: Path, baseline: Path, tmp_path_factory: pytest.TempPathFactory):
    """(run folder, its overrides, the stage that the kill test interrupts)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "disk").mkdir()
    words = offload(request.param, folder / "disk")
    shutil.copytree(baseline / "base", folder / "run" / "base")
    launcher, found = fork(recipe, folder / "run", *words), set[str]()
    deadline = time.monotonic() + 1500  # DeepSpeed may have to compile async_io first
    while launcher.poll() is None:
        assert time.monotonic() < deadline
        found |= {file.parent.parent.name for file in (folder / "disk").rglob("*.swp")}
        time.sleep(0.2)
    assert launcher.returncode == 0, launcher.communicate()[0][-3000:]
    assert len(found) == (2 if request.param == "nvme" else 0), found  # weights and optimizer state
    return folder / "run", words, "ppo" if request.param == "cpu" else "sft"


COMPARED = {
    "sft": ("loss", "grad_norm", "aux_loss"),
    "ppo": ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm", "entropy", "aux_loss", "score_mean"),
}


def differences(one: Path, other: Path, stage: str) -> list[float]:
    """Largest relative difference of a metric, per step."""
    pairs = list(zip(metrics(one, stage), metrics(other, stage), strict=True))
    assert [line["step"] for line, _ in pairs] == list(range(1, STEPS[stage] + 1))
    return [max(abs(a[key] - b[key]) / max(abs(b[key]), 0.05) for key in COMPARED[stage]) for a, b in pairs]


def test_offloading_changes_no_result(baseline: Path, offloaded) -> None:
    uninterrupted, *_ = offloaded
    assert max(differences(uninterrupted, baseline, "sft")) <= 1e-6
    rounds = differences(uninterrupted, baseline, "ppo")
    assert rounds[0] <= 1e-6
    assert max(rounds) <= 2e-5  # the policy loss is a small difference of large terms


def test_a_killed_run_resumes_to_the_same_result(recipe: Path, offloaded, tmp_path: Path) -> None:
    uninterrupted, words, stage = offloaded
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / stage)
    launcher = fork(recipe, run_dir, "--only", stage, *words)
    kill_last_rank(launcher, lambda: len(read_jsonl(run_dir / stage / "metrics.jsonl")) == 3)
    assert "resuming at step 2\n" in run(recipe, run_dir, "--only", stage, "--resume", *words, forks=True)
    assert metrics(run_dir, stage) == metrics(uninterrupted, stage)
    assert exported(run_dir, stage) == exported(uninterrupted, stage)
