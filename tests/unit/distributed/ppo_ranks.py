"""What the ranks of test_ppo_ranks.py do: learn from the same rounds together and, each for itself, alone."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist

from align.config.parallel import Parallel
from align.config.ppo import PpoStage
from align.distributed import passes
from align.distributed.experts import spread_experts
from align.distributed.export import gathered
from align.rl.follow import load_learners, save_learners
from align.rl.look_back import look_back
from align.rl.score import to_experience
from align.rl.team import Team
from align.rl.update import update
from align.rollout.experience import Experience
from align.train.learner import Learner
from align.train.spread_learner import SpreadLearner, frozen_engine
from tests.unit.rl.small import build, completions, settings

SIZES = {"batch_size": 9, "mini_batch_size": 3, "micro_batch_tokens": 12, "epochs": 2}
"""Mini-batches of three completions of different lengths are cut into two or three passes, often an odd number."""
EXPERTS = Parallel(processes=2, expert_parallel_size=2)
TWO, ONE = (EXPERTS.model_copy(update={"zero_stage": stage}) for stage in (2, 1))
CASES: dict[str, tuple[Parallel, dict[str, Any]]] = {
    "zero 3": (Parallel(processes=2), {}),
    "zero 3, experts over 2": (
        EXPERTS,
        {
            "critic": {"warmup_steps": 1},
            "routing_replay": "trainer",
            "mask_truncated": True,
            "loss_average": "completions",
        },
    ),
    "zero 1, experts over 2": (
        ONE,
        {"algorithm": "grpo", "completions_per_prompt": 3, "kl": {"apply_to": "loss", "estimator": "k3"}},
    ),
    "zero 2, experts over 2, the critic's head": (TWO, {"critic": {"trainable": "head"}}),
    "left out, zero 3": (EXPERTS, {"kl": {"stop": 1e-3}}),
    "left out, zero 2": (TWO, {"kl": {"stop": 1e-3}}),
}


def experience(seed: int) -> Experience:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 12, (count,), generator=generator).tolist()

    made = to_experience(completions(*((tokens(1, 3), tokens(1, 6), True) for _ in range(9))))
    made.score = torch.randn(9, generator=generator)
    made.loss_mask = made.mask.clone()
    return made


def prepared(stage: PpoStage, step: int) -> Experience:
    batch = experience(step)
    if stage.mask_truncated:
        batch.loss_mask[:5] = 0
    return batch


def rounds(stage: PpoStage, team: Team, steps: range) -> list[dict[str, float]]:
    found = []
    for step in steps:
        batch = prepared(stage, step)
        measured = look_back(stage, team, batch, 0.1)
        measured |= update(stage, team, batch, step=step, seed=1, kl_coef=0.1)
        found.append(measured)
    return found


def alone(stage: PpoStage, steps: range) -> tuple[list[dict[str, float]], Team]:
    """The witness: the same loop where the ranks do not know of each other."""
    real, passes.world = passes.world, lambda: (0, 1)
    try:
        team = whole(stage)
        return rounds(stage, team, steps), team
    finally:
        passes.world = real


def whole(stage: PpoStage) -> Team:
    team = build()
    if team.critic is not None and stage.critic.trainable == "head":
        team.critic.model.requires_grad_(False).score.requires_grad_(True)
        team = Team(team.policy, team.ref_model, critic=Learner(team.critic.model, team.critic.settings, total=1))
    return team if stage.algorithm == "ppo" else Team(team.policy, team.ref_model)


def spread(stage: PpoStage, parallel: Parallel) -> Team:
    team = whole(stage)
    learner = partial(SpreadLearner, total=1, parallel=parallel, dtype="float32")
    models = [m for m in (team.policy.model, team.ref_model, team.critic and team.critic.model) if m is not None]
    for model in models:
        trained = model is team.policy.model or stage.critic.trainable == "all"
        spread_experts(model, parallel.expert_parallel_size, trained=trained)
    assert team.ref_model is not None
    return Team(
        policy=learner(team.policy.model, team.policy.settings),
        ref_model=team.ref_model,
        ref_engine=frozen_engine(team.ref_model.requires_grad_(False), parallel, "float32"),
        critic=team.critic and learner(team.critic.model, team.critic.settings),
    )


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest difference of a metric, relative to it or to 0.01."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other), set(one) ^ set(other)
        worst = max(worst, *(abs(one[key] - other[key]) / max(abs(other[key]), 1e-2) for key in other))
    return worst


def weights_differ(team: Team, witness: Team) -> float:
    """The largest difference of an element, on rank 0."""
    theirs = dict(witness.policy.model.named_parameters())
    found = [(name, tensor) for name, tensor in gathered(team.policy.model, torch.float32)]
    if dist.get_rank():
        return 0.0
    return max((tensor - theirs[name]).abs().max().item() for name, tensor in found)


def main(out: Path) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    found: dict[str, Any] = {}
    for name, (parallel, changes) in CASES.items():
        stage = settings(**SIZES, **changes)
        expected, witness = alone(stage, range(2))
        team = spread(stage, parallel)
        measured = rounds(stage, team, range(2))
        found[name] = [difference(measured[:1], expected[:1]), difference(measured[1:], expected[1:])]
        found[f"{name}: weights"] = weights_differ(team, witness)
        found[f"{name}: updates"] = [line["policy_updates"] for line in expected]

    stage, parallel = settings(**SIZES), EXPERTS
    team = spread(stage, parallel)
    rounds(stage, team, range(1))
    save_learners(team, out / "state")
    expected = rounds(stage, team, range(1, 2))
    again = spread(stage, parallel)
    load_learners(again, out / "state")
    found["resumed"] = difference(rounds(stage, again, range(1, 2)), expected)

    team = spread(stage, parallel)
    poisoned = experience(0)
    look_back(stage, team, poisoned, 0.1)
    assert poisoned.advantages is not None
    poisoned.advantages[0, 0] = float("nan")
    once = update(settings(**{**SIZES, "epochs": 1}), team, poisoned, step=0, seed=1, kl_coef=0.1)
    found["a loss that is not finite"] = once
    if dist.get_rank() == 0:
        (out / "rank-0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
