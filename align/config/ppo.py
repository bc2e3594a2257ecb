"""The stage `ppo`: PPO with a critic, and the critic-free methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.evaluation import EvaluateDuring
from align.config.filters import PromptFilters
from align.config.lora import Lora
from align.config.parts import Optimizer, Source
from align.config.rewards import ModelReward, Rewards
from align.config.rollout import Rollout
from align.config.section import RUNTIME, Fraction, Positive, Section
from align.config.stage import LANGUAGE_MODEL, REWARD_MODEL, Benchmarks, Reference, StageWithParent, benchmarks_during


class Critic(Section):
    """The value model of `advantage_estimator: gae`. It uses the stage's `optimizer` except for the settings below."""

    init_from: str | None = None
    """Checkpoint the critic starts from: a stage or a folder. Default: the first reward model of `rewards`,
    otherwise the stage's `init_from`."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak learning rate of the critic."""
    lora: Lora | None = None
    """Train adapters instead of the critic's weights. The value head is always trained in full."""
    trainable: Literal["all", "head"] = "all"
    """all: train the whole critic. head: train the value head only and freeze the rest."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """The critic's gradients are clipped to this global L2 norm. Default: the stage's `optimizer.max_grad_norm`."""
    lam: Fraction | None = None
    """Lambda of the critic's returns (VC-PPO uses 1). Default: the stage's `lam`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Iterations at the start in which only the critic is updated."""


class Kl(Section):
    """KL penalty that keeps the policy near the reference, which is the model of `init_from`."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL penalty per token. With `target` set, its initial value."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL at each sampled token, with `d = log(policy / reference)`. k1: `d` (unbiased). k2: `d^2 / 2`
    (biased, low variance). k3: `exp(-d) - 1 + d` (unbiased, never negative)."""
    apply_to: Literal["reward", "loss"] = "reward"
    """reward: subtract the penalty from each token's reward; without a critic, from the completion's score. loss: add
    it to the policy loss with its own gradient, which needs k2 or k3 because k1's gradient is zero on average."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Target KL in nats per completion; `coef` is adapted to reach it. Default: `coef` stays fixed."""
    horizon: Positive = 10_000
    """Time constant of the adaptation to `target`, in completions. Smaller values adapt faster."""
    stop: Annotated[float, Field(gt=0)] | None = None
    """Early stopping: limit on the KL per token between the policy before the updates and the current one. Once the
    mean over a mini-batch exceeds the limit, the remaining policy updates of the iteration are skipped; updates of the
    critic continue. Default: off."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Kl:
        if self.apply_to == "loss" and self.estimator == "k1":
            raise ValueError(
                "the gradient of estimator k1 is zero on average, so it has no effect in the loss; set estimator to k2 "
                "or k3"
            )
        return self


class Importance(Section):
    """Importance weights that correct for the difference between the sampler's log-probabilities and the trainer's."""

    correction: Literal["none", "truncate", "mask"] = "truncate"
    """truncate: weight the loss by the ratio old / rollout, at most `cap`. mask: as truncate, but 0 for ratios above
    `cap`. none: no correction. The difference is logged in any case (`mismatch_mean`, `mismatch_max`)."""
    level: Literal["token", "sequence"] = "token"
    """token: one ratio per token. sequence: the product of the ratios over the completion."""
    cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest importance weight."""


LOGPROBS_OF_ONE_IN = 16
"""Under `old_logprobs: rollout` the trainer computes log-probabilities for only one in this many completions."""

AdvantageEstimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus"]
PolicyLoss = Literal["clip", "cispo"]
GROUPED = ("grpo", "dr_grpo", "rloo")
"""Estimators that compare the completions of one prompt."""


class PpoStage(StageWithParent):
    """Policy optimisation on the scores of sampled completions: PPO with a critic, or a critic-free method."""

    title = "reinforcement learning (PPO)"
    makes = LANGUAGE_MODEL
    trains = True

    kind: Literal["ppo"]
    """Selects policy optimisation."""
    advantage_estimator: AdvantageEstimator = "gae"
    """Baseline of the advantages: a critic (gae), completions of the same prompt (grpo, dr_grpo, rloo), or the whole
    rollout batch (reinforce_plus_plus). Only gae trains a critic. The key selects the advantages alone;
    `docs/ppo.md` lists the other settings of each published method."""
    prompts: list[Source] = Field(min_length=1)
    """Sources of prompts: the column `prompt` (a string, or a conversation that ends with a user turn), or the prompts
    of conversations and preference pairs."""
    filters: PromptFilters = Field(default_factory=list)
    """Filters of the prompts, applied in order. They judge prompts, not reference answers."""
    max_prompt_length: Positive = 256
    """Maximum tokens per prompt. Longer prompts are dropped and counted in the manifest."""
    rewards: Rewards
    """Rewards. The score of a completion is their weighted sum, minus penalties if any are set."""
    rollout: Rollout = Rollout()
    """Generation of completions."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, eps=1e-5, schedule="constant", warmup_fraction=0.0)
    """AdamW's settings for the policy. The learning-rate schedule spans `steps`."""
    lora: Lora | None = None
    """Train adapters instead of the policy's weights. The reference is then the policy without its adapters."""
    critic: Critic = Critic()
    """The value model. Only for `advantage_estimator: gae`."""
    steps: Positive = 100
    """Iterations of generation and update."""
    batch_size: Positive = 32
    """Completions per iteration."""
    completions_per_prompt: Positive = 1
    """Completions sampled per prompt (group size). Must divide `batch_size`; at least 2 for grpo, dr_grpo and rloo."""
    epochs: Positive = 2
    """Passes over the rollout batch per iteration."""
    mini_batch_size: Positive = 16
    """Completions per optimizer step. Must divide `batch_size`."""
    micro_batch_tokens: Positive = 4096
    """Maximum tokens per forward pass, prompts included. Sequences are packed without padding. Lower it if GPU memory
    runs out."""
    gradient_checkpointing: Annotated[bool, RUNTIME] = False
    """Recompute the activations of policy and critic in the backward pass, which saves memory and takes longer."""
    share_trunk: Annotated[bool, RUNTIME] = True
    """Hold frozen weights that several of policy, critic, reference and reward models have in common in memory once.
    Results do not change. Not with `parallel`, where each model is sharded."""
    gamma: Fraction = 1.0
    """Discount factor per token. 1: no discount."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE). 0: one-step bootstrapping; 1: Monte Carlo returns."""
    policy_loss: PolicyLoss = "clip"
    """clip: PPO's clipped loss; tokens outside the clip range have no gradient. cispo: `-w * A * log(policy)`
    (MiniMax-M1), with the clipped ratio `w` as a constant weight; every token keeps its gradient."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio in the policy loss. token: one per token. sequence: one per completion, the geometric mean of
    its tokens' ratios (GSPO, with clip ranges around 4e-4)."""
    loss_average: Literal["tokens", "completions", "constant"] = "tokens"
    """Normalisation of the policy loss of a mini-batch. tokens: mean over all tokens. completions: mean over the
    completions of the mean over their tokens (GRPO as published). constant: sum / (completions * max_new_tokens) (Dr.
    GRPO as published). Completions without a token in the loss are not counted."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip range epsilon: the probability ratio new / old is clipped to `1 ± epsilon`."""
    clip_range_high: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the upper bound, `1 + epsilon` (DAPO's clip-higher). Default: `clip_range`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Upper bound of a token's loss for negative advantages, as a multiple of the advantage's size (dual-clip PPO).
    Default: no bound."""
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Clip range of the value loss: new values are clipped to this distance from the values before the update."""
    whiten_advantages: bool = True
    """Normalise the advantages of `gae` to mean 0 and variance 1 over the completion tokens of the rollout batch."""
    kl: Kl = Kl()
    """KL penalty to the reference."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Log-probabilities of the policy before the update. trainer: computed by the trainer in a forward pass over the
    rollout batch, with `importance` correcting the difference to the sampler's. rollout: the sampler's own, which saves
    that pass; the trainer computes them for one completion in 16, from which entropy and mismatch are logged."""
    importance: Importance = Importance()
    """Correction of the difference between the sampler's log-probabilities and the trainer's."""
    routing_replay: Literal["none", "trainer", "rollout"] = "none"
    """Experts used in the updates of a mixture of experts. none: the router chooses them in each pass. trainer: those
    of the forward pass before the updates. rollout: those of the sampler (R3); needs `rollout.return_routing`. The
    router is trained in each case."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = None
    """Penalty subtracted from the score of completions truncated at `rollout.max_new_tokens`. Default: none."""
    mask_truncated: bool = False
    """Exclude completions truncated at `rollout.max_new_tokens` from the losses (DAPO's overlong filtering)."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Number of tokens before `rollout.max_new_tokens` over which a length penalty rises from 0 to `overlong_penalty`
    (DAPO's soft overlong punishment). 0: no penalty."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Largest length penalty of `overlong_buffer`, subtracted from the score."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Maximum number of extra generations per iteration that replace groups whose scores are all equal, because such
    groups have no gradient without a critic (DAPO). 0: off."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per iteration of an exponential moving average (EMA) of the policy's weights. The EMA weights are saved
    instead of the last ones. Sampling and updates use the current weights. Default: no EMA."""
    overlap: bool = False
    """Generate the next rollout batch during the updates. This is faster, but the completions come from the policy of
    one iteration earlier. Needs `rollout.engine: remote`, and either `importance.correction` or, with `old_logprobs:
    rollout`, `dual_clip`, because training without a correction can collapse."""
    self_check: Annotated[bool, RUNTIME] = True
    """End the run if the log-probabilities of sampler and trainer differ by more than their rounding, in the first
    rollout batch or in the first one after an update: the sampler then runs another model."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 10
    """Iterations between the checkpoints that an interrupted run resumes from."""
    sample_every: Annotated[Positive, RUNTIME] = 5
    """Iterations between samples written to samples.jsonl."""
    evaluate: EvaluateDuring | None = None
    """Evaluate the policy on tasks during training."""

    def checkpoints(self) -> Iterator[Reference]:
        yield from super().checkpoints()
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                yield Reference("rewards", reward.init_from, (REWARD_MODEL,))
        if self.critic.init_from is not None:
            yield Reference("critic.init_from", self.critic.init_from, (LANGUAGE_MODEL, REWARD_MODEL))

    def benchmarks(self) -> Iterator[Benchmarks]:
        yield from benchmarks_during(self.evaluate)

    @property
    def generates_with(self) -> str:
        return self.init_from

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoStage:
        self.rollout.require_sampling("ppo")
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} does not divide batch_size {self.batch_size}; change one of "
                "them"
            )
        if self.batch_size % self.completions_per_prompt:
            raise ValueError(
                f"completions_per_prompt {self.completions_per_prompt} does not divide batch_size {self.batch_size}; "
                "change one of them"
            )
        if self.max_prompt_length + self.rollout.max_new_tokens > self.rollout.max_model_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} + rollout.max_new_tokens {self.rollout.max_new_tokens} "
                f"exceed rollout.max_model_length {self.rollout.max_model_length}; raise "
                "rollout.max_model_length, or lower one of the other two"
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
                f"{key} applies to policy_loss clip only, but policy_loss is cispo; set {key} to {value}, or "
                "policy_loss to clip"
            )
        if self.dynamic_sampling and not grouped:
            raise ValueError(
                f"dynamic_sampling replaces groups of equal scores, but advantage_estimator {estimator} has no groups; "
                "set dynamic_sampling to 0, or advantage_estimator to grpo, dr_grpo or rloo"
            )
        if self.overlap and self.rollout.engine != "remote":
            raise ValueError(
                f"overlap generates during the updates, which rollout.engine {self.rollout.engine} cannot do; set "
                "overlap to false, or rollout.engine to remote"
            )
        if self.overlap and self.importance.correction == "none":
            raise ValueError(
                "overlap trains on completions of an earlier policy, which importance.correction none leaves "
                "uncorrected; set importance.correction to truncate or mask, or overlap to false"
            )
        unbounded = self.policy_loss == "clip" and self.dual_clip is None
        if self.overlap and self.old_logprobs == "rollout" and unbounded:
            raise ValueError(
                "overlap with old_logprobs rollout leaves the ratio of tokens with negative advantages unbounded; set "
                "dual_clip, for example to 3.0, or old_logprobs to trainer"
            )
        if self.old_logprobs == "rollout" and self.importance != Importance():
            raise ValueError(
                "importance needs the trainer's log-probabilities, which old_logprobs rollout does not compute; remove "
                "the section importance, or set old_logprobs to trainer"
            )
        if self.old_logprobs == "rollout" and self.routing_replay == "trainer":
            raise ValueError(
                "routing_replay trainer needs the forward pass that old_logprobs rollout skips; set old_logprobs to "
                "trainer, or routing_replay to none or rollout"
            )
        if self.routing_replay == "rollout" and not self.rollout.return_routing:
            raise ValueError(
                "routing_replay rollout needs the sampler's routing; set rollout.return_routing to true, or "
                "routing_replay to trainer"
            )
        if self.ema_decay is not None and self.evaluate is not None and self.evaluate.keep == "best":
            raise ValueError(
                "evaluate.keep best keeps weights that were evaluated, but ema_decay saves the EMA weights; set "
                "evaluate.keep to last, or remove ema_decay"
            )
        longest = self.rollout.max_model_length - 2  # vLLM needs two more
        wanted = self.evaluate.max_length if self.evaluate is not None else None
        if wanted is not None and wanted > longest and self.rollout.engine == "vllm":
            raise ValueError(
                f"evaluate.max_length {wanted} exceeds {longest}, which is rollout.max_model_length less two; lower "
                "evaluate.max_length, or raise rollout.max_model_length"
            )
        if self.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} exceeds rollout.max_new_tokens {self.rollout.max_new_tokens}; "
                "lower overlong_buffer"
            )
        return self
