"""LoRA adapters on two ranks against PEFT's in one process: losses, gradient norms, exports, resumed states."""

from __future__ import annotations

import json

import pytest

from tests.unit.parallel.started import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("lora_ranks.py", 2, folder, forks=True)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        "zero 3",
        "zero 3, expert parallel 2",
        "zero 2, expert parallel 2",
        "zero 1",
        "offload",
        "activation checkpointing",
        "frozen experts, zero 3, expert parallel 2",
        "frozen experts, zero 2, expert parallel 2",
    ],
)
def test_losses_and_gradient_norms_equal_those_of_one_process(found: dict, case: str) -> None:
    """Covers attention, shared and routed experts, a trained router, clipping, accumulation, expert learning rates."""
    assert found[case] < 1e-5


def test_bf16_is_near(found: dict) -> None:
    assert found["bf16"] < 0.02


def test_the_initial_adapter_equals_that_of_one_process_bit_for_bit(found: dict) -> None:
    assert found["export at the start"] == {"adapter": 0, "model": 0, "config": 0}


def test_the_trained_adapter_and_the_merged_model_equal_those_of_one_process(found: dict) -> None:
    assert found["export at the end"]["adapter"] < 2e-5
    assert found["export at the end"]["model"] < 2e-5
    assert found["export at the end"]["config"] == 0


def test_frozen_weights_are_sharded_and_have_no_optimizer_state(found: dict) -> None:
    """Each of two ranks has half of the parameters, and moments only for its half of the adapters."""
    whole = found["local sizes, zero 1"]
    for case in ("zero 3", "zero 3, expert parallel 2", "offload"):
        local = found[f"local sizes, {case}"]
        assert local["frozen"] == whole["frozen"] / 2
        assert local["trained"] == local["moments"] == whole["trained"] / 2
        assert local["frozen gradients"] == 0


def test_a_state_loads_with_any_settings_and_bit_for_bit_with_its_own(found: dict) -> None:
    assert found["state read by zero 3, expert parallel 2"] == 0
    assert found["state read by zero 3"] < 1e-5
    assert found["state read by zero 1"] < 1e-5
