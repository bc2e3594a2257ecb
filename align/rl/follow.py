"""How rank 0, which alone samples, has the other ranks ask its reward models, look back and learn with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.ppo import PpoStage
from align.data.experience import Experience
from align.parallel.sharding import world
from align.rl.complete import look_back
from align.rl.models import Models, build_models, load_reward_models
from align.rl.update import update
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_tokenizer, save_model


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
    models = build_models(stage, context)
    batch: Experience | None = None
    while True:
        order, details = broadcast(None)
        match order, details:
            case "score", (name, asked):
                reward_models[name].scores(asked)
            case "look_back", (batch, kl_coef):
                look_back(stage, models, batch, kl_coef)
            case "update", (step, kl_coef):
                assert batch is not None
                update(stage, models, batch, step=step, seed=seed, kl_coef=kl_coef)
            case "send", ():
                for _ in models.policy.published_weights():
                    pass
            case "save", (folder,):
                save_learners(models, folder)
            case "load", (folder,):
                load_learners(models, folder)
            case "finish", ():
                tokenizer = load_tokenizer(context.checkpoint(stage.init_from))
                models.policy.swap_ema()
                save_model(models.policy.model, tokenizer, context.dir, context.recipe.dtype, context.recipe.parallel)
                return StageResult()


def save_learners(models: Models, folder: Path) -> None:
    for name, learner in models.learners.items():
        learner.save(folder / name)


def load_learners(models: Models, folder: Path) -> None:
    for name, learner in models.learners.items():
        learner.load(folder / name)
