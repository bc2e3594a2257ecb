"""Stages whose results are adapters beside their base train the models that stages with merged results train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import load_recipe
from align.pipeline import run
from align.run.folder import read_jsonl
from tests.integration.runs import small_model

PAIRS = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No." * (n % 3 + 1)} for n in range(8)]
STAGES = ("sft", "reward_model", "dpo", "ppo")
COMPARED = {"loss", "grad_norm", "score", "kl", "policy_loss", "value_loss"}


def recipe(folder: Path, save: str) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    source = [{"kind": "file", "path": str(folder / "pairs.jsonl")}]
    training: dict[str, Any] = {
        "data": {"train": source, "max_length": 48},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "lora": {"rank": 4, "train_router": True, "save": save},
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 2,
    }
    rows = [{**source[0], "columns": {"prompt": "prompt", "completion": "chosen"}}]
    ppo = {
        "kind": "ppo",
        "init_from": "dpo",
        "prompts": source,
        "max_prompt_length": 40,
        "rewards": [{"kind": "model", "init_from": "reward_model"}],
        "rollout": {"engine": "huggingface", "max_new_tokens": 4, "max_model_length": 48},
        "lora": training["lora"],
        "critic": {"lora": {"rank": 2}},
        "steps": 2,
        "batch_size": 4,
        "mini_batch_size": 4,
    }
    stages = {
        "sft": {"kind": "sft", **training, "data": {"train": rows, "max_length": 48}},
        "reward_model": {"kind": "reward_model", "init_from": "sft", **training},
        "dpo": {"kind": "dpo", "init_from": "sft", **training},
        "ppo": ppo,
    }
    text = [{"kind": "file", "path": str(folder / "pairs.jsonl"), "columns": {"text": "chosen"}}]
    content = {"name": save, "model": small_model(text, initializer_range=0.1), "stages": stages}
    (folder / f"{save}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / f"{save}.yaml"


@pytest.mark.slow
def test_the_stages_have_equal_metrics_and_the_base_is_stored_once(tmp_path: Path) -> None:
    for save in ("adapter", "merged"):
        run(load_recipe(recipe(tmp_path, save)), tmp_path / save, say=lambda line: None)
    weights = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*/model/*.safetensors"))
    assert [name for name in weights if name.startswith("adapter/")] == [
        "adapter/base/model/model.safetensors",
        *(f"adapter/{stage}/model/adapter_model.safetensors" for stage in sorted(STAGES)),
    ]
    assert not list(tmp_path.rglob(".merged-*"))
    for stage in STAGES:
        found, wanted = (read_jsonl(tmp_path / save / stage / "metrics.jsonl") for save in ("adapter", "merged"))
        assert [line["step"] for line in found] == [line["step"] for line in wanted]
        for one, other in zip(found, wanted, strict=True):
            for name in COMPARED & set(other):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (stage, name)
        assert COMPARED & set(wanted[0])
    again = [(file, file.stat().st_mtime_ns) for file in tmp_path.rglob("manifest.json")]
    run(load_recipe(tmp_path / "adapter.yaml"), tmp_path / "adapter", say=lambda line: None)  # all stages are kept
    assert again == [(file, file.stat().st_mtime_ns) for file in tmp_path.rglob("manifest.json")]
