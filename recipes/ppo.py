"""Proximal policy optimisation: generate, score, look back, update, send the new weights to the sampler."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.config.rewards import ModelReward
from align.config.stages import PpoStage
from align.data import PromptRow, prepare_prompts, stop_token_ids
from align.losses import advantages
from align.losses.kl import kl_estimate
from align.losses.ppo import explained_variance, importance_weight, policy_loss, value_loss
from align.losses.reduce import masked_mean
from align.models.lora import AnyModel, add_lora
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.build import build_engine
from align.rollout.experience import (
    Experience,
    build_experience,
    critic_features,
    critic_values,
    policy_output,
)
from align.rollout.scoring import Scorer
from align.rollout.weights import published_weights
from align.train.checkpoint import (
    count_parameters,
    load_policy,
    load_scorer,
    load_tokenizer,
    save_model,
)
from align.train.optimizer import build_optimizer, schedule_factor
from align.train.run_folder import MetricsWriter, StageContext, remove_folder
from align.train.state import load_state, save_state


def run(context: StageContext) -> dict:
    stage = context.stage
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    prompts, report = prepare_prompts(
        stage.prompts,
        tokenizer,
        max_prompt_length=stage.max_prompt_length,
        seed=context.seed,
        stage_dirs=context.stage_dirs,
    )
    context.say(f"  data: {report.summary()}")
    scorer = Scorer(
        stage.rewards,
        tokenizer,
        checkpoint=context.checkpoint,
        dtype=context.recipe.dtype,
        micro_batch_tokens=stage.micro_batch_tokens,
        say=context.say,
    )
    team = build_team(context, parent)
    parameters = count_parameters(team.policy)
    engine = build_engine(parent, stage.rollout, dtype=context.recipe.dtype, seed=context.seed)

    checkpoint = context.dir / "checkpoints" / "last"
    first_step = 0
    if not context.resume:
        remove_folder(checkpoint)  # of an earlier run of this stage
    if checkpoint.is_dir():
        state = load_state(checkpoint, team.models, team.optimizers)
        first_step = state["step"]
        scorer.load_state_dict(state["scorer"])
        engine.update_weights(published_weights(team.policy), version=first_step)
        context.say(f"  resuming at step {first_step}")
    writer = MetricsWriter(context.dir / "metrics.jsonl", from_step=first_step or None)
    samples = MetricsWriter(context.dir / "samples.jsonl", from_step=first_step or None)
    metrics: dict[str, float] = {}
    for step in range(first_step, stage.steps):
        clock = Clock(context.status, f"  step {step + 1}/{stage.steps}")
        with clock("generate"):
            rows, completions = generate(context, engine, prompts, stop_token_ids(tokenizer), step)
        with clock("score"):
            batch = to_experience(completions)
            components = score(stage, scorer, batch, rows, completions)
        with clock("logprobs"):
            metrics = look_back(stage, team, batch)
        with clock("update"):
            metrics |= update(stage, team, batch, step, context.seed)
        with clock("sync"):
            engine.update_weights(published_weights(team.policy), version=step + 1)
        metrics |= components | describe(batch, completions)
        writer.write(step + 1, {**metrics, **clock.times})
        if (step + 1) % stage.sample_every == 0:
            write_samples(samples, step + 1, rows, completions, batch, tokenizer)
        if (step + 1) % stage.checkpoint_every == 0:
            save_state(checkpoint, team.models, team.optimizers, {"step": step + 1, "scorer": scorer.state_dict()})
        context.say(
            f"  step {step + 1}/{stage.steps}  score {metrics['score_mean']:.3f}  kl {metrics['kl']:.4f}  "
            f"length {metrics['completion_length']:.1f}  {sum(clock.times.values()):.1f} s"
        )
    engine.close()
    scorer.close()
    writer.close()
    samples.close()
    save_model(team.policy, tokenizer, context.dir, context.recipe.dtype)
    return {"metrics": metrics, "data": report.to_dict(), "parameters": parameters}


# --- who takes part --------------------------------------------------------------------------------------------


@dataclass
class Team:
    """The models of a PPO run. The reference is None when it is the policy with its adapters off."""

    policy: AnyModel
    ref_model: AnyModel | None
    critic: AnyModel
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, AnyModel]:
        return {"policy": self.policy, "critic": self.critic}

    @contextmanager
    def reference(self):
        """The reference policy, for the length of a with block."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.policy.disable_adapter():
                yield self.policy


def build_team(context: StageContext, parent: Path) -> Team:
    stage, dtype = context.stage, context.recipe.dtype
    torch.manual_seed(context.seed)
    policy = load_policy(parent, context.trained_dtype)
    if stage.lora:
        policy = add_lora(policy, stage.lora, task="CAUSAL_LM")
    references = [reward.init_from for reward in stage.rewards if isinstance(reward, ModelReward)]
    critic_from = stage.critic.init_from or (references[0] if references else stage.init_from)
    critic_dtype = "float32" if stage.critic.trainable == "all" and not stage.critic.lora else dtype
    critic = load_scorer(context.checkpoint(critic_from), critic_dtype, fresh_head=True)
    if stage.critic.lora:
        critic = add_lora(critic, stage.critic.lora, task="SEQ_CLS")
    if stage.critic.trainable == "head":
        critic.requires_grad_(False)
        for name, parameter in critic.named_parameters():
            parameter.requires_grad_("score" in name and "original_module" not in name)
    team = Team(
        policy=policy,
        ref_model=None if stage.lora else load_policy(parent, context.trained_dtype).requires_grad_(False),
        critic=critic,
    )
    # Dropout would make the same tokens' log-probabilities differ between passes.
    for model in (team.policy, team.critic, team.ref_model):
        if model is not None:
            model.eval()
    critic_settings = stage.optimizer.model_copy(update={"learning_rate": stage.critic.learning_rate})
    team.optimizers = {
        "policy": build_optimizer(team.policy, stage.optimizer),
        "critic": build_optimizer(team.critic, critic_settings),
    }
    return team


# --- one round -------------------------------------------------------------------------------------------------


def generate(
    context: StageContext, engine: RolloutEngine, prompts: list[PromptRow], stop_ids: list[int], step: int
) -> tuple[list[PromptRow], list[Completion]]:
    """The round's prompts, each repeated for its completions. What is drawn depends on the seed and the step alone."""
    stage: PpoStage = context.stage
    count = stage.batch_size // stage.completions_per_prompt
    rows = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(prompts))
        rows.append(prompts[shuffled(len(prompts), context.seed * 7919 + epoch)[index]])
    sampling = SamplingSettings(
        max_new_tokens=stage.rollout.max_new_tokens,
        temperature=stage.rollout.temperature,
        seed=context.seed * 1_000_003 + step,
        stop_token_ids=tuple(stop_ids),
        n=stage.completions_per_prompt,
    )
    groups = engine.generate([list(row.ids) for row in rows], sampling)
    pairs = [(row, completion) for row, group in zip(rows, groups, strict=True) for completion in group]
    return [row for row, _ in pairs], [completion for _, completion in pairs]


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int) -> list[int]:
    """The order of an epoch's prompts."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def to_experience(completions: list[Completion]) -> Experience:
    return build_experience(
        [c.prompt_ids for c in completions],
        [c.token_ids for c in completions],
        [c.logprobs for c in completions],
    )


def score(
    stage: PpoStage, scorer: Scorer, batch: Experience, rows: list[PromptRow], completions: list[Completion]
) -> dict[str, float]:
    """Fill batch.score, the weighted sum of all rewards; returns each reward's own figures."""
    batch.score, metrics = scorer.score(batch, rows, completions)
    if stage.missing_eos_penalty is not None:
        batch.score -= stage.missing_eos_penalty * torch.tensor([float(not c.finished) for c in completions])
    return metrics


@torch.no_grad()
def look_back(stage: PpoStage, team: Team, batch: Experience) -> dict[str, float]:
    """Old and reference log-probabilities, values, rewards, advantages and returns of the round."""
    shape = batch.mask.shape
    old, ref, values, entropy = (torch.zeros(shape) for _ in range(4))
    features: Tensor | None = None
    for micro in batch.micro_batches(torch.arange(len(batch)), stage.micro_batch_tokens):
        rows = batch.rows(micro)
        width = rows.mask.shape[1]
        output = policy_output(team.policy, rows, stage.rollout.temperature)
        old[micro, :width], entropy[micro, :width] = output.logprobs, output.entropy
        with team.reference() as reference:
            ref[micro, :width] = policy_output(reference, rows, stage.rollout.temperature).logprobs
        if stage.critic.trainable == "head":
            rows.features = critic_features(team.critic, rows)
            if features is None:
                features = torch.zeros(*shape, rows.features.shape[-1])
            features[micro, :width] = rows.features.float()
        values[micro, :width] = critic_values(team.critic, rows)
    batch.old_logprobs, batch.ref_logprobs, batch.values, batch.features = old, ref, values, features
    kl = kl_estimate(old, ref, stage.kl_estimator) * batch.mask
    rewards = -stage.kl_coef * kl
    last = (batch.lengths - batch.prompt_lengths - 1).clamp_min(0)
    assert batch.score is not None
    rewards[torch.arange(len(batch)), last] += batch.score
    batch.advantages, batch.returns = advantages.ppo(
        rewards, values, batch.mask, gamma=stage.gamma, lam=stage.lam, whitened=stage.whiten_advantages
    )
    mismatch = (old - batch.rollout_logprobs).abs()
    return {
        "kl": (kl_estimate(old, ref, "k1") * batch.mask).sum(1).mean().item(),
        "kl_k3": (kl_estimate(old, ref, "k3") * batch.mask).sum(1).mean().item(),
        "entropy": masked_mean(entropy, batch.mask).item(),
        "mismatch_mean": masked_mean(mismatch, batch.mask).item(),
        "mismatch_max": (mismatch * batch.mask).max().item(),
        "explained_variance": explained_variance(values, batch.returns, batch.mask).item(),
    }


def update(stage: PpoStage, team: Team, batch: Experience, step: int, seed: int) -> dict[str, float]:
    """Epochs over mini-batches; each loss is divided by its mini-batch's valid tokens, however it is split."""
    sums: dict[str, float] = {}
    minis = 0
    train_policy = step >= stage.critic.warmup_steps
    for optimizer, settings in (
        (team.optimizers["policy"], stage.optimizer),
        (team.optimizers["critic"], stage.optimizer),
    ):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * schedule_factor(step, stage.steps, settings)
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + step)
    for _ in range(stage.epochs):
        for mini in torch.randperm(len(batch), generator=shuffle).split(stage.mini_batch_size):
            count = batch.mask[mini].sum().item()
            for micro in batch.micro_batches(mini, stage.micro_batch_tokens):
                for name, value in backward(stage, team, batch.rows(micro), count, train_policy).items():
                    sums[name] = sums.get(name, 0.0) + value
            for name, model in team.models.items():
                if name == "policy" and not train_policy:
                    continue
                trained = [p for p in model.parameters() if p.requires_grad]
                norm = nn.utils.clip_grad_norm_(trained, stage.optimizer.max_grad_norm)
                if torch.isfinite(norm):
                    team.optimizers[name].step()
                    sums[f"{name}_grad_norm"] = sums.get(f"{name}_grad_norm", 0.0) + norm.item()
                else:
                    sums["skipped_updates"] = sums.get("skipped_updates", 0.0) + 1
                team.optimizers[name].zero_grad(set_to_none=True)
            minis += 1
    return {name: value if name == "skipped_updates" else value / minis for name, value in sums.items()}


def backward(stage: PpoStage, team: Team, rows: Experience, count: float, train_policy: bool) -> dict[str, float]:
    """Gradients of one micro-batch, as its share of a mini-batch of `count` tokens."""
    metrics: dict[str, Tensor] = {}
    assert rows.advantages is not None
    assert rows.old_logprobs is not None
    if train_policy:
        output = policy_output(team.policy, rows, stage.rollout.temperature)
        weights = None
        if stage.importance_cap is not None:
            weights = importance_weight(rows.old_logprobs, rows.rollout_logprobs, rows.mask, cap=stage.importance_cap)
        loss, clipping = policy_loss(
            output.logprobs,
            rows.old_logprobs,
            rows.advantages,
            rows.mask,
            clip_range=stage.clip_range,
            clip_range_high=stage.clip_range_high,
            dual_clip=stage.dual_clip,
            count=count,
            weights=weights,
        )
        metrics |= {"policy_loss": loss.detach(), **clipping}
        if output.router is not None:
            share = rows.mask.sum() / count
            loss = loss + share * output.router.loss(team.policy.config)
            metrics |= {name: share * value for name, value in output.router.metrics().items()}
        loss.backward()
    assert rows.values is not None
    assert rows.returns is not None
    values = critic_values(team.critic, rows)
    loss, clipping = value_loss(
        values, rows.values, rows.returns, rows.mask, clip_range=stage.value_clip_range, count=count
    )
    loss.backward()
    metrics |= {"value_loss": loss.detach(), **clipping}
    return {name: float(value) for name, value in metrics.items()}


# --- what is written -------------------------------------------------------------------------------------------


def describe(batch: Experience, completions: list[Completion]) -> dict[str, float]:
    assert batch.score is not None
    finished = sum(c.finished for c in completions) / len(completions)
    return {
        "score_mean": batch.score.mean().item(),
        "score_std": batch.score.std(unbiased=False).item(),
        "completion_length": batch.mask.sum(1).mean().item(),
        "eos_rate": finished,
        "truncated_share": 1 - finished,
    }


def write_samples(
    writer: MetricsWriter,
    step: int,
    rows: list[PromptRow],
    completions: list[Completion],
    batch: Experience,
    tokenizer: Any,
) -> None:
    assert batch.score is not None
    for i in range(min(4, len(rows))):
        sample: dict[str, Any] = {
            "prompt": rows[i].messages[-1]["content"],
            "completion": tokenizer.decode(completions[i].token_ids, skip_special_tokens=True),
            "score": batch.score[i].item(),
        }
        writer.write(step, json.loads(json.dumps(sample)))


class Clock:
    """Seconds of each phase, under the names time/PHASE; shows which one begins."""

    def __init__(self, show: Callable[[str], None], title: str) -> None:
        self.show, self.title = show, title
        self.times: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        self.show(f"{self.title}  {phase}")
        start = time.perf_counter()
        yield
        self.times[f"time/{phase}"] = round(time.perf_counter() - start, 3)
