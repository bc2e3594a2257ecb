"""A command with a wrong path fails before it loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROBE = """
import sys
from align import cli
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 2, ended.code
loaded = {"torch", "transformers", "datasets", "vllm"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "nowhere"],
        ["serve", "nowhere"],
        ["serve-reward", "nowhere"],
        ["serve-rollout", "nowhere"],
        ["show-model", "nowhere"],
        ["report", "nowhere"],
        ["convert", "hot-start", "nowhere", "grown"],
        ["convert", "tokenizer", "nowhere", "tokenizer"],
        ["run", "nowhere"],
        ["run", "tiny", "model={kind: pretrained, path: ./nowhere}"],
        ["run", "tiny", "stages.sft.init_from=./nowhere", "--nproc", "2"],
        ["plan", "nowhere", "--gpu", "h100"],
    ],
    ids=" ".join,
)
def test_a_wrong_path_is_reported_without_loading_torch(words: list[str], tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
