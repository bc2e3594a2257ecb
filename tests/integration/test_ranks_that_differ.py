"""Ranks that were started with different recipes or different code end with an error before a model is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align.launch.processes import free_port

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start_two(run_dir: Path, code: list[Path], changes: list[list[str]]) -> list[tuple[int, str]]:
    """Start two ranks without a launcher, each with its own code and overrides; return their exit codes and outputs."""
    port = str(free_port())
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["-m", "align.cli", "run", "tiny", "--run-dir", str(run_dir), "--only", "pretrain"]
    ranks = [
        subprocess.Popen(
            [sys.executable, *words, "parallel.processes=2", *FITTING, *changes[rank]],
            cwd=run_dir.parent,
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(code[rank])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


FITTING = [f"stages.{name}.micro_batch_size=4" for name in ("pretrain", "sft", "reward_model", "dpo")]
FITTING += ["stages.dpo.lora=null"]


def test_ranks_with_different_recipes_are_refused(tmp_path: Path) -> None:
    changes = [[], ["stages.pretrain.optimizer.learning_rate=1e-4"]]
    for code, output in start_two(tmp_path / "run", [ROOT, ROOT], changes):
        assert code == 2, output
        assert "rank 1 differs from rank 0 in the recipe" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run" / "base").exists()


def test_ranks_with_different_code_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for package in ("align", "reward", "eval", "recipes"):
        shutil.copytree(ROOT / package, other / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "align" / "losses" / "ppo.py").open("a", encoding="utf-8") as file:
        file.write("\nCHANGED = True\n")
    for code, output in start_two(tmp_path / "run", [ROOT, other], [[], []]):
        assert code == 2, output
        assert "rank 1 differs from rank 0 in the code of align" in output
