"""The models of a run: policy, reference, critic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from align.config.ppo import PpoStage
from align.config.rewards import ModelReward
from align.models.lora import AnyModel, add_lora
from align.train.checkpoint import load_policy, load_scorer
from align.train.device import training_device
from align.train.learner import Learner
from align.train.run_folder import StageContext


@dataclass
class Team:
    """Who learns and who is only asked. ref_model: None when it is the policy with its adapters off; critic: None for
    the algorithms that have none."""

    policy: Learner
    ref_model: AnyModel | None = None
    critic: Learner | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})

    @contextmanager
    def reference(self) -> Iterator[AnyModel]:
        """The reference policy, for the length of a with block."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.policy.model.disable_adapter():
                yield self.policy.model


def build_team(context: StageContext) -> Team:
    """Everyone from the checkpoints that the stage names; in evaluation mode, for dropout would make the same tokens'
    log-probabilities differ between passes."""
    stage: PpoStage = context.stage
    device = training_device()
    parent = context.checkpoint(stage.init_from)
    torch.manual_seed(context.seed)
    policy = load_policy(parent, context.trained_dtype).to(device)
    if stage.lora:
        policy = add_lora(policy, stage.lora, task="CAUSAL_LM")
    critic = build_critic(context).to(device) if stage.algorithm == "ppo" else None
    ref_model = None if stage.lora else load_policy(parent, context.trained_dtype).requires_grad_(False).to(device)
    for model in (policy, critic, ref_model):
        if model is not None:
            model.eval()
    clipping = stage.critic.max_grad_norm or stage.optimizer.max_grad_norm
    critic_settings = stage.optimizer.model_copy(
        update={"learning_rate": stage.critic.learning_rate, "max_grad_norm": clipping}
    )
    return Team(
        policy=Learner(policy, stage.optimizer, total=stage.steps),
        ref_model=ref_model,
        critic=None if critic is None else Learner(critic, critic_settings, total=stage.steps),
        device=device,
    )


def build_critic(context: StageContext) -> AnyModel:
    """From the stage that the recipe names, else the first reward model, else the policy's parent; its head is zero."""
    stage: PpoStage = context.stage
    scorers = [reward.init_from for reward in stage.rewards if isinstance(reward, ModelReward)]
    parent = stage.critic.init_from or (scorers[0] if scorers else stage.init_from)
    full = stage.critic.trainable == "all" and not stage.critic.lora
    critic = load_scorer(context.checkpoint(parent), "float32" if full else context.recipe.dtype, fresh_head=True)
    if stage.critic.lora:
        critic = add_lora(critic, stage.critic.lora, task="SEQ_CLS")
    if stage.critic.trainable == "head":
        critic.requires_grad_(False)
        for name, parameter in critic.named_parameters():
            parameter.requires_grad_("score" in name and "original_module" not in name)
    return critic
