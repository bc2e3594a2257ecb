"""The stage of policy optimisation: PPO and its critic-free relatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.parts import RUNTIME, Fraction, Lora, Optimizer, Positive, Section, Source
from align.config.rewards import ModelReward, Rewards
from align.config.rollout import Rollout
from align.config.stage import LANGUAGE_MODEL, REWARD_MODEL, Reference, StageWithParent


class Critic(Section):
    """The value model of `advantage_estimator: gae`. Other settings of its optimizer are those of the stage's
    `optimizer`."""

    init_from: str | None = None
    """A reward_model stage or a checkpoint folder; by default the first reward model, else the policy's parent."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak rate of the critic's parameters."""
    lora: Lora | None = None
    """Adapters for the critic; its value head is always trained in full."""
    trainable: Literal["all", "head"] = "all"
    """head: keep the trunk frozen and train the value head only."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the critic's gradient to this norm; by default the stage's `optimizer.max_grad_norm`."""
    lam: Fraction | None = None
    """Another lambda for the critic's returns than for the advantages (VC-PPO uses 1); by default the stage's `lam`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic learns."""


class Kl(Section):
    """How the policy is kept near the reference, the stage's parent."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the per-token KL to the reference; the first one where `target` is given."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of that KL at the sampled token, with `d = log(policy / reference)`: k1 is `d` (unbiased), k2 is
    `d^2 / 2` (biased, low variance), k3 is `exp(-d) - 1 + d` (unbiased, never negative)."""
    apply_to: Literal["reward", "loss"] = "reward"
    """reward: subtracted from each token's reward (or, without a critic, from the completion's score). loss: added to
    the policy's loss with its own gradient, by k2 or k3; k1's gradient is zero on average."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Adapt `coef` so that the KL of a whole completion comes to this many nats (null: `coef` is fixed)."""
    horizon: Positive = 10_000
    """Completions over which the adaptation acts; fewer is faster."""
    stop: Annotated[float, Field(gt=0)] | None = None
    """Once the mean KL of a mini-batch's tokens from the policy before the update to the present one exceeds this,
    the rest of the round's updates is left out (null: never). The critic goes on learning."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Kl:
        if self.apply_to == "loss" and self.estimator == "k1":
            raise ValueError(
                "the gradient of estimator k1 is zero on average, so as a loss it does nothing; use k2 or k3"
            )
        return self


class Importance(Section):
    """Correction of the difference between the sampler's distribution and the trainer's."""

    correction: Literal["none", "truncate", "mask"] = "truncate"
    """truncate: weigh by old/rollout, at most `cap`; mask: by 0 where that is above `cap`; none: ignore the
    difference. It is measured in any case (mismatch_mean, mismatch_max)."""
    level: Literal["token", "sequence"] = "token"
    """Whether the weight is a token's or the product over the completion."""
    cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest weight."""


LOOKED_AT_ONE_IN = 16
"""Completions, of which the trainer computes one's log-probabilities under `old_logprobs: rollout`."""

AdvantageEstimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus"]
PolicyLoss = Literal["clip", "cispo"]
GROUPED = ("grpo", "dr_grpo", "rloo")
"""Estimators that compare the completions of one prompt."""


class PpoStage(StageWithParent):
    """Proximal policy optimisation, with a critic or by one of its critic-free relatives."""

    makes = LANGUAGE_MODEL
    trains = True

    kind: Literal["ppo"]
    """Selects proximal policy optimisation."""
    advantage_estimator: AdvantageEstimator = "gae"
    """Baseline of the advantages: a critic (gae), the other completions of the same prompt (grpo, dr_grpo, rloo), or
    the whole rollout batch (reinforce_plus_plus). Only gae trains a critic. The key selects the advantages alone;
    `docs/ppo.md` lists the other settings of each published method."""
    prompts: list[Source] = Field(min_length=1)
    """Sources with a `prompt` column (a string or a conversation that ends with the user's turn)."""
    max_prompt_length: Positive = 256
    """Longer prompts are dropped and counted."""
    rewards: Rewards
    """Weighted sum of these is a completion's score."""
    rollout: Rollout = Rollout()
    """How completions are generated."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, eps=1e-5, schedule="constant", warmup_fraction=0.0)
    """AdamW's settings for the policy; the schedule is over `steps`."""
    lora: Lora | None = None
    """Adapters for the policy; the reference is then the policy with its adapters off."""
    critic: Critic = Critic()
    """The value model and how it learns."""
    steps: Positive = 100
    """Rounds of generation and update."""
    batch_size: Positive = 32
    """Completions in a round."""
    completions_per_prompt: Positive = 1
    """Completions sampled from each prompt; a round has batch_size / completions_per_prompt prompts."""
    epochs: Positive = 2
    """Passes over a round's completions."""
    mini_batch_size: Positive = 16
    """Completions in an optimizer step."""
    micro_batch_tokens: Positive = 4096
    """Tokens in a forward pass, prompts and completions; there is no padding among them."""
    gradient_checkpointing: Annotated[bool, RUNTIME] = False
    """Recompute the activations of policy and critic in the backward pass: less memory, more time."""
    gamma: Fraction = 1.0
    """Discount factor of a token's later rewards (1: none)."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE): 0 is one-step bootstrapping, 1 the Monte Carlo return."""
    policy_loss: PolicyLoss = "clip"
    """clip: PPO's loss, in which a token outside of the clip range has no gradient. cispo: `-w * A * log pi`
    (MiniMax-M1), in which every token keeps its gradient; the weight `w` is the clipped ratio as a constant."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio that is clipped: each token's, or one a completion, the geometric mean over its tokens (GSPO,
    whose clip ranges are around 4e-4)."""
    loss_average: Literal["tokens", "completions", "constant"] = "tokens"
    """The policy's loss is divided by a mini-batch's tokens (each counts the same), is a mean over completions of means
    over their tokens (GRPO as published), or is divided by mini_batch_size x max_new_tokens (Dr. GRPO as published)."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Epsilon of the clipped objective: the probability ratio new/old is clipped to `1 ± epsilon`."""
    clip_range_high: Annotated[float, Field(gt=0)] | None = None
    """Another epsilon for the upper side, `1 + epsilon` (DAPO's clip-higher); by default `clip_range`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, a token's loss is at most this times its size (null: no such bound)."""
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Value clipping: a new value counts at most this far from the value before the update."""
    whiten_advantages: bool = True
    """Normalise the critic's advantages to mean 0 and variance 1 over the round's completion tokens."""
    kl: Kl = Kl()
    """How the policy is kept near the reference."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Whose log-probabilities stand for the policy before the update. trainer: its own, from a pass over the round,
    with `importance` between them and the sampler's. rollout: the sampler's as they are, which saves that pass; the
    trainer then computes them for one completion in 16 alone, and entropy and mismatch are those completions'."""
    importance: Importance = Importance()
    """Correction of the sampler's log-probabilities to the trainer's."""
    routing_replay: Literal["none", "trainer", "rollout"] = "none"
    """Experts that the updates use, in a mixture of experts: those that the router chooses anew (none), those of the
    pass before the update (trainer), or those that the sampler used (rollout, R3); the router keeps its gradient."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = None
    """Subtracted from the score of a completion that was cut at max_new_tokens."""
    mask_truncated: bool = False
    """Leave completions that were cut at max_new_tokens out of the losses (DAPO's overlong filtering)."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Over the last this many tokens before max_new_tokens, a penalty rises from 0 to `overlong_penalty` (DAPO's soft
    overlong punishment; 0: none)."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Largest penalty of `overlong_buffer`, subtracted from the score."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Generate up to this many further times a round to replace groups whose scores are all equal, which teach nothing
    without a critic (DAPO; 0: off)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Save the exponential moving average of the policy's weights over the rounds, with this decay, instead of the last
    weights (null: the last). Sampling and updates use the present weights."""
    overlap: bool = False
    """Sample the next round while this one is learned from: faster, and its completions are then one version behind.
    Needs `rollout.engine: remote`."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 10
    """Rounds between checkpoints from which a killed run resumes."""
    sample_every: Annotated[Positive, RUNTIME] = 5
    """Rounds between the samples written to samples.jsonl."""

    def checkpoints(self) -> Iterator[Reference]:
        yield from super().checkpoints()
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                yield Reference("rewards", reward.init_from, (REWARD_MODEL,))
        if self.critic.init_from is not None:
            yield Reference("critic.init_from", self.critic.init_from, (LANGUAGE_MODEL, REWARD_MODEL))

    @property
    def generates_with(self) -> str:
        return self.init_from

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoStage:
        self.rollout.require_sampling("ppo")
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} does not divide batch_size {self.batch_size}; change one"
            )
        if self.batch_size % self.completions_per_prompt:
            raise ValueError(
                f"completions_per_prompt {self.completions_per_prompt} does not divide batch_size {self.batch_size}; "
                "change one"
            )
        if self.max_prompt_length + self.rollout.max_new_tokens > self.rollout.max_model_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} + rollout.max_new_tokens {self.rollout.max_new_tokens} "
                f"exceed rollout.max_model_length {self.rollout.max_model_length}; raise that, or lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _settings_agree(self) -> PpoStage:
        estimator = self.advantage_estimator
        grouped = estimator in GROUPED
        if grouped and self.completions_per_prompt < 2:
            raise ValueError(
                f"advantage_estimator {estimator} compares completions of one prompt, but completions_per_prompt is "
                f"{self.completions_per_prompt}; set it to 2 or more"
            )
        if estimator != "gae" and self.critic != Critic():
            raise ValueError(
                f"advantage_estimator {estimator} has no critic; remove the section critic, or set "
                "advantage_estimator to gae"
            )
        if self.policy_loss == "cispo" and (self.dual_clip is not None or self.ratio == "sequence"):
            key, value = ("ratio", "token") if self.dual_clip is None else ("dual_clip", "null")
            raise ValueError(
                f"{key} changes policy_loss clip only, but policy_loss is cispo; set {key} to {value}, or policy_loss "
                "to clip"
            )
        if self.dynamic_sampling and not grouped:
            raise ValueError(
                f"dynamic_sampling replaces groups of equal scores, which advantage_estimator {estimator} does not "
                "have; set it to 0, or use grpo, dr_grpo or rloo"
            )
        if self.overlap and self.rollout.engine != "remote":
            raise ValueError(
                f"overlap samples while the trainer computes, which rollout.engine {self.rollout.engine} cannot; set "
                "overlap to false, or use remote engines"
            )
        if self.overlap and self.importance.correction == "none":
            raise ValueError(
                "overlap trains on completions of an earlier policy, which importance.correction none leaves "
                "uncorrected; set importance.correction to truncate or mask, or overlap to false"
            )
        unbounded = self.policy_loss == "clip" and self.dual_clip is None
        if self.overlap and self.old_logprobs == "rollout" and unbounded:
            raise ValueError(
                "overlap with old_logprobs rollout leaves the probability ratio of a negative advantage unbounded; "
                "set dual_clip, for example to 3.0, or old_logprobs to trainer"
            )
        if self.old_logprobs == "rollout" and self.importance != Importance():
            raise ValueError(
                "importance corrects the sampler's log-probabilities to the trainer's, which old_logprobs rollout does "
                "without; remove the section importance, or set old_logprobs to trainer"
            )
        if self.old_logprobs == "rollout" and self.routing_replay == "trainer":
            raise ValueError(
                "routing_replay trainer takes the experts of the pass that old_logprobs rollout leaves out; set "
                "old_logprobs to trainer, or routing_replay to none or rollout"
            )
        if self.routing_replay == "rollout" and not self.rollout.return_routing:
            raise ValueError(
                "routing_replay rollout needs the sampler's routing; set rollout.return_routing to true, or use trainer"
            )
        if self.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} exceeds rollout.max_new_tokens {self.rollout.max_new_tokens}; "
                "lower it"
            )
        return self
