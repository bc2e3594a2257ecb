"""Comparing checkpoints on the same held-out prompts; the report is made from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.config.parts import Data
from align.config.stages import EvaluateStage
from align.data import PromptRow, prepare_prompts, stop_token_ids
from align.data.experience import Experience, build_experience
from align.data.prepare import prepare_dpo_pairs
from align.eval.metrics import pairwise_accuracy
from align.models.forward import policy_output, sequence_scores
from align.models.lora.adapters import AnyModel
from align.models.weights import published_weights
from align.parallel.group import from_rank_0
from align.parallel.sharding import world
from align.reward.text import token_f1
from align.rollout.base import Completion, SamplingSettings
from align.rollout.build import build_engine
from align.run.context import StageContext, StageResult
from align.run.folder import write_json
from align.train.checkpoint import load_policy, load_reward_model, load_tokenizer
from align.train.device import training_device

MICRO_BATCH_TOKENS = 4096


def run(stage: EvaluateStage, context: StageContext) -> StageResult:
    return from_rank_0("evaluate", lambda: _evaluate(stage, context))


@torch.no_grad()
def _evaluate(stage: EvaluateStage, context: StageContext) -> StageResult:
    checkpoints = {name: context.checkpoint(name) for name in stage.models}
    baseline = stage.models[0]
    tokenizer = load_tokenizer(checkpoints[baseline])
    room = stage.rollout.max_model_length - stage.rollout.max_new_tokens
    prompts, report = prepare_prompts(
        stage.prompts, tokenizer, max_prompt_length=room, seed=context.seed, stage_dirs=context.stage_dirs
    )
    context.say(f"  data: {report.summary()}")
    pairs = held_out_pairs(stage, context, tokenizer)
    dtype = context.recipe.dtype
    device = training_device()
    reference = load_policy(context.checkpoint(stage.reference or baseline), dtype).eval().to(device)
    scorer = None
    if stage.reward_model:
        scorer = load_reward_model(context.checkpoint(stage.reward_model), dtype).to(device)

    engine = build_engine(
        checkpoints[baseline], stage.rollout, dtype=dtype, seed=context.seed, beside_ranks=world()[1] > 1
    )
    sampling = SamplingSettings(
        max_new_tokens=stage.rollout.max_new_tokens,
        temperature=stage.rollout.temperature,
        seed=context.seed,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
    )
    results: dict[str, Any] = {"models": {}, "baseline": baseline}
    texts: dict[str, list[str]] = {}
    for version, (name, folder) in enumerate(checkpoints.items()):
        context.status(f"  {name}: sampling and scoring")
        model = load_policy(folder, dtype).eval().to(device)
        if version:
            engine.update_weights(published_weights(model), version=version)
        completions = [group[0] for group in engine.generate([list(row.ids) for row in prompts], sampling)]
        texts[name] = [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)).strip() for c in completions]
        results["models"][name] = measure(
            folder, prompts, completions, texts[name], model, reference, scorer, pairs, sampling.temperature
        )
        means = {k: sum(v) / len(v) for k, v in results["models"][name].items() if isinstance(v, list) and v}
        context.say(f"  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()))
    engine.close()
    results["prompts"] = [
        {
            "prompt": row.messages[-1]["content"],
            "reference": row.reference,
            "completions": {name: texts[name][i] for name in checkpoints},
        }
        for i, row in enumerate(prompts)
    ]
    if scorer is not None and pairs:
        chosen, rejected = (scores(scorer, pairs, side) for side in ("chosen_ids", "rejected_ids"))
        results["reward_model_accuracy"] = {"accuracy": pairwise_accuracy(chosen, rejected), "n": len(chosen)}
    write_json(context.dir / "results.json", results)
    return StageResult(summary(results), report.to_dict())


def held_out_pairs(stage: EvaluateStage, context: StageContext, tokenizer: Any) -> list[dict[str, list[int]]]:
    if not stage.preferences:
        return []
    data = Data(train=stage.preferences, max_length=stage.rollout.max_model_length)
    return list(prepare_dpo_pairs(data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs).train)


def measure(
    folder: Path,
    prompts: list[PromptRow],
    completions: list[Completion],
    texts: list[str],
    model: AnyModel,
    reference: AnyModel,
    scorer: AnyModel | None,
    pairs: list[dict[str, list[int]]],
    temperature: float,
) -> dict[str, Any]:
    """Everything that is measured of one model, a value a prompt."""
    found: dict[str, Any] = {
        "checkpoint": str(folder),
        "lengths": [len(c.token_ids) for c in completions],
        "eos": [c.finished for c in completions],
    }
    if all(row.reference for row in prompts):
        found["f1"] = [token_f1(text, row.reference or "") for text, row in zip(texts, prompts, strict=True)]
    batch = build_experience(
        [c.prompt_ids for c in completions],
        [c.token_ids for c in completions],
        [c.logprobs for c in completions],
    )
    # The sampler's own log-probabilities are the model's: one pass of the reference is enough for the KL.
    reference_logprobs = sequence_logprobs(reference, batch, temperature)
    found["kl"] = (batch.rollout_logprobs.sum(1) - reference_logprobs).tolist()
    if scorer is not None:
        found["scores"] = in_micro_batches(batch, lambda rows: sequence_scores(scorer, rows)).tolist()
    if pairs:
        chosen, rejected = (
            sequence_logprobs(model, to_experience(pairs, side), 1.0) for side in ("chosen_ids", "rejected_ids")
        )
        won = [float(c > r) + 0.5 * float(c == r) for c, r in zip(chosen, rejected, strict=True)]
        found["preference"] = {"accuracy": sum(won) / len(won), "n": len(won), "values": won}
    return found


def to_experience(pairs: list[dict[str, list[int]]], side: str) -> Experience:
    answers = [pair[side] for pair in pairs]
    return build_experience([p["prompt_ids"] for p in pairs], answers, [[0.0] * len(a) for a in answers])


def scores(scorer: AnyModel, pairs: list[dict[str, list[int]]], side: str) -> list[float]:
    return in_micro_batches(to_experience(pairs, side), lambda rows: sequence_scores(scorer, rows)).tolist()


def sequence_logprobs(model: AnyModel, batch: Experience, temperature: float) -> torch.Tensor:
    """Sum of the completion tokens' log-probabilities, [B]."""
    return in_micro_batches(batch, lambda rows: policy_output(model, rows, temperature).logprobs.sum(1))


def in_micro_batches(batch: Experience, function: Any) -> torch.Tensor:
    """One value a sequence, computed in groups of similar length."""
    values, device = torch.zeros(len(batch)), training_device()
    for micro in batch.micro_batches(torch.arange(len(batch)), MICRO_BATCH_TOKENS):
        values[micro] = function(batch.rows(micro).to(device)).float().cpu()
    return values


def summary(results: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for name, found in results["models"].items():
        for key, values in found.items():
            if isinstance(values, list) and values:
                metrics[f"{name}/{key}"] = sum(values) / len(values)
        if "preference" in found:
            metrics[f"{name}/preference"] = found["preference"]["accuracy"]
    if "reward_model_accuracy" in results:
        metrics["reward_model_accuracy"] = results["reward_model_accuracy"]["accuracy"]
    return metrics
