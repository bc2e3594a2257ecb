"""One recipe on one, two and four processes: differences of losses, gradient norms and exported weights.

Whole stages run through `align run`: twenty steps of AdamW with clipping, accumulation and the balance loss, and PPO's
first update. For comparison, one process runs with narrower vector instructions, which sum in another order. This
changes only the last bits of float32, so its differences show what rounding alone causes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import write
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS = 20
OPTIMIZER = {
    "learning_rate": 5e-3,
    "expert_learning_rate_scale": 0.5,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
}
STEADIER = {"sft_eps_1e_5": {"eps": 1e-5}, "sft_rate_1e_5": {"learning_rate": 1e-5}}
"""The sft stage again, with other optimizer settings."""
SPREAD = ("parallel.expert_parallel_size=2",)
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "1 process": ((), {}),
    "1 process, narrower instructions": ((), {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
    "2 processes, ZeRO 3": (("--nproc", "2"), {}),
    "2 processes, ZeRO 3, experts over 2": (("--nproc", "2", *SPREAD), {}),
    "4 processes, ZeRO 3, experts over 2": (("--nproc", "4", *SPREAD), {}),
}
"""Arguments of `align run`, and environment variables, of each layout."""
TRAINED = ("loss", "grad_norm", "aux_loss")
UPDATE = (
    *("score_mean", "kl", "kl_k3", "entropy", "mismatch_mean", "explained_variance", "policy_loss", "update_kl"),
    *("value_loss", "clip_fraction", "aux_loss", "router_entropy", "policy_grad_norm", "critic_grad_norm"),
)
SMALLEST = 0.05
"""Smallest denominator of a PPO metric's relative difference."""


def write_recipe(folder: Path) -> Path:
    """Write the recipe: 16 sequences per step and 2 per micro-batch, so 8, 4 or 2 accumulation steps on 1, 2 or 4
    processes."""
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea " + "x" * n} for n in range(61)]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"] * (1 + n % 4)} for n, pair in enumerate(pairs)]
    texts = [{"text": row["prompt"] + " " + row["completion"]} for row in rows] * 8
    files = {"texts": texts, "rows": rows, "pairs": pairs}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    data = {
        name: {"train": [{"kind": "file", "path": str(folder / f"{name}.jsonl")}], "max_length": 96} for name in files
    }

    def trained(kind: str, rows_of: str, **changes: Any) -> dict[str, Any]:
        sizes = {"batch_size": 16, "micro_batch_size": 2, "max_steps": STEPS, "checkpoint_every": STEPS}
        return {"kind": kind, "data": data[rows_of], "optimizer": {**OPTIMIZER, **changes}, **sizes}

    recipe = {
        "name": "equality",
        "model": {
            "kind": "scratch",
            "tokenizer": {"vocab_size": 300, "data": [{"kind": "python_docs", "view": "text", "limit": 20}]},
            "config": {
                "hidden_size": 32,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_experts": 8,
                "moe_topk": 1,
                "num_shared_expert": 1,
                "initializer_range": 0.1,
                "router_aux_loss_coef": 0.02,
                "router_z_loss_coef": 0.001,
            },
        },
        "stages": {
            "pretrain": trained("pretrain", "texts"),
            "sft": trained("sft", "rows"),
            "reward_model": trained("reward_model", "pairs"),
            "dpo": {**trained("dpo", "pairs"), "init_from": "base", "sft_coef": 0.1},
            **{name: trained("sft", "rows", **changes) for name, changes in STEADIER.items()},
            "ppo": {
                "kind": "ppo",
                "prompts": [{"kind": "file", "path": str(folder / "pairs.jsonl")}],
                "rewards": [{"kind": "length", "min_tokens": 4, "max_tokens": 8}],
                "rollout": {"engine": "huggingface", "max_new_tokens": 12, "max_model_length": 64},
                "optimizer": {**OPTIMIZER, "learning_rate": 2e-3},
                "critic": {"learning_rate": 5e-3},
                "kl": {"coef": 0.1},
                "max_prompt_length": 48,
                "steps": 1,
                "batch_size": 16,
                "mini_batch_size": 8,
                "epochs": 2,
                "micro_batch_tokens": 120,
            },
        },
    }
    for stage in recipe["stages"].values():
        stage.setdefault("init_from", "base")
    path = folder / "equality.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run(recipe: Path, run_dir: Path, words: tuple[str, ...], variables: dict[str, str]) -> float:
    """Run all stages; return the seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "run", str(recipe), "--run-dir", str(run_dir), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return round(time.perf_counter() - started, 1)


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    files = (run_dir / stage / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def trained_apart(run_dir: Path, alone: Path, stage: str) -> dict[str, Any]:
    """Largest relative differences of the metrics over all steps, and largest difference of a weight."""
    ours, theirs = metrics(run_dir, stage), metrics(alone, stage)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    found: dict[str, Any] = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True)) for key in TRAINED
    }
    return found | weights_apart(run_dir, alone, stage)


def weights_apart(run_dir: Path, alone: Path, stage: str) -> dict[str, Any]:
    ours, theirs = weights(run_dir, stage), weights(alone, stage)
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    return {"weight": apart.max().item(), "weights above 1e-6": int((apart > 1e-6).sum()), "weights": apart.numel()}


def update_apart(run_dir: Path, alone: Path) -> dict[str, Any]:
    (ours,), (theirs,) = metrics(run_dir, "ppo"), metrics(alone, "ppo")
    apart = {key: abs(ours[key] - theirs[key]) / max(abs(theirs[key]), SMALLEST) for key in UPDATE}
    largest = max(apart, key=apart.__getitem__)
    return {"metric": apart[largest], "which": largest, **weights_apart(run_dir, alone, "ppo")}


def main() -> None:
    results: dict[str, Any] = {"steps": STEPS, "optimizer": OPTIMIZER, "layouts": {}}
    stages = ("pretrain", "sft", "reward_model", "dpo", *STEADIER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder)
        alone = folder / "run-0"
        for number, (layout, (words, variables)) in enumerate(LAYOUTS.items()):
            seconds = run(recipe, folder / f"run-{number}", words, variables)
            print(f"{layout}: {seconds} s", file=sys.stderr, flush=True)
            if number == 0:
                clipped = {stage: sum(line["grad_norm"] > 0.5 for line in metrics(alone, stage)) for stage in stages}
                results["steps that were clipped"] = clipped
                continue
            other = folder / f"run-{number}"
            apart = {stage: trained_apart(other, alone, stage) for stage in stages}
            results["layouts"][layout] = {**apart, "ppo": update_apart(other, alone), "seconds": seconds}
            write("parallel_equality", results)


if __name__ == "__main__":
    main()
