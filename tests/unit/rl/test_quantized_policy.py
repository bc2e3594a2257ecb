"""PPO on weights in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.pipeline import run
from align.recipes import ppo
from tests.unit.rl.runs import lines, recipe

ADAPTERS = {"lora": {"rank": 2, "quantize": "nf4"}, "critic": {"lora": {"rank": 2, "quantize": "nf4"}}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations."""
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder, steps=2, checkpoint_every=1, **ADAPTERS), folder / "run", say=lambda line: None)
    return folder / "run"


def test_the_sampler_runs_the_quantised_policy_from_the_first_completion_on(whole: Path) -> None:
    first, second = lines(whole)
    assert first["mismatch_max"] < 1e-4  # a sampler with the checkpoint's own weights differs by 0.01 and more
    assert second["mismatch_max"] < 1e-4
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def test_the_manifest_counts_the_weights_of_policy_and_critic(whole: Path) -> None:
    weights = json.loads((whole / "ppo" / "manifest.json").read_text(encoding="utf-8"))["weights"]
    assert weights.keys() == {"policy", "critic"}
    for groups in weights.values():
        assert groups["routed_experts"]["kept"] == 0 < groups["routed_experts"]["quantized"]
        assert groups["router"]["quantized"] == groups["embeddings"]["quantized"] == 0


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_result(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, updates = ppo.update, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        updates.append(options["step"])
        if len(updates) == 2:
            raise KeyboardInterrupt
        return update(*arguments, **options)

    monkeypatch.setattr(ppo, "update", interrupted)
    made = recipe(tmp_path, steps=2, checkpoint_every=1, **ADAPTERS)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "run", say=lambda line: None)
    run(made, tmp_path / "run", resume=True, say=lambda line: None)
    assert updates == [0, 1, 1]
    first, second = (
        load_file(folder / "ppo" / "model" / "adapter_model.safetensors") for folder in (whole, tmp_path / "run")
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
