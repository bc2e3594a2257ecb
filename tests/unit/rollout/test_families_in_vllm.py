"""vLLM's own classes sample from the trainer's policy: one family for each kind of seam.

`python -m tests.families` runs the same check on all families.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
from tests.families.engine import TOLERANCE, check_engine
from tests.integration.forked import VLLM, Forked

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SEAMS = {
    "gemma3_text": "tied, sliding window",
    "qwen3_moe": "softmax router, experts that a kernel packs",
    "deepseek_v3": "MLA, sigmoid router with groups and a bias, shared expert",
    "gpt_oss": "sinks, stacked experts",
    "hunyuan_v1_dense": "vLLM's transformers backend",
}
"""A tied Llama is in test_reload.py."""


def write_check(model_type: str, file: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    file.write_text(json.dumps(check_engine(model_type)))


@pytest.mark.parametrize("model_type", SEAMS)
def test_log_probabilities_equal_transformers_before_and_after_updates(model_type: str, tmp_path: Path) -> None:
    process = Forked(write_check, model_type, tmp_path / "found.json", libraries=VLLM)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert max(found["fresh"], *found["updated"]) < TOLERANCE
    assert found["stale"] > 0.1
    assert found["routing"] == (None if model_type in ("gemma3_text", "hunyuan_v1_dense") else 0.0)
