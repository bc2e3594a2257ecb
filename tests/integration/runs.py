"""Run `align run` in a subprocess; read metrics and weights from its run folder."""

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
from tests.integration import forked
from tests.integration.forked import Forked

ROOT = Path(__file__).parents[2]
NOISE = ("time/", "speed/", "memory/", "rollout/")
"""Prefixes of metrics that may differ between two runs of the same recipe: times, speeds, memory, and the rollout
engine's cache hits and retries."""


def small_model(tokenizer_data: list[dict], **config: Any) -> dict[str, Any]:
    """The `model` section of a recipe: two layers, grouped-query attention, four experts; `config` overrides sizes."""
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
"""Settings for `small_model`: a top-1 router with balance loss and z-loss."""


def write_pretraining(folder: Path, path: Path, steps: int) -> None:
    """Write texts.jsonl and recipe.yaml to `folder`: pretraining on two ranks with half of the experts each.

    The recipe refers to the texts as `path`/texts.jsonl.
    """
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
    """os.environ without the variables of torchrun, accelerate and Slurm, and with one OpenMP thread."""
    prefixes = ("SLURM_", "ACCELERATE_")
    kept = {key: value for key, value in os.environ.items() if key not in PLACE and not key.startswith(prefixes)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def start(recipe: Path | str, run_dir: Path, *words: str) -> subprocess.Popen:
    """Start `align run` and ranks of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "align.cli", "run", str(recipe), "--run-dir", str(run_dir), *words],
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fork(recipe: Path | str, run_dir: Path, *words: str) -> Forked:
    """`start`, with processes that do not load the libraries again; see `forked`."""
    return forked.align(["run", str(recipe), "--run-dir", str(run_dir), *words], plain_environment())


def run(recipe: Path | str, run_dir: Path, *words: str, code: int = 0, forks: bool = False) -> str:
    """Run `align run`, which must exit with `code`; return its output. forks: see `fork`."""
    process = (fork if forks else start)(recipe, run_dir, *words)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-3000:]
    return output


def metrics(run_dir: Path, stage: str) -> list[dict]:
    """Lines of the stage's metrics.jsonl without the `NOISE` keys."""
    lines = read_jsonl(run_dir / stage / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(NOISE)} for line in lines]


def weights(run_dir: Path, stage: str) -> dict[str, Tensor]:
    """Weights of the stage's model, from all of its files."""
    files = (run_dir / stage / "model").glob("*.safetensors")
    return {key: value for file in files for key, value in load_file(file).items()}


def exported(run_dir: Path, stage: str) -> dict[str, bytes]:
    """Bytes of each weight file of the stage's model."""
    return {file.name: file.read_bytes() for file in (run_dir / stage / "model").glob("*.safetensors")}
