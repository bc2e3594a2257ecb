"""Adopted families on two ranks with ZeRO-3 and sharded experts, against one process in plain torch."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

MODEL_TYPES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text"]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("families")
    run_ranks("family_ranks.py", 2, folder, *MODEL_TYPES, forks=True)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_losses_and_export_equal_those_of_one_process(found: dict, model_type: str, trained: str) -> None:
    """Covers packed rows, routers' correction biases, transposed experts with biases, sinks and a tied head."""
    case = found[f"{model_type}, {trained}"]
    assert case["losses"] < 1e-5
    assert case["weights"] < 1e-4
    assert case["moved"] > 1e-4
