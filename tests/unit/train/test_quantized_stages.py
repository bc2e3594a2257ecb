"""Stages that train adapters on weights in 4 bits.

Witness: the same stages with adapters on a checkpoint whose weights have the dequantised values in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.recipe import Recipe
from align.data.tokenizer import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.quantized import quantize_model, quantized_weights
from align.pipeline import run
from align.run.folder import read_jsonl
from tests.unit.models.adapted import SIZES

STAGES = ("sft", "reward_model", "dpo", "kto")
STEPS = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and one with the values that its weights have after a conversion to 4 bits and back."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["It is one. Say two. No, three."], 300)
    config = HunYuanConfig(**SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.2})
    model: Any = HunYuanForCausalLM(config)
    folders = [tmp_path_factory.mktemp(name) for name in ("base", "dequantised")]
    for folder in folders:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    quantize_model(model)
    stand_ins = quantized_weights(model)
    dense: Any = HunYuanForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.no_grad():
        for own, parameter in zip(dense.parameters(), model.parameters(), strict=True):
            if id(parameter) in stand_ins:
                own.copy_(stand_ins[id(parameter)].dense(torch.float32))
    dense.save_pretrained(folders[1])
    return folders[0], folders[1]


def train(base: Path, folder: Path, **lora: Any) -> Path:
    """Train an adapter on `base` in each stage."""
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No." * (n % 3 + 1)} for n in range(8)]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training: dict[str, Any] = {
        "init_from": "base",
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "lora": {"rank": 4, **lora},
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": STEPS,
    }
    files = {"sft": "judged", "reward_model": "pairs", "dpo": "pairs", "kto": "judged"}
    stages = {
        kind: {"kind": kind, **training, "data": {"train": [{"kind": "file", "path": str(folder / f"{file}.jsonl")}]}}
        for kind, file in files.items()
    }
    for stage in stages.values():
        stage["data"]["max_length"] = 48
    model = {"kind": "pretrained", "path": str(base)}
    run(Recipe.model_validate({"name": "small", "model": model, "stages": stages}), folder / "run", say=lambda _: None)
    return folder / "run"


@pytest.mark.slow
def test_stages_train_as_on_the_dequantised_weights(bases: tuple[Path, Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("quantised", "dense", "plain")]
    for folder in folders:
        folder.mkdir()
    found = train(bases[0], folders[0], quantize="nf4")
    expected = train(bases[1], folders[1])
    plain = train(bases[0], folders[2])
    for stage in STAGES:
        lines = [read_jsonl(run_folder / stage / "metrics.jsonl") for run_folder in (found, expected, plain)]
        for ours, theirs, other in zip(*lines, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), stage
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), stage
            assert ours["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-3), stage
        adapters = [load_file(each / stage / "model" / "adapter_model.safetensors") for each in (found, expected)]
        assert adapters[0].keys() == adapters[1].keys()
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(tensor, adapters[1][name], atol=1e-3, rtol=1e-2, msg=f"{stage}: {name}")
        weights = json.loads((found / stage / "manifest.json").read_text(encoding="utf-8"))["weights"]["model"]
        assert weights["routed_experts"]["kept"] == 0 < weights["routed_experts"]["quantized"]
