"""One section of a recipe for each kind of stage."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.parts import Data, Fraction, Lora, Optimizer, Part, Positive, PythonDocsSource, Source


class StageBase(Part):
    """What every stage that starts from a checkpoint has."""

    init_from: str = "base"
    """Where the weights come from: an earlier stage, `base` (the recipe's model), or a checkpoint folder."""


class TrainingStage(StageBase):
    """What the stages that train on rows have: `pretrain`, `sft`, `reward_model` and `dpo`."""

    data: Data
    """Training and held-out rows."""
    optimizer: Optimizer = Optimizer()
    """AdamW's settings and the schedule."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning. The saved checkpoint is merged; the adapter is saved beside it."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data, where `max_steps` does not say how long the stage is."""
    max_steps: Positive | None = None
    """Optimizer steps, in as many passes as they take; `epochs` then means nothing."""
    batch_size: Positive = 8
    """Sequences (or pairs) in an optimizer step, over all processes."""
    micro_batch_size: Positive = 8
    """Sequences (or pairs) in a forward pass of one process."""
    group_by_length: bool = False
    """Put rows of similar length into a batch, so that less is computed on padding; batches stay in random order."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints from which a killed run resumes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainingStage:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; change one"
            )
        return self


class PretrainStage(TrainingStage):
    """Next-token prediction on plain text, packed into full sequences."""

    kind: Literal["pretrain"]
    """Selects next-token prediction."""


class SftStage(TrainingStage):
    """Supervised fine-tuning on conversations or prompt/completion rows."""

    kind: Literal["sft"]
    """Selects supervised fine-tuning."""
    assistant_only_loss: bool = True
    """Count only assistant turns (conversations) or completions in the loss."""


class SampleStage(StageBase):
    """Sample the model on prompts and write preference pairs: the reference answer over the sampled one."""

    kind: Literal["sample"]
    """Selects the sampling of preference pairs."""
    train: list[Source] = Field(min_length=1)
    """Prompts with a `reference` column, for the training pairs."""
    held_out: list[Source] = Field(default_factory=list)
    """The same for the held-out pairs."""
    neighbours: Fraction = 0.5
    """Share of the rejected answers that are another prompt's reference instead of a sample."""
    rollout: Rollout = Field(default_factory=lambda: Rollout())
    """How the rejected answers are sampled."""

    @model_validator(mode="after")
    def _prompts_fit(self) -> SampleStage:
        self.rollout.require_room_for_prompts()
        return self


class RewardModelStage(TrainingStage):
    """A scalar head trained on preference pairs (Bradley-Terry)."""

    kind: Literal["reward_model"]
    """Selects the training of a reward model."""
    center_coef: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared sum of the pair's scores, which keeps scores around zero."""


class DpoStage(TrainingStage):
    """Direct preference optimisation against the parent as reference."""

    kind: Literal["dpo"]
    """Selects direct preference optimisation."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the implicit reward, `beta * log(policy / reference)`; a larger one keeps nearer to the reference."""
    sft_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen answer, added to the DPO loss."""


class Rollout(Part):
    """How completions are generated."""

    engine: Literal["vllm", "remote", "huggingface"] = "vllm"
    """vllm: an engine in the trainer's process; remote: vLLM servers; huggingface: `generate`, slow, for machines without
    vLLM."""
    max_new_tokens: Positive = 64
    """Tokens after which a completion without an end-of-sequence token is cut off."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Logits are divided by this before sampling, in the rollout and in the trainer's log-probabilities alike."""
    max_model_length: Positive = 512
    """Prompt and completion together, in tokens."""
    cache_gib: Annotated[float, Field(gt=0)] = 0.5
    """Memory for the key/value cache of each engine."""
    max_sequences: Positive = 64
    """Sequences decoded at a time by each engine."""
    prefix_caching: bool = True
    """Keep keys and values of prompts, so that prompts with the same beginning compute it once. Every update of the
    weights empties the cache."""
    return_routing: bool = False
    """Completions carry the experts that their tokens went to, for the trainer to replay. On a CPU this takes the
    in-process engine, and each completion of a prompt computes the prompt again."""
    sleep: bool = False
    """Let the in-process engine give its GPU memory to the trainer between rollouts."""
    bucket_mib: Positive = 256
    """New weights go to the engines in pieces of this size."""
    servers: list[str] = Field(default_factory=list)
    """remote: addresses of running servers (`align serve-rollout`), for example `http://127.0.0.1:8001`."""
    start_servers: Annotated[int, Field(ge=0, le=256)] = 0
    """remote: servers that the trainer starts on this machine instead, each on a free port, and starts again if one
    dies. With GPUs, each gets the next `tensor_parallel_size` of them, counted from the end."""
    tensor_parallel_size: Positive = 1
    """remote: devices of a server that the trainer starts."""
    weight_transfer: Literal["auto", "shared_memory", "http", "ipc", "nccl"] = "auto"
    """remote: how weights travel. shared_memory: a file in /dev/shm, servers on the trainer's machine; http: in the
    request, anywhere; ipc: servers on the trainer's own GPU; nccl: on other GPUs. auto: nccl where the trainer has a
    GPU, else shared_memory for loopback addresses and http for others."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300
    """remote: how long servers may take to start."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """remote: a server that takes longer for a completion or a bucket counts as dead."""

    @model_validator(mode="after")
    def _engine_is_complete(self) -> Rollout:
        if self.engine == "remote" and bool(self.servers) == bool(self.start_servers):
            have = "neither servers nor start_servers" if not self.servers else "both servers and start_servers"
            raise ValueError(f"rollout.engine remote has {have}; give one of them")
        if self.engine != "remote":
            for key in ("servers", "start_servers"):
                if getattr(self, key):
                    raise ValueError(f"rollout.{key} needs rollout.engine remote; set that, or remove {key}")
            if self.tensor_parallel_size > 1:
                raise ValueError(
                    f"rollout.tensor_parallel_size {self.tensor_parallel_size} needs rollout.engine remote; set that, "
                    "or remove tensor_parallel_size"
                )
        for address in self.servers:
            if not re.fullmatch(r"http://[^/\s:]+:\d{1,5}", address):
                raise ValueError(
                    f"rollout.servers has '{address}', which is no address; write it as http://HOST:PORT"
                )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError("rollout.servers names a server twice; keep one of them")
        if self.return_routing and self.engine == "huggingface":
            raise ValueError("rollout.return_routing needs rollout.engine vllm; change one of them")
        return self

    def require_room_for_prompts(self) -> None:
        if self.max_new_tokens >= self.max_model_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_model_length {self.max_model_length}; lower one or raise the other"
            )


class ModelReward(Part):
    """The score of a reward model."""

    kind: Literal["model"]
    """Selects a reward model."""
    init_from: str
    """A reward_model stage of this recipe or a checkpoint folder."""
    weight: float = 1.0
    """Factor on this score in the sum of all rewards."""


class FunctionReward(Part):
    """A Python function `f(prompts, completions, rows) -> list of float`."""

    kind: Literal["function"]
    """Selects a Python function."""
    path: str
    """`file.py:function`, or the name of a built-in function of `align.reward`."""
    weight: float = 1.0
    """Factor on this score in the sum of all rewards."""


Reward = Annotated[ModelReward | FunctionReward, Field(discriminator="kind")]


class Critic(Part):
    """The value model of PPO; everything else of its optimizer is as in the stage's `optimizer`."""

    init_from: str | None = None
    """A reward_model stage or a checkpoint folder; by default the first reward model, else the policy's parent."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak rate of the critic's parameters."""
    lora: Lora | None = None
    """Adapters for the critic; its value head is always trained in full."""
    trainable: Literal["all", "head"] = "all"
    """head: keep the trunk frozen and train the value head only."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic learns."""


class PpoStage(StageBase):
    """Proximal policy optimisation with a critic."""

    kind: Literal["ppo"]
    """Selects proximal policy optimisation."""
    prompts: list[Source] = Field(min_length=1)
    """Sources with a `prompt` column (a string or a conversation that ends with the user's turn)."""
    max_prompt_length: Positive = 256
    """Longer prompts are dropped and counted."""
    rewards: list[Reward] = Field(min_length=1)
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
    """Padded tokens in a forward pass; completions are sorted by length to waste little."""
    gamma: Fraction = 1.0
    """Discount factor of a token's later rewards (1: none)."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE): 0 is one-step bootstrapping, 1 the Monte Carlo return."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Epsilon of the clipped objective: the probability ratio new/old is clipped to `1 ± epsilon`."""
    clip_range_high: Annotated[float, Field(gt=0)] | None = None
    """Another epsilon for the upper side, `1 + epsilon` (DAPO's clip-higher); by default `clip_range`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, a token's loss is at most this times its size (null: no such bound)."""
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Value clipping: a new value counts at most this far from the value before the update."""
    whiten_advantages: bool = True
    """Normalise a round's advantages to mean 0 and variance 1 over its completion tokens."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the per-token KL to the reference, subtracted from the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of that KL at the sampled token, with `d = log(policy / reference)`: k1 is `d` (unbiased), k2 is
    `d^2 / 2` (biased, low variance), k3 is `exp(-d) - 1 + d` (unbiased, never negative)."""
    importance_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Truncate the weight old/rollout of a token at this value (null: no correction of the engine's mismatch)."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = None
    """Subtracted from the score of a completion that was cut at max_new_tokens."""
    checkpoint_every: Positive = 10
    """Rounds between checkpoints from which a killed run resumes."""
    sample_every: Positive = 5
    """Rounds between the samples written to samples.jsonl."""

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoStage:
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


class EvaluateStage(Part):
    """Compare checkpoints on held-out prompts and write the report."""

    kind: Literal["evaluate"]
    """Selects the comparison of checkpoints."""
    models: list[str] = Field(min_length=1)
    """Stages (or `base`, or checkpoint folders) to compare; the first is the baseline."""
    prompts: list[Source] = Field(min_length=1)
    """Held-out prompts, with a `reference` column where the F1 score is wanted."""
    reward_model: str | None = None
    """A reward_model stage or folder whose score is a metric."""
    preferences: list[Source] = Field(default_factory=list)
    """Held-out pairs on which each model's implicit preference accuracy is measured."""
    rollout: Rollout = Rollout()
    """How the compared models answer the prompts."""
    reference: str | None = None
    """Model to which the KL of every other one is estimated on its own samples (default: the first model)."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples for the 95 % confidence intervals."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Prompts shown side by side in the report."""

    @model_validator(mode="after")
    def _prompts_fit(self) -> EvaluateStage:
        self.rollout.require_room_for_prompts()
        return self


SampleStage.model_rebuild()

Stage = Annotated[
    PretrainStage | SftStage | SampleStage | RewardModelStage | DpoStage | PpoStage | EvaluateStage,
    Field(discriminator="kind"),
]

__all__ = ["PythonDocsSource", "Stage"]
