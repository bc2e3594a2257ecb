"""Train PPO on the same rollout batches, sharded over the ranks and unsharded on each; run by test_ppo_ranks.py."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from align.config.parallel import Parallel
from align.config.ppo import PpoStage
from align.data.experience import Experience
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.launch.ending import end_process
from align.models.hunyuan import HunYuanConfig, HunYuanForSequenceClassification
from align.parallel import micro_batches
from align.parallel.experts import shard_experts
from align.parallel.export import gathered
from align.parallel.group import start_deepspeed
from align.parallel.sharding import local_values
from align.reward.model import ModelScorer
from align.rl.complete import complete_batch
from align.rl.models import Models
from align.rl.score import to_experience
from align.rl.update import update
from align.train.frozen import FrozenModel
from align.train.learner import LocalLearner
from align.train.sharded_learner import ShardedLearner
from tests.unit.rl import small
from tests.unit.rl.small import build, completions, settings

SIZES = {"batch_size": 9, "mini_batch_size": 3, "micro_batch_tokens": 12, "epochs": 2}
"""Mini-batches of three completions of different lengths have two or three micro-batches, often an odd number."""
EXPERTS = Parallel(processes=2, expert_parallel_size=2)
TWO, ONE = (EXPERTS.model_copy(update={"zero_stage": stage}) for stage in (2, 1))
THREE, NONE = (Parallel(processes=2, zero_stage=stage) for stage in (3, 0))
DECAY = 0.75
CASES: dict[str, tuple[Parallel, dict[str, Any]]] = {
    "zero 3": (THREE, {}),
    "zero 0": (NONE, {}),
    "zero 3, expert parallel 2": (
        EXPERTS,
        {
            "critic": {"warmup_steps": 1},
            "routing_replay": "trainer",
            "mask_truncated": True,
            "loss_average": "completions",
        },
    ),
    "zero 1, expert parallel 2": (
        ONE,
        {"advantage_estimator": "grpo", "completions_per_prompt": 3, "kl": {"apply_to": "loss", "estimator": "k3"}},
    ),
    "zero 2, expert parallel 2, the critic's head": (TWO, {"critic": {"trainable": "head"}}),
    "zero 3, expert parallel 2, activation checkpointing": (EXPERTS, {"gradient_checkpointing": True}),
    "zero 3, the sampler's log-probabilities": (THREE, {"old_logprobs": "rollout"}),
    "kl stop, zero 3": (EXPERTS, {"kl": {"stop": 1e-3}}),
    "kl stop, zero 2": (TWO, {"kl": {"stop": 1e-3}}),
    "kl stop, zero 0": (NONE, {"kl": {"stop": 1e-3}}),
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


def rollout_batch(stage: PpoStage, step: int) -> Experience:
    batch = experience(step)
    if stage.mask_truncated:
        batch.loss_mask[:5] = 0
    return batch


def rounds(stage: PpoStage, models: Models, steps: range) -> list[dict[str, float]]:
    found = []
    for step in steps:
        batch = rollout_batch(stage, step)
        measured = complete_batch(stage, models, batch, 0.1)
        measured |= update(stage, models, batch, step=step, seed=1, kl_coef=0.1)
        found.append(measured)
    return found


def alone(stage: PpoStage, steps: range) -> tuple[list[dict[str, float]], Models]:
    """Run the same loop unsharded on each rank, without collectives, for the expected results."""
    real, micro_batches.world = micro_batches.world, lambda: (0, 1)
    try:
        models = unsharded(stage)
        return rounds(stage, models, steps), models
    finally:
        micro_batches.world = real


def unsharded(stage: PpoStage) -> Models:
    models = build()
    if models.critic is not None and stage.critic.trainable == "head":
        models.critic.model.requires_grad_(False).score.requires_grad_(True)
        models.critic = LocalLearner(models.critic.model, models.critic.settings, total=1)
    if stage.advantage_estimator != "gae":
        models.critic = None
    models.policy.track_ema(DECAY)
    return models


def sharded(stage: PpoStage, parallel: Parallel, dtype: str = "float32") -> Models:
    local = unsharded(stage)
    learner = partial(ShardedLearner, total=1, parallel=parallel, dtype=dtype)
    policy, reference, critic = local.policy.model, local.reference.model, local.critic and local.critic.model
    for model in (policy, reference, critic):
        if model is not None:
            trained = model is policy or stage.critic.trainable == "all"
            shard_experts(model.to(getattr(torch, dtype)), parallel.expert_parallel_size, trained=trained)
            if stage.gradient_checkpointing and model is not reference:
                model.gradient_checkpointing_enable()
    return Models(
        policy=learner(policy, local.policy.settings, ema_decay=DECAY),
        reference=FrozenModel(reference, parallel, dtype),
        critic=local.critic and learner(critic, local.critic.settings),
    )


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Largest difference of a metric, relative to its absolute value (at least 0.01)."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other), set(one) ^ set(other)
        worst = max(worst, *(abs(one[key] - other[key]) / max(abs(other[key]), 1e-2) for key in other))
    return worst


def weights(models: Models) -> dict[str, torch.Tensor]:
    """Full weights of the policy on rank 0; empty tensors on the other ranks."""
    return {name: tensor.clone() for name, tensor in gathered(models.policy.model, torch.float32)}


def ema_weights(models: Models) -> dict[str, torch.Tensor]:
    models.policy.swap_ema()
    found = weights(models)
    models.policy.swap_ema()
    return found


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of an element on rank 0; 0 on the other ranks."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one) if dist.get_rank() == 0 else 0.0


def against_alone(stage: PpoStage, parallel: Parallel) -> dict[str, Any]:
    """Differences between the sharded and the unsharded models after two iterations."""
    expected, witness = alone(stage, range(2))
    models = sharded(stage, parallel)
    measured, seen = [], [weights(models)]
    for step in range(2):
        measured += rounds(stage, models, range(step, step + 1))
        seen.append(weights(models))
    by_hand = {
        name: DECAY * (DECAY * first + (1 - DECAY) * seen[1][name]) + (1 - DECAY) * seen[2][name]
        for name, first in seen[0].items()
    }
    return {
        "metrics": [difference(measured[:1], expected[:1]), difference(measured[1:], expected[1:])],
        "weights": differ(weights(models), weights(witness)),
        "ema": differ(ema_weights(models), ema_weights(witness)),
        "ema by hand": differ(ema_weights(models), by_hand),
        "weights after swapping the ema": differ(weights(models), seen[2]),
        "updates": [line["policy_updates"] for line in expected],
    }


def save(models: Models, folder: Path) -> None:
    for name, learner in models.learners.items():
        learner.save(folder / name)


def load(models: Models, folder: Path) -> None:
    for name, learner in models.learners.items():
        learner.load(folder / name)


def resumed(out: Path) -> dict[str, Any]:
    """Save a state under `EXPERTS`, load it under several settings and train one iteration.

    Returns the differences from the run that saved the state, by setting.
    """
    stage = settings(**SIZES)
    models = sharded(stage, EXPERTS)
    rounds(stage, models, range(1))
    save(models, out / "state")
    expected = rounds(stage, models, range(1, 2))
    found = {}
    for name, parallel in {"the same": EXPERTS, "zero 2": TWO, "zero 0": NONE}.items():
        again = sharded(stage, parallel)
        load(again, out / "state")
        found[name] = [
            difference(rounds(stage, again, range(1, 2)), expected),
            differ(ema_weights(again), ema_weights(models)),
        ]
    return found


def resumed_bf16(out: Path) -> list[float]:
    """Resume in bf16 without ZeRO: largest differences of metrics and of weights, and the largest weight change."""
    stage = settings(**SIZES)
    models = sharded(stage, NONE, "bfloat16")
    before = {name: tensor.float().clone() for name, tensor in models.policy.model.named_parameters()}
    rounds(stage, models, range(1))
    save(models, out / "bf16")
    expected = rounds(stage, models, range(1, 2))
    again = sharded(stage, NONE, "bfloat16")
    load(again, out / "bf16")
    apart = difference(rounds(stage, again, range(1, 2)), expected)
    pairs = zip(again.policy.model.named_parameters(), models.policy.model.parameters(), strict=True)
    ranks = torch.tensor([max((ours - theirs).abs().max().item() for (_, ours), theirs in pairs)])
    dist.all_reduce(ranks, dist.ReduceOp.MAX)
    moved = max((t.float() - before[name]).abs().max().item() for name, t in models.policy.model.named_parameters())
    return [apart, ranks.item(), moved]


def scored(out: Path) -> dict[str, Any]:
    """Differences between the scores of a sharded and an unsharded reward model, and this rank's share of the model."""
    folder = out / "reward"
    if dist.get_rank() == 0:
        tokenizer = train_tokenizer(["a"], 259)
        torch.manual_seed(3)
        sizes = {**small.SIZES, "vocab_size": len(tokenizer), "num_labels": 1}
        HunYuanForSequenceClassification(HunYuanConfig(**sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dist.barrier()
    batch = experience(0)
    real, micro_batches.world = micro_batches.world, lambda: (0, 1)
    try:
        witness = ModelScorer(folder, "float32", 12)
        expected = witness.scores(batch)
    finally:
        micro_batches.world = real
    found = {}
    for name, parallel in {
        "zero 3": THREE,
        "zero 3, expert parallel 2": EXPERTS,
        "zero 2, expert parallel 2": TWO,
        "zero 0": NONE,
    }.items():
        scorer = ModelScorer(folder, "float32", 12, parallel)
        local, total = (
            sum(local_values(parameter).numel() for parameter in model.parameters())
            for model in (scorer.model, witness.model)
        )
        found[name] = {
            "difference": (scorer.scores(batch) - expected).abs().max().item(),
            "again": (scorer.scores(batch.rows(torch.tensor([4, 1]))) - expected[[4, 1]]).abs().max().item(),
            "local share": local / total,
        }
    found["standard deviation"] = expected.std().item()
    return found


def poisoned_update(parallel: Parallel) -> dict[str, Any]:
    """Errors of all ranks for an update with NaN advantages, and the largest change of a weight."""
    stage = settings(**{**SIZES, "epochs": 1})
    models = sharded(stage, parallel)
    poisoned = experience(0)
    complete_batch(stage, models, poisoned, 0.1)
    assert poisoned.advantages is not None
    poisoned.advantages[:, 0] = float("nan")
    before = weights(models)
    try:
        error = str(update(stage, models, poisoned, step=0, seed=1, kl_coef=0.1))
    except UserError as found:
        error = str(found)
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return {"errors": errors, "moved": differ(weights(models), before)}


def main(out: Path) -> None:
    start_deepspeed("gloo")
    found: dict[str, Any] = {}
    for name, (parallel, changes) in CASES.items():
        found[name] = against_alone(settings(**SIZES, **changes), parallel)
    found["resumed"] = resumed(out)
    found["resumed in bf16"] = resumed_bf16(out)
    found["scores"] = scored(out)

    for name, parallel in {"zero 3, expert parallel 2": EXPERTS, "zero 0": NONE}.items():
        found[f"a loss that is not finite, {name}"] = poisoned_update(parallel)
    if dist.get_rank() == 0:
        (out / "rank-0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
    end_process(0)
