"""The models of a PPO run: the trained policy and critic, the frozen reference, and local reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from align.config.ppo import PpoStage
from align.config.rewards import ModelReward
from align.config.stages import RejectionSampleStage
from align.models.lora.adapters import AnyModel
from align.models.shared_weights import SharedWeights
from align.reward.model import ModelScorer
from align.run.context import StageContext
from align.train.checkpoint import load_policy, load_scorer
from align.train.device import training_device
from align.train.frozen import FrozenModel
from align.train.learner import Learner, build_learner
from align.train.side_by_side import side_by_side

Result = TypeVar("Result")


@dataclass
class Models:
    """The models of a PPO run, on one device.

    policy: trained; the stage saves its EMA weights, if any, otherwise its weights.
    reference: frozen; None if the reference is the policy with its adapters disabled.
    critic: trained; None for advantage estimators without a critic.
    device: the device of this process.
    """

    policy: Learner
    reference: FrozenModel | None = None
    critic: Learner | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})

    def run_passes(self, *passes: tuple[AnyModel, Sequence[Callable[[], Result]]]) -> list[Result]:
        """Run the passes of each model; return the results in the order of the models and of their passes.

        On the CPU two passes run at a time, unless the models are sharded. A model may have at most one backward pass.
        """
        if self.device.type != "cpu" or self.policy.collective:  # all ranks must communicate in the same order
            return [run() for _, runs in passes for run in runs]
        chains = [chain for model, runs in passes for chain in ([runs] if changes_in_passes(model) else zip(runs))]
        return [
            result for results in side_by_side([partial(run_in_turn, chain) for chain in chains]) for result in results
        ]

    @contextmanager
    def reference_run(self) -> Iterator[Callable[..., Any]]:
        """Yield the reference's `run(function, ...)`.

        The policy must not be used within the block, because its adapters may be disabled.
        """
        if self.reference is not None:
            yield self.reference.run
        else:
            with self.policy.model.disable_adapter():
                yield self.policy.run


def changes_in_passes(model: AnyModel) -> bool:
    """True if a forward pass modifies the model while it runs, so that passes must not run concurrently.

    During a pass PEFT replaces stacked experts by adapted ones, which a concurrent pass would adapt again.
    """
    return hasattr(model, "peft_config")


def run_in_turn(runs: Sequence[Callable[[], Result]]) -> list[Result]:
    return [run() for run in runs]


def build_models(stage: PpoStage, context: StageContext, shared: SharedWeights | None = None) -> Models:
    """Load policy, critic and reference, and build the learners.

    shared: frozen weights of the models loaded before.

    All models are in evaluation mode: with dropout, two passes over the same tokens would differ.
    """
    device, parallel = training_device(), context.recipe.parallel
    parent = context.checkpoint(stage.init_from)
    torch.manual_seed(context.seed)
    dtype = context.recipe.dtype
    load = partial(load_policy, parent, parallel=parallel, shared=shared)
    policy = load(context.trained_dtype(stage.lora), lora=stage.lora).to(device)
    critic = build_critic(stage, context, shared).to(device) if stage.advantage_estimator == "gae" else None
    reference = None if stage.lora else load(dtype, frozen=True).to(device)
    for model in (policy, critic, reference):
        if model is not None:
            model.eval()
    for model in (policy, critic) if stage.gradient_checkpointing else ():
        if model is not None:
            model.gradient_checkpointing_enable()
    clipping = stage.critic.max_grad_norm or stage.optimizer.max_grad_norm
    critic_settings = stage.optimizer.model_copy(
        update={"learning_rate": stage.critic.learning_rate, "max_grad_norm": clipping}
    )
    learner = partial(build_learner, total=stage.steps, parallel=parallel, dtype=dtype)
    return Models(
        reference=None if reference is None else FrozenModel(reference, parallel, dtype),
        policy=learner(policy, stage.optimizer, ema_decay=stage.ema_decay),
        critic=None if critic is None else learner(critic, critic_settings),
        device=device,
    )


def load_reward_models(
    stage: PpoStage | RejectionSampleStage, context: StageContext, shared: SharedWeights | None = None
) -> dict[str, ModelScorer]:
    """Load the stage's local reward models, by their checkpoint names in the recipe.

    Under `parallel` every rank loads its shards, and all ranks must call this.
    """
    dtype, parallel = context.recipe.dtype, context.recipe.parallel
    return {
        name: ModelScorer(context.checkpoint(name), dtype, stage.micro_batch_tokens, parallel, shared)
        for name in local_reward_models(stage)
    }


def local_reward_models(stage: PpoStage | RejectionSampleStage) -> list[str]:
    """Checkpoint names in the stage's `kind: model` rewards, without duplicates."""
    return list(dict.fromkeys(reward.init_from for reward in stage.rewards if isinstance(reward, ModelReward)))


def build_critic(stage: PpoStage, context: StageContext, shared: SharedWeights | None = None) -> AnyModel:
    """Load the critic with a value head of zeros.

    It starts from `critic.init_from`; by default from the first local reward model or, without one, from the policy's
    parent.
    """
    scorers = local_reward_models(stage)
    parent = stage.critic.init_from or (scorers[0] if scorers else stage.init_from)
    head_only = stage.critic.trainable == "head"
    return load_scorer(
        context.checkpoint(parent),
        context.recipe.dtype if head_only else context.trained_dtype(stage.critic.lora),
        fresh_head=True,
        head_only=head_only,
        parallel=context.recipe.parallel,
        lora=stage.critic.lora,
        shared=shared,
    )
