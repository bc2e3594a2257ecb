"""How rank 0, which alone samples, has the other ranks ask its reward models, look back and learn with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import PpoStage
from align.data.experience import Experience
from align.models.weights import published_weights
from align.parallel.sharding import world
from align.rl.complete import look_back
from align.rl.models import Team, build_team, load_reward_models
from align.rl.update import update
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_tokenizer, save_model
from align.train.learner import Learner
from align.train.sharded_learner import SpreadLearner


def is_follower() -> bool:
    return world()[0] > 0


def tell(order: str, *details: Any) -> None:
    """Have the other ranks, where there are any, do what this one is about to do."""
    if world()[1] > 1:
        from align.parallel.group import broadcast

        broadcast((order, details))


def follow(stage: PpoStage, context: StageContext) -> StageResult:
    """What ranks other than 0 do in a stage of policy optimisation: the same calls, until the model is saved."""
    from align.parallel.group import broadcast

    seed = context.seed
    reward_models = load_reward_models(stage, context)
    team = build_team(stage, context)
    batch: Experience | None = None
    while True:
        order, details = broadcast(None)
        match order, details:
            case "score", (name, asked):
                reward_models[name].scores(asked)
            case "look_back", (batch, kl_coef):
                look_back(stage, team, batch, kl_coef)
            case "update", (step, kl_coef):
                assert batch is not None
                update(stage, team, batch, step=step, seed=seed, kl_coef=kl_coef)
            case "send", ():
                for _ in spread_weights(team):
                    pass
            case "save", (folder,):
                save_learners(team, folder)
            case "load", (folder,):
                load_learners(team, folder)
            case "finish", ():
                tokenizer = load_tokenizer(context.checkpoint(stage.init_from))
                team.take_average()
                save_model(team.policy.model, tokenizer, context.dir, context.recipe.dtype, context.recipe.parallel)
                return StageResult()


def policy_weights(team: Team) -> Iterator[tuple[str, Tensor]]:
    """The policy under its published names, for the sampler."""
    return spread_weights(team) if isinstance(team.policy, SpreadLearner) else published_weights(team.policy.model)


def spread_weights(team: Team) -> Iterator[tuple[str, Tensor]]:
    """The same from all ranks: rank 0 sees the tensors, and all must iterate to the end."""
    from align.parallel.export import gathered, published

    model = team.policy.model
    for name, tensor in gathered(model, getattr(model, "dtype", torch.float32)):
        if not is_follower():
            yield from published(name, tensor)


def save_learners(team: Team, folder: Path) -> None:
    """Every rank's part of the learners under DeepSpeed and of the policy's average; the caller saves others."""
    from align.parallel.state import save_training_state

    for name, learner in spread_learners(team).items():
        save_training_state(learner.engine, folder / name, average_of(team, learner))


def load_learners(team: Team, folder: Path) -> None:
    from align.parallel.state import load_training_state

    for name, learner in spread_learners(team).items():
        load_training_state(learner.engine, folder / name, average_of(team, learner))


def average_of(team: Team, learner: Learner) -> dict[str, Tensor] | None:
    """This process's part of a learner's average, where it has one."""
    return team.average.average if team.average is not None and team.average.learner is learner else None


def spread_learners(team: Team) -> dict[str, SpreadLearner]:
    return {name: learner for name, learner in team.learners.items() if isinstance(learner, SpreadLearner)}
