"""A checkpoint restores the whole training state: weights, optimizer, order of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.config import load_recipe
from align.pipeline import run
from align.run.folder import read_jsonl
from tests.integration.runs import NOISE
from tests.unit.train.one_step import checkpoint, run_stage

SOURCE = {"kind": "python_docs", "view": "conversation", "limit": 16, "max_answer_chars": 60}


def recipe(folder: Path, **sft):
    content = {
        "name": "resume",
        "model": {
            "kind": "scratch",
            "tokenizer": {"vocab_size": 300, "data": [{"kind": "python_docs", "view": "text", "limit": 20}]},
            "config": {
                "hidden_size": 32,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_experts": 4,
                "initializer_range": 0.1,
            },
        },
        "keep_checkpoints": True,  # a finished run is made an interrupted one
        "stages": {
            "sft": {
                "kind": "sft",
                "data": {"train": [SOURCE], "max_length": 64},
                "optimizer": {"learning_rate": 1e-2, "expert_learning_rate_scale": 0.5},
                "batch_size": 4,
                "micro_batch_size": 2,
                "max_steps": 8,
                "epochs": 2.0,
                "checkpoint_every": 5,
                **sft,
            }
        },
    }
    path = folder / "resume.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(path)


def preferences(folder: Path) -> dict:
    """The data section of a stage with 16 pairs in a file."""
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea " + "x" * n} for n in range(16)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {"data": {"train": [{"kind": "file", "path": str(path)}], "max_length": 128}}


CASES = {
    "full": {},
    "lora": {"lora": {"rank": 4, "save": "merged"}},
    "grouped": {"group_by_length": True},
    "dpo with lora": {"kind": "dpo", "lora": {"rank": 4, "save": "merged"}},
    "dpo": {"kind": "dpo"},
    "kto": {"kind": "kto", "batch_size": 8},
    "reward model with lora": {"kind": "reward_model", "lora": {"rank": 4, "save": "merged"}},
}


LONG = {"grouped", "dpo with lora", "dpo", "kto", "reward model with lora"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in CASES])
def test_a_stage_interrupted_after_a_checkpoint_ends_like_an_uninterrupted_one(tmp_path, case) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    changes = CASES[case]
    settings = recipe(tmp_path, **(preferences(tmp_path) if "kind" in changes else {}), **changes)
    for folder in (uninterrupted, interrupted):
        run(settings, folder, say=lambda line: None)
    # As after a kill at step 7: no manifest, no model, the checkpoint of step 5 (second epoch), 7 metrics lines.
    for name in ("manifest.json", "model/model.safetensors", "model/config.json"):
        (interrupted / "sft" / name).unlink()
    (interrupted / "sft" / "checkpoints" / "checkpoint-8" / "complete").unlink()
    lines = (interrupted / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (interrupted / "sft" / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n", encoding="utf-8")

    torch.manual_seed(12345)  # the generator's state in another process is arbitrary
    run(settings, interrupted, resume=True, say=lambda line: None)

    written = [
        [{key: line[key] for key in line if not key.startswith(NOISE)} for line in read_jsonl(folder / "sft" / name)]
        for name in ("metrics.jsonl", "experts.jsonl")
        for folder in (uninterrupted, interrupted)
    ]
    assert [line["step"] for line in written[0]] == list(range(1, 9))
    assert written[0] == written[1]
    assert [line["step"] for line in written[2]] == list(range(1, 9))
    assert written[2] == written[3]
    expected, found = (
        load_file(folder / "sft" / "model" / "model.safetensors") for folder in (uninterrupted, interrupted)
    )
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_stage_interrupted_after_its_last_step_trains_no_more(tmp_path) -> None:
    """The last of 2 steps is in the middle of an epoch of 3; the process was killed before it had written the model."""
    model, settings = checkpoint(tmp_path / "model"), {"batch_size": 2, "max_steps": 2}
    folder = tmp_path / "run" / "stage"
    run_stage("sft", model, tmp_path, **settings)
    expected, written = load_file(folder / "model" / "model.safetensors"), (folder / "metrics.jsonl").read_text()
    (folder / "model" / "model.safetensors").unlink()
    run_stage("sft", model, tmp_path, resume=True, **settings)
    assert (folder / "metrics.jsonl").read_text() == written
    assert written.count("\n") == 2
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_models_configuration_can_be_overridden_without_changing_its_files(tmp_path) -> None:
    run(recipe(tmp_path), tmp_path / "first", say=lambda line: None)
    trained = tmp_path / "first" / "sft" / "model"
    before = (trained / "config.json").read_text(encoding="utf-8")
    content = yaml.safe_load((tmp_path / "resume.yaml").read_text(encoding="utf-8"))
    changes = {"moe_drop_tokens": True, "moe_random_routing_dropped_token": True, "capacity_factor": 1.0}
    content["model"] = {"kind": "pretrained", "path": str(trained), "config": changes}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    run(load_recipe(tmp_path / "second.yaml"), tmp_path / "second", say=lambda line: None)
    assert (trained / "config.json").read_text(encoding="utf-8") == before
    lines = (tmp_path / "second" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line)["recycled_share"] for line in lines) > 0
    assert sum(json.loads(line)["dropped_share"] for line in lines) == 0


def test_full_training_in_bfloat16_keeps_small_updates(tmp_path) -> None:
    """Norm weights start at 1, where bfloat16's spacing is at least 0.4 %. Steps of 0.1 % only add up in float32."""
    content = recipe(tmp_path, optimizer={"learning_rate": 1e-3, "schedule": "constant"}).model_dump(mode="json")
    settings = load_recipe_from({**content, "dtype": "bfloat16"}, tmp_path)
    run(settings, tmp_path / "run", say=lambda line: None)
    weights = load_file(tmp_path / "run" / "sft" / "model" / "model.safetensors")
    norms = torch.cat([tensor for name, tensor in weights.items() if "norm" in name])
    assert norms.dtype == torch.bfloat16
    assert (norms != 1).float().mean() > 0.3


def load_recipe_from(content: dict, folder: Path):
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(path)
