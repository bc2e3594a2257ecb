"""`share_trunk`: less memory, the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.models.shared_weights import SharedWeights
from align.pipeline import run
from align.plan.job import jobs_of
from align.rl.models import build_models, load_reward_models
from align.run.context import StageContext
from tests.unit.rl.runs import lines, recipe

REWARD_MODEL: dict[str, Any] = {"kind": "model", "init_from": "reward_model"}
ADAPTERS = {"lora": {"rank": 2}, "critic": {"lora": {"rank": 2}}}


def with_reward_model(folder: Path, **settings: Any):
    """PPO on a reward model that was trained with adapters on attention."""
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}.", "chosen": f"{word} is it", "rejected": "no"} for word in ("one", "two", "six")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scorer = {
        "kind": "reward_model",
        "data": {"train": [{"kind": "file", "path": str(pairs)}], "max_length": 64},
        "lora": {"rank": 2, "shared_mlp": False, "experts": False, "train_router": False},
        "max_steps": 2,
        "batch_size": 2,
    }
    return recipe(folder, before={"reward_model": scorer}, rewards=[REWARD_MODEL], steps=2, **settings)


@pytest.mark.parametrize("settings", [ADAPTERS, {"critic": {"trainable": "head"}}], ids=["adapters", "head"])
def test_a_run_with_shared_weights_is_the_run_without(tmp_path, settings) -> None:
    said: list[str] = []
    for share in (True, False):
        made = with_reward_model(tmp_path, share_trunk=share, **settings)
        run(made, tmp_path / str(share), say=said.append)
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    assert sum("in memory once" in line for line in said) == 1
    weights = [
        file.read_bytes()
        for share in (True, False)
        for file in (tmp_path / str(share) / "ppo" / "model").glob("*.safetensors")
    ]
    assert len(weights) == 2
    assert weights[0] == weights[1]


def test_policy_critic_and_reward_model_hold_one_trunk(tmp_path) -> None:
    made = with_reward_model(tmp_path, **ADAPTERS)
    run(made, tmp_path / "run", only="base", say=lambda line: None)
    run(made, tmp_path / "run", only="reward_model", say=lambda line: None)
    context, shared = StageContext(made, "ppo", tmp_path / "run"), SharedWeights()
    scorer = load_reward_models(made.stages["ppo"], context, shared)["reward_model"].model
    models = build_models(made.stages["ppo"], context, shared)
    trunks = [
        {p.data_ptr(): p.numel() for p in model.parameters() if not p.requires_grad}
        for model in (scorer, models.policy.model, models.critic.model)
    ]
    together = sum({key: size for trunk in trunks for key, size in trunk.items()}.values())
    attention = sum(p.numel() for n, p in scorer.named_parameters() if "attn" in n and n.endswith("proj.weight"))
    # The adapters of the reward model changed attention: the policy has its own. The critic starts from the scorer.
    heads = 2 * scorer.config.hidden_size  # the scorer's, and the frozen original of the critic's zeroed head
    assert together <= sum(trunks[1].values()) + attention + heads
    assert sum(sum(trunk.values()) for trunk in trunks) > 2.5 * together
    (job,) = jobs_of(made, None, "ppo")
    assert sum(job.shared(member) for member in job.members) == shared.shared
