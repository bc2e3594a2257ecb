"""Compare checkpoints on held-out prompts, preference pairs and tasks, and write results.json for the report."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from align.config.stages import EvaluateStage
from align.data.template_defaults import set_template_defaults
from align.eval.data import EvaluationData, load_data
from align.eval.engine import SharedEngine
from align.eval.held_out import HeldOut, load_frozen
from align.eval.runner import Results, TaskScorer, decode
from align.eval.stage_tasks import run_tasks
from align.parallel.group import is_main
from align.run.context import StageContext, StageResult
from align.run.folder import write_json
from align.train.checkpoint import load_tokenizer


@torch.no_grad()
def run(stage: EvaluateStage, context: StageContext) -> StageResult:
    checkpoints = {name: context.checkpoint(name) for name in stage.models}
    tokenizer = load_tokenizer(checkpoints[stage.models[0]])
    set_template_defaults(tokenizer, stage.chat_template_kwargs, f"stages.{context.name}.chat_template_kwargs")
    data = load_data(stage, context, tokenizer)
    results = Results(stage, data)
    if stage.prompts or stage.prompt_tasks or stage.preferences:
        _compare(stage, context, data, tokenizer, checkpoints, results)
    else:
        for name, folder in checkpoints.items():
            results.add_checkpoint(name, folder)
    if stage.task_names:
        results.add_benchmarks(run_tasks(stage, context))
    if is_main():
        write_json(context.dir / "results.json", results.content)
    return StageResult(results.metrics(), data.report)


def _compare(
    stage: EvaluateStage,
    context: StageContext,
    data: EvaluationData,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Mapping[str, Path],
    results: Results,
) -> None:
    """Sample every model on the prompts and on the tasks that the recipe defines, and measure it."""
    rollout, dtype = stage.rollout, context.recipe.dtype
    baseline = checkpoints[stage.models[0]]
    with ExitStack() as stack:
        scorer = stack.enter_context(closing(TaskScorer([task for task, _ in data.tasks], stage, context, tokenizer)))
        held_out = HeldOut(stage, context, data)
        engine = SharedEngine(baseline, rollout, tokenizer, dtype=dtype, seed=context.seed)
        stack.callback(engine.close)
        for version, (name, folder) in enumerate(checkpoints.items()):
            context.status(f"  {name}: sampling and scoring")
            model = load_frozen(folder, context)
            if version:
                engine.update_weights(model, version)
            completions = []
            if data.prompts:
                completions = engine.sample(
                    data.prompts, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens
                )
            texts = decode(completions, tokenizer)
            results.add(name, held_out.measure(folder, model, completions, texts), texts)
            for task, rows in data.tasks:
                completions = engine.sample(rows, temperature=task.temperature, max_new_tokens=task.max_new_tokens)
                results.add_task(name, task, scorer.score(task, rows, completions), decode(completions, tokenizer))
            context.say(results.line(name))
            del model
            gc.collect()  # a DeepSpeed engine has reference cycles; free the model before the next is loaded
    results.add_reward_model(held_out.reward_model_accuracy())
