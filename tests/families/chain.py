"""The whole chain on one tiny adopted family: `python -m tests.families --chain MODEL_TYPE ...`.

SFT, pairs sampled by vLLM, reward model, DPO with LoRA, PPO with a critic, GRPO with routing replay (mixtures of
experts), evaluation, chat; then the last policy is loaded by plain transformers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from align.data.tokenizer import train_tokenizer
from align.models.family import routed_layers
from align.run.folder import read_jsonl
from tests.tiny_families import VOCABULARY, save_tiny

LENGTH, NEW_TOKENS = 96, 16
NO_THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def docs(view: str, limit: int, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": "python_docs", "view": view, "limit": limit, "max_answer_chars": 100, **more}]


def recipe(checkpoint: Path, *, routed: bool) -> dict[str, Any]:
    """Two steps of every stage."""
    rollout: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "max_model_length": LENGTH, "cache_gib": 0.25}
    training = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "optimizer": {"learning_rate": 1e-3}}
    pairs = {"train": [{"kind": "stage", "stage": "pairs"}], "max_length": LENGTH}
    learning = {
        "prompts": docs("prompts", 16),
        "max_prompt_length": 48,
        "steps": 2,
        "batch_size": 8,
        "mini_batch_size": 4,
    }
    learning |= {"optimizer": {"learning_rate": 1e-3}, "rollout": rollout}
    rewards = [{"kind": "model", "init_from": "reward_model"}]
    stages: dict[str, Any] = {
        "sft": {
            "kind": "sft",
            "init_from": "base",
            "data": {"train": docs("conversation", 16), "max_length": LENGTH},
            **training,
        },
        "pairs": {
            "kind": "sample",
            "init_from": "base",
            "train": docs("prompts", 8),
            "neighbours": 0,
            "rollout": rollout,
        },
        "reward_model": {"kind": "reward_model", "init_from": "sft", "data": pairs, **training},
        "dpo": {"kind": "dpo", "init_from": "sft", "data": pairs, "lora": {"rank": 2}, **training},
        "ppo": {"kind": "ppo", "init_from": "dpo", "rewards": rewards, "critic": {"learning_rate": 1e-3}, **learning},
        "grpo": {
            "kind": "ppo",
            "init_from": "ppo",
            "rewards": rewards,
            "advantage_estimator": "grpo",
            "completions_per_prompt": 2,
            **learning,
        },
        "evaluate": {
            "kind": "evaluate",
            "models": ["base", "grpo"],
            "prompts": docs("prompts", 4, split="held_out"),
            "reward_model": "reward_model",
            "rollout": rollout,
        },
    }
    if routed:
        stages["grpo"] |= {"rollout": {**rollout, "return_routing": True}, "routing_replay": "rollout"}
    model = {"kind": "pretrained", "path": str(checkpoint)}
    return {"name": "families", "seed": 0, "model": model, "stages": stages}


Run = Callable[[list[str], Mapping[str, str]], tuple[int, str]]


def align(words: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of `align WORDS`."""
    command = [sys.executable, "-m", "align.cli", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def check_chain(model_type: str, folder: Path, run: Run = align, **changes: Any) -> dict[str, float]:
    """Largest mismatch between sampler and trainer in PPO and GRPO. run: runs `align WORDS`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = folder / "checkpoint"
    texts = [path.read_text(errors="ignore") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    # Some families, such as Qwen2, load it as a class of their own that adds special tokens.
    tokenizer = train_tokenizer(texts, VOCABULARY - 16)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    plain = save_tiny(model_type, checkpoint, eos_token_id=tokenizer.eos_token_id, **{**ids, **changes})
    tokenizer.save_pretrained(checkpoint)
    file, run_dir = folder / "recipe.yaml", folder / "run"
    routed = any(layer.experts > 1 for layer in routed_layers(plain.config))
    file.write_text(yaml.safe_dump(recipe(checkpoint, routed=routed), sort_keys=False), encoding="utf-8")
    code, output = run(["run", str(file), "--run-dir", str(run_dir)], {**os.environ, **NO_THREADS})
    assert code == 0, output[-3000:]
    found: dict[str, float] = {}
    for stage in ("ppo", "grpo"):
        lines = read_jsonl(run_dir / stage / "metrics.jsonl")
        assert len(lines) == 2
        found[stage] = max(line["mismatch_max"] for line in lines)
        assert found[stage] < 1e-4, f"{stage}: mismatch {found[stage]}"
    for stage in ("sft", "reward_model", "dpo"):
        assert all(
            math.isfinite(line["loss"]) for line in read_jsonl(run_dir / stage / "metrics.jsonl") if "loss" in line
        )
    result: Any = AutoModelForCausalLM.from_pretrained(run_dir / "grpo" / "model", dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(run_dir / "grpo" / "model")
    with torch.no_grad():
        logits = result(input_ids=torch.tensor([loaded("def f(x): return x")["input_ids"]])).logits
    assert logits.isfinite().all()
    chat = [sys.executable, "-m", "align.cli", "chat", str(run_dir / "grpo"), "--max-new-tokens", "4"]
    said = subprocess.run(
        chat, input="What?\n", env={**os.environ, **NO_THREADS}, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr[-2000:]
    return found
