"""`align run` in a process of its own, and what it leaves in the run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from align.launch.processes import PLACE
from align.run.folder import read_jsonl

ROOT = Path(__file__).parents[2]
NOISE = ("time/", "speed/", "memory/", "rollout/")
"""What the clock and the machine's memory say."""


def small_model(tokenizer_data: list[dict], **config: Any) -> dict[str, Any]:
    """A recipe's `model`: two layers, grouped heads, experts."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
    }
    tokenizer = {"vocab_size": 300, "data": tokenizer_data}
    return {"kind": "scratch", "tokenizer": tokenizer, "config": sizes | config}


ROUTED: dict[str, Any] = {
    "num_experts": 8,
    "moe_topk": 1,
    "num_shared_expert": 1,
    "router_aux_loss_coef": 0.02,
    "router_z_loss_coef": 0.001,
}
"""For `small_model`: a top-1 router with both of its losses."""


def write_pretraining(folder: Path, path: Path, steps: int) -> None:
    """A recipe of pretraining on two ranks that hold half of the experts each; its texts, in `folder`, are named by
    `path`."""
    texts = [{"text": f"{n} and {n + 1} make {2 * n + 1}."} for n in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    source = [{"kind": "file", "path": str(path / "texts.jsonl")}]
    pretrain = {"kind": "pretrain", "data": {"train": source, "max_length": 32}, "max_steps": steps}
    content = {
        "name": "pretraining",
        "parallel": {"processes": 2, "expert_parallel_size": 2},
        "model": small_model(source),
        "stages": {"pretrain": {**pretrain, "batch_size": 8, "micro_batch_size": 2}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def plain_environment() -> dict[str, str]:
    """Of a process that nothing has started as a rank, and that computes with one thread."""
    prefixes = ("SLURM_", "ACCELERATE_")
    kept = {key: value for key, value in os.environ.items() if key not in PLACE and not key.startswith(prefixes)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def start(recipe: Path | str, run_dir: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "align.cli", "run", str(recipe), "--run-dir", str(run_dir), *words],
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(recipe: Path | str, run_dir: Path, *words: str, code: int = 0) -> str:
    """What it printed; it must end with `code`."""
    process = start(recipe, run_dir, *words)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-3000:]
    return output


def metrics(run_dir: Path, stage: str) -> list[dict]:
    """The log, without `NOISE`."""
    lines = read_jsonl(run_dir / stage / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(NOISE)} for line in lines]


def weights(run_dir: Path, stage: str) -> dict[str, Tensor]:
    """Of the stage's model, from all of its files."""
    files = (run_dir / stage / "model").glob("*.safetensors")
    return {key: value for file in files for key, value in load_file(file).items()}


def exported(run_dir: Path, stage: str) -> dict[str, bytes]:
    """The same, file by file."""
    return {file.name: file.read_bytes() for file in (run_dir / stage / "model").glob("*.safetensors")}
