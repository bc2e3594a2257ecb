"""A recipe on one process and on several gives the same losses and weights; a run resumes after a rank is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from align.run.checkpoint import adapter_folder
from align.run.folder import read_jsonl
from align.train.checkpoint import load_policy
from tests.integration.kills import kill_last_rank
from tests.integration.runs import ROUTED, exported, fork, metrics, run, small_model, weights

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 7
TRAINING = {
    "optimizer": {"learning_rate": 5e-3, "expert_learning_rate_scale": 0.5, "weight_decay": 0.01},
    "batch_size": 16,
    "micro_batch_tokens": 1,  # a pass per row, on any number of processes: the balance loss depends on the split
    "max_steps": STEPS,
    "checkpoint_every": 2,
}
LORA_STEPS = 4
BESIDE = {"rank": 2, "alpha": 8.0, "train_router": True, "save": "adapter"}
LORA = {**TRAINING, "max_steps": LORA_STEPS, "lora": {**BESIDE, "save": "merged"}}
TRAINED = ["sft", "reward_model", "dpo", "kto", "sft_lora", "reward_lora", "dpo_lora"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT, reward model, DPO and PPO, each with full weights and with LoRA, and KTO.

    The second epoch begins in step 4 or 5. An epoch's last step is smaller.
    """
    folder = tmp_path_factory.mktemp("recipe")
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea " + "x" * n} for n in range(61)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"] * (1 + n % 4)} for n, pair in enumerate(pairs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{**row, "label": n % 3 > 0} for n, row in enumerate(rows)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    ppo = {
        "kind": "ppo",
        "prompts": [{"kind": "file", "path": str(folder / "pairs.jsonl")}],
        "rewards": [{"kind": "model", "init_from": "reward_model"}],
        "rollout": {"engine": "huggingface", "max_new_tokens": 8, "max_model_length": 64},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-5},
        "max_prompt_length": 48,
        "steps": 1,
        "ema_decay": 0.5,
        "batch_size": 10,
        "mini_batch_size": 5,
        "micro_batch_tokens": 96,
    }
    data = {
        name: {"train": [{"kind": "file", "path": str(folder / f"{name}.jsonl")}], "max_length": 96}
        for name in ("rows", "pairs", "labels")
    }
    content = {
        "name": "parallel",
        "model": small_model([{"kind": "python_docs", "view": "text", "limit": 20}], initializer_range=0.1, **ROUTED),
        "stages": {
            "sft": {"kind": "sft", "data": data["rows"], **TRAINING},
            # Starts from base, which is bit-equal in every run: this stage amplifies rounding differences to 1e-4.
            "reward_model": {"kind": "reward_model", "init_from": "base", "data": data["pairs"], **TRAINING},
            "dpo": {"kind": "dpo", "init_from": "sft", "data": data["pairs"], "sft_coef": 0.1, **TRAINING},
            # The rows are alike, so that their mismatched completions become likelier too: the estimate exceeds 0.
            "kto": {"kind": "kto", "init_from": "sft", "data": data["labels"], "undesirable_weight": 0.2, **TRAINING},
            "ppo": {**ppo, "init_from": "sft"},
            # Its result is an adapter beside its base, which dpo_lora loads in shards.
            "sft_lora": {"kind": "sft", "data": data["rows"], "gradient_checkpointing": True, **LORA, "lora": BESIDE},
            "reward_lora": {"kind": "reward_model", "init_from": "base", "data": data["pairs"], **LORA},
            "dpo_lora": {"kind": "dpo", "init_from": "sft_lora", "data": data["pairs"], "sft_coef": 0.1, **LORA},
            "ppo_lora": {**ppo, "init_from": "dpo_lora", "lora": LORA["lora"], "critic": {"lora": LORA["lora"]}},
        },
    }
    path = folder / "parallel.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


ROUTER = ("aux_loss", "router_z_loss")


def difference(one: list[dict], other: list[dict], more: tuple[str, ...] = ROUTER) -> float:
    """Largest relative difference in loss, gradient norm, learning rate and the metrics `more`."""
    assert [line["step"] for line in one] == [line["step"] for line in other]
    assert len(one) in (STEPS, LORA_STEPS)
    keys = ("loss", "grad_norm", "learning_rate", *more)
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True) for key in keys)


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    run(recipe, run_dir, forks=True)
    return run_dir


@pytest.fixture(scope="module")
def several(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("runs") / "several"
    return run_dir, run(recipe, run_dir, "--nproc", "2", "parallel.expert_parallel_size=2")


@pytest.mark.parametrize("stage", TRAINED)
def test_two_ranks_with_half_of_the_experts_each_train_as_one_process(single, several, stage: str) -> None:
    assert difference(metrics(several[0], stage), metrics(single, stage)) < 1e-5


def test_two_ranks_estimate_the_kl_of_kto_as_one_process(single, several) -> None:
    ours, theirs = ([line["kto_kl"] for line in metrics(folder, "kto")] for folder in (several[0], single))
    assert max(theirs) > 1
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def pass_sizes(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with one and several passes per step, and on two ranks, without balance loss: it depends on the split."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["model"]["config"] |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
    content["stages"] = {
        name: {**content["stages"][name], "init_from": "base", "micro_batch_tokens": 4000, "max_steps": LORA_STEPS}
        for name in ("sft", "reward_model", "dpo", "kto")
    }
    folder = tmp_path_factory.mktemp("pass_sizes")
    (folder / "pass_sizes.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    small = [f"stages.{name}.micro_batch_tokens=100" for name in content["stages"]]
    for name, words in {"one": [], "many": small, "ranks": ["--nproc", "2"]}.items():
        run(folder / "pass_sizes.yaml", folder / name, *words, forks=True)
    return {name: folder / name for name in ("one", "many", "ranks")}


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "kto"])
@pytest.mark.parametrize("other", ["many", "ranks"])
def test_the_split_into_passes_does_not_change_a_step(pass_sizes, stage: str, other: str) -> None:
    assert difference(metrics(pass_sizes[other], stage), metrics(pass_sizes["one"], stage), ()) < 1e-5


@pytest.mark.parametrize("stage", ["ppo", "ppo_lora"])
def test_the_first_update_of_ppo_equals_that_of_one_process(single, several, stage: str) -> None:
    """Both runs have the same completions. They start from checkpoints that differ by rounding; the tolerance covers
    this difference."""
    (ours,), (theirs,) = metrics(several[0], stage), metrics(single, stage)
    assert ours["completion_length"] == theirs["completion_length"]
    for key in ("policy_grad_norm", "critic_grad_norm", "value_loss", "entropy", "kl_k3", "aux_loss", "score_mean"):
        assert abs(ours[key] - theirs[key]) < 1e-4 * max(abs(theirs[key]), 1e-2), key


def test_only_rank_0_prints(several) -> None:
    lines = several[1].splitlines()
    assert len([line for line in lines if line.startswith("sft: done")]) == 1
    assert len([line for line in lines if f"step {STEPS}/{STEPS}" in line]) == 4  # sft, reward_model, dpo and kto


@pytest.mark.parametrize("stage", [*TRAINED, "ppo", "ppo_lora"])
def test_the_checkpoint_equals_that_of_a_single_process(single, several, stage: str) -> None:
    ours, theirs = weights(several[0], stage), weights(single, stage)
    assert set(ours) == set(theirs)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-4  # after seven steps of AdamW
    configs = [json.loads((folder / stage / "model" / "config.json").read_text()) for folder in (single, several[0])]
    assert configs[0] == configs[1]
    names = [
        {f.name for f in (d / stage / "model").iterdir() if "safetensors" not in f.name} for d in (single, several[0])
    ]
    assert names[0] == names[1]
    if not stage.startswith("reward"):
        load_policy(several[0] / stage / "model", "float32")


def half_written(checkpoints: Path) -> bool:
    """True if a checkpoint exists and rank 1 has not yet written its shard of a newer one."""
    found = sorted(checkpoints.glob("checkpoint-*"))
    return len(found) > 1 and not (found[-1] / "training_state" / "state-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("stage", ["sft_lora", "reward_lora", "dpo_lora", "ppo_lora"])
def test_the_adapter_equals_that_of_a_single_process(single, several, stage: str) -> None:
    ours, theirs = (
        load_file(adapter_folder(run_dir / stage) / "adapter_model.safetensors") for run_dir in (several[0], single)
    )
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 2e-5
    folders = [adapter_folder(run_dir / stage) for run_dir in (single, several[0])]
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    for run_dir, config in zip((single, several[0]), settings, strict=True):
        assert config.pop("base_model_name_or_path").startswith(str(run_dir))
        config["target_modules"].sort()
    assert settings[0] == settings[1]


@torch.no_grad()
def test_peft_loads_the_adapter(several) -> None:
    """The adapter on its parent gives the logits of the merged checkpoint."""
    ids = torch.arange(1, 40)[None]
    parent = load_policy(several[0] / "sft_lora" / "model", "float32")
    adapted = PeftModel.from_pretrained(parent, several[0] / "dpo_lora" / "adapter").eval()
    merged = load_policy(several[0] / "dpo_lora" / "model", "float32").eval()
    found, plain = adapted(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    with adapted.disable_adapter():
        assert (adapted(ids).logits - plain).abs().max() > 1e-2  # the adapter has an effect


@pytest.fixture(scope="module")
def killed(recipe: Path, several, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two ranks; rank 1 was killed between two checkpoints or while a checkpoint was written."""
    conditions: dict[str, Callable[[Path], bool]] = {
        "in a step": lambda stage: len(read_jsonl(stage / "metrics.jsonl")) == 5,
        "in a checkpoint": lambda stage: half_written(stage / "checkpoints"),
    }
    folders = {}
    for name, condition in conditions.items():
        folders[name] = run_dir = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(several[0] / "base", run_dir / "base")
        launcher = fork(recipe, run_dir, "--only", "sft", "--nproc", "2", "parallel.expert_parallel_size=2")
        kill_last_rank(launcher, partial(condition, run_dir / "sft"))
    assert half_written(folders["in a checkpoint"] / "sft" / "checkpoints")
    return folders


@pytest.mark.parametrize(
    ("when", "processes", "expert_parallel_size", "tolerance"),
    [
        ("in a step", 2, 2, 0.0),
        ("in a step", 1, 1, 1e-5),
        ("in a checkpoint", 2, 2, 0.0),
    ],
)
def test_a_killed_run_resumes_on_any_number_of_processes(
    recipe: Path,
    several,
    killed,
    tmp_path: Path,
    when: str,
    processes: int,
    expert_parallel_size: int,
    tolerance: float,
) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(killed[when], run_dir)
    newest = max((run_dir / "sft" / "checkpoints").glob("*/complete"), key=lambda file: int(file.parent.name[11:]))
    words = ["--nproc", str(processes), f"parallel.expert_parallel_size={expert_parallel_size}"]
    output = run(recipe, run_dir, "--only", "sft", "--resume", *words, forks=True)
    assert f"resuming at step {newest.parent.name[11:]}\n" in output
    assert difference(metrics(run_dir, "sft"), metrics(several[0], "sft")) <= tolerance
    if not tolerance:
        assert exported(run_dir, "sft") == exported(several[0], "sft")


def test_a_run_resumes_on_one_then_two_then_four_then_two_processes(recipe: Path, several, tmp_path: Path) -> None:
    """Each stage starts on one number of processes and ends on another."""
    run_dir = tmp_path / "run"
    shutil.copytree(several[0] / "base", run_dir / "base")

    def on(processes: int) -> list[str]:
        return ["--resume", "--nproc", str(processes), f"parallel.expert_parallel_size={min(processes, 2)}"]

    for processes, stage in ((1, "sft"), (2, "reward_model"), (4, "dpo")):
        complete = run_dir / stage / "checkpoints" / "checkpoint-4" / "complete"
        kill_last_rank(fork(recipe, run_dir, *on(processes)), complete.is_file)
        assert not (run_dir / stage / "manifest.json").exists()
    assert "resuming at step" in run(recipe, run_dir, *on(2), "--only", "dpo", forks=True)
    for stage in ("sft", "reward_model", "dpo"):
        assert difference(metrics(run_dir, stage), metrics(several[0], stage)) < 1e-5, stage
        ours, theirs = weights(run_dir, stage), weights(several[0], stage)
        assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-4


def test_a_batch_size_that_the_processes_do_not_divide_is_refused(recipe: Path, tmp_path: Path) -> None:
    output = run(recipe, tmp_path / "run", "--nproc", "3", "parallel.expert_parallel_size=3", code=2, forks=True)
    assert "batch_size 16 is not divisible by" in output
    assert "Traceback" not in output
