"""Adapters on two ranks against PEFT's own in one process: losses, gradient norms, exports, resumed states."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("lora_ranks.py", 2, folder)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        "zero 3",
        "zero 3, experts over 2",
        "zero 2, experts over 2",
        "zero 1",
        "offload",
        "activation checkpointing",
        "frozen experts, zero 3, experts over 2",
        "frozen experts, zero 2, experts over 2",
    ],
)
def test_losses_and_gradient_norms_are_those_of_one_process(found: dict, case: str) -> None:
    """Adapters on attention, shared and routed experts, a trained router; clipping, accumulation, expert rates."""
    assert found[case] < 1e-5


def test_bf16_is_near(found: dict) -> None:
    assert found["bf16"] < 0.02


def test_the_first_adapter_is_that_of_one_process_bit_for_bit(found: dict) -> None:
    assert found["export at the start"] == {"adapter": 0, "model": 0, "config": 0}


def test_the_trained_adapter_and_the_merged_model_are_what_one_process_saves(found: dict) -> None:
    assert found["export at the end"]["adapter"] < 2e-5
    assert found["export at the end"]["model"] < 2e-5
    assert found["export at the end"]["config"] == 0


def test_frozen_weights_are_cut_up_and_cost_no_more(found: dict) -> None:
    """Of two ranks each holds half, and the optimizer half of the adapters and nothing else."""
    whole = found["held by zero 1"]
    for case in ("zero 3", "zero 3, experts over 2", "offload"):
        held = found[f"held by {case}"]
        assert held["frozen"] == whole["frozen"] / 2
        assert held["trained"] == held["moments"] == whole["trained"] / 2
        assert held["frozen gradients"] == 0


def test_a_state_is_read_by_any_arrangement_and_by_its_own_bit_for_bit(found: dict) -> None:
    assert found["state read by zero 3, experts over 2"] == 0
    assert found["state read by zero 3"] < 1e-5
    assert found["state read by zero 1"] < 1e-5
