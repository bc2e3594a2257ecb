"""Evaluation during training: which engine has the weights, and how they are saved and restored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from align.config.evaluation import EvaluateDuring
from align.config.ppo import PpoStage
from align.eval.during import DuringTraining, EvaluationCallback, Subject
from align.eval.model import EvalModel
from align.eval.opening import UNREAD, length_limit
from align.rl.log import RunLog
from align.rl.models import Models
from align.rl.sample import RolloutSampler
from align.rollout.hf_engine import HuggingFaceEngine
from align.rollout.hf_requests import HuggingFaceModel
from align.rollout.vllm_engine import VllmEngine
from align.rollout.vllm_requests import VllmModel
from align.run.context import StageContext
from align.run.folder import replace_file
from align.train.fit import checkpoint_step
from align.train.state import COUNTERS, trainable
from align.train.trainer import PackedTrainer

OWN_PASSES = "the trainer's own forward passes, which need no second copy of the weights"


def during_training(trainer: PackedTrainer, context: StageContext) -> DuringTraining | None:
    """The evaluations of a stage that transformers' Trainer runs, if its recipe has any.

    An engine of its own would need a second copy of the weights and a transfer at each evaluation, so the model that is
    trained answers itself.
    """
    settings: EvaluateDuring | None = trainer.align_stage.evaluate
    if settings is None:
        return None
    max_length = length_limit(context.checkpoint(trainer.align_stage.init_from), settings.max_length)
    tokenizer = trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)

    def model() -> EvalModel:
        trainer.model_wrapped.eval()
        return HuggingFaceModel(
            trainer.model,
            tokenizer,
            max_length=max_length,
            batch_size=settings.batch_size,
            run=lambda function, *arguments: trainer._forward(trainer.model_wrapped, function, *arguments),
        )

    def checkpoints() -> Sequence[int]:
        return [checkpoint_step(path) for path in (context.dir / "checkpoints").glob("checkpoint-*")]

    subject = Subject(
        tokenizer, max_length, "hf", OWN_PASSES, model, lambda: None, TrainerWeights(trainer), checkpoints
    )
    during = DuringTraining(settings, context, subject, lambda step, metrics: trainer.log(metrics))
    trainer.add_callback(EvaluationCallback(during))
    return during


class TrainerWeights:
    """The trained weights of transformers' Trainer."""

    def __init__(self, trainer: PackedTrainer):
        self.trainer = trainer

    def save(self, folder: Path) -> None:
        if self.trainer.is_deepspeed_enabled:
            from align.parallel.state import save_training_state

            save_training_state(self.trainer.model_wrapped, folder)
            return
        tensors = {name: weights.detach().contiguous() for name, weights in trainable(self.trainer.model).items()}
        replace_file(folder / "weights.safetensors", lambda file: save_file(tensors, file))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        if self.trainer.is_deepspeed_enabled:
            from align.parallel.state import load_training_state

            load_training_state(self.trainer.model_wrapped, folder)
            return
        tensors = load_file(folder / "weights.safetensors")
        for name, weights in trainable(self.trainer.model).items():
            weights.copy_(tensors[name])


def during_ppo(
    stage: PpoStage,
    context: StageContext,
    models: Models,
    sampler: RolloutSampler,
    tokenizer: PreTrainedTokenizerBase,
    log: RunLog,
) -> DuringTraining | None:
    """The evaluations of a PPO stage, if its recipe has any: with its rollout engine, if that is in this process.

    Rollout servers return neither log-probabilities of given tokens nor stop strings, and recorded routing is only kept
    for rollouts; then the policy that is trained answers itself.
    """
    settings = stage.evaluate
    if settings is None:
        return None
    parent, rollout = context.checkpoint(stage.init_from), stage.rollout
    engine = None if models.policy.collective else sampler.engine
    max_length, batch_size = length_limit(parent, settings.max_length), settings.batch_size
    vllm = isinstance(engine, VllmEngine) and not rollout.return_routing
    if vllm:
        max_length = min(max_length, rollout.max_model_length - UNREAD)

    def model() -> EvalModel:
        if isinstance(engine, VllmEngine) and vllm:
            return VllmModel(engine, tokenizer, parent)
        if isinstance(engine, HuggingFaceEngine):
            return HuggingFaceModel(engine.model, tokenizer, max_length=max_length, batch_size=batch_size)
        policy = models.policy
        return HuggingFaceModel(policy.model, tokenizer, max_length=max_length, batch_size=batch_size, run=policy.run)

    def close() -> None:
        if isinstance(engine, VllmEngine) and vllm:
            engine.forget_prefixes()  # the next rollout computes its prompts as it would without an evaluation

    def checkpoints() -> Sequence[int]:
        file = context.dir / "checkpoints" / "last" / COUNTERS
        return [int(json.loads(file.read_text(encoding="utf-8"))["step"])] if file.is_file() else []

    if vllm or isinstance(engine, HuggingFaceEngine):
        name = f"the rollout engine ({'vLLM' if vllm else 'transformers'})"
    else:
        name = OWN_PASSES
    subject = Subject(tokenizer, max_length, "vllm" if vllm else "hf", name, model, close, models.policy, checkpoints)
    return DuringTraining(settings, context, subject, log.record)
