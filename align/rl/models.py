"""The models of a run: policy, reference, critic, reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from align.config.ppo import PpoStage
from align.config.rewards import ModelReward
from align.models.lora.adapters import AnyModel
from align.reward.model import ModelScorer
from align.run.context import StageContext
from align.train.checkpoint import load_policy, load_scorer
from align.train.device import training_device
from align.train.ema import Ema
from align.train.learner import Learner
from align.train.sharded_learner import SpreadLearner, frozen_engine
from align.train.side_by_side import side_by_side

Answer = TypeVar("Answer")
Passes = tuple[AnyModel, Sequence[Callable[[], Answer]]]
"""A model and passes through it."""


@dataclass
class Team:
    """Who learns and who is only asked. ref_model: None when it is the policy with its adapters off; critic: None for
    the algorithms that have none; ref_engine: what brings a spread ref_model together; average: of the policy's
    weights over the rounds, which is then what is saved."""

    policy: Learner
    ref_model: AnyModel | None = None
    critic: Learner | None = None
    ref_engine: Any = None
    average: Ema | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})

    def together(self, *passes: Passes[Answer]) -> list[Answer]:
        """What each pass returns, model by model. Where the models are this process's, on its CPU, two passes are done
        at a time; where they gather gradients, no two may be given that are the same model's."""
        spread = isinstance(self.policy, SpreadLearner)  # ranks must all exchange in the same order
        if self.device.type != "cpu" or spread:
            return [work() for _, works in passes for work in works]
        chains = [chain for model, works in passes for chain in ([works] if changes_in_passes(model) else zip(works))]
        return [answer for answers in side_by_side([partial(in_turn, chain) for chain in chains]) for answer in answers]

    def take_average(self) -> None:
        """Give the policy the weights with which it is to be saved, when all rounds are over."""
        if self.average is not None:
            self.average.exchange()

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Any]]:
        """ask(question, ...) for question(reference policy, ...). The policy itself is not to be asked meanwhile: it
        may be what answers, with its adapters off."""
        if self.ref_engine is not None:
            yield self.ref_engine
        elif self.ref_model is not None:
            yield lambda question, *arguments: question(self.ref_model, *arguments)
        else:
            with self.policy.model.disable_adapter():
                yield self.policy.ask


def changes_in_passes(model: AnyModel) -> bool:
    """Whether a pass alters the model for as long as it takes: PEFT swaps stacked experts for the adapted ones, which a
    second pass at the same time would adapt again."""
    return hasattr(model, "peft_config")


def in_turn(works: Sequence[Callable[[], Answer]]) -> list[Answer]:
    return [work() for work in works]


def build_team(stage: PpoStage, context: StageContext) -> Team:
    """Everyone from the checkpoints that the stage names; in evaluation mode, for dropout would make the same tokens'
    log-probabilities differ between passes."""
    device, parallel = training_device(), context.recipe.parallel
    parent = context.checkpoint(stage.init_from)
    torch.manual_seed(context.seed)
    dtype = context.trained_dtype(stage.lora)
    policy = load_policy(parent, dtype, parallel, stage.lora).to(device)
    critic = build_critic(stage, context).to(device) if stage.algorithm == "ppo" else None
    ref_model = None if stage.lora else load_policy(parent, dtype, parallel, frozen=True).to(device)
    for model in (policy, critic, ref_model):
        if model is not None:
            model.eval()
    for model in (policy, critic) if stage.gradient_checkpointing else ():
        if model is not None:
            model.gradient_checkpointing_enable()
    clipping = stage.critic.max_grad_norm or stage.optimizer.max_grad_norm
    critic_settings = stage.optimizer.model_copy(
        update={"learning_rate": stage.critic.learning_rate, "max_grad_norm": clipping}
    )
    learner: Callable[..., Learner] = Learner
    ref_engine = None
    if parallel is not None:
        learner = partial(SpreadLearner, parallel=parallel, dtype=dtype)
        if ref_model is not None:
            ref_engine = frozen_engine(ref_model, parallel, dtype)
    policy_learner = learner(policy, stage.optimizer, total=stage.steps)
    return Team(
        policy=policy_learner,
        ref_model=ref_model,
        critic=None if critic is None else learner(critic, critic_settings, total=stage.steps),
        ref_engine=ref_engine,
        average=None if stage.ema_decay is None else Ema(policy_learner, stage.ema_decay),
        device=device,
    )


def load_reward_models(stage: PpoStage, context: StageContext) -> dict[str, ModelScorer]:
    """The stage's own reward models under the names that the recipe has for them; under `parallel` all ranks load them
    together."""
    dtype, parallel = context.recipe.dtype, context.recipe.parallel
    return {
        name: ModelScorer(context.checkpoint(name), dtype, stage.micro_batch_tokens, parallel)
        for name in local_reward_models(stage)
    }


def local_reward_models(stage: PpoStage) -> list[str]:
    """The checkpoints that the stage's rewards name, each once."""
    return list(dict.fromkeys(reward.init_from for reward in stage.rewards if isinstance(reward, ModelReward)))


def build_critic(stage: PpoStage, context: StageContext) -> AnyModel:
    """From the stage that the recipe names, else the first reward model, else the policy's parent; its head is zero."""
    scorers = local_reward_models(stage)
    parent = stage.critic.init_from or (scorers[0] if scorers else stage.init_from)
    full = stage.critic.trainable == "all" and not stage.critic.lora
    parallel = context.recipe.parallel
    dtype = "float32" if full and parallel is None else context.recipe.dtype  # as in `trained_dtype`
    return load_scorer(
        context.checkpoint(parent),
        dtype,
        fresh_head=True,
        head_only=stage.critic.trainable == "head",
        parallel=parallel,
        lora=stage.critic.lora,
    )
