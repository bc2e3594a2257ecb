"""Read and tokenise the rows of an evaluate stage: prompts, preference pairs, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.parts import Data, Source
from align.config.stages import EvaluateStage
from align.data.prepare import DataReport, PromptRow, prepare_dpo_pairs, prepare_prompts
from align.eval.metrics import require_scorable
from align.eval.task import PromptTask, resolve_task
from align.reward.components import Samples
from align.run.context import StageContext

Pairs = list[dict[str, list[int]]]
"""Rows with prompt_ids, chosen_ids and rejected_ids."""


@dataclass(frozen=True)
class EvaluationData:
    """The rows of an evaluate stage.

    prompts: prompts of the comparison; may be empty.
    pairs: held-out preference pairs; may be empty.
    tasks: each task with its prompts.
    report: row counts of `prompts`; those of each task are under the key `tasks`.
    """

    prompts: Sequence[PromptRow]
    pairs: Pairs
    tasks: list[tuple[PromptTask, Sequence[PromptRow]]]
    report: dict[str, Any]


def load_data(stage: EvaluateStage, context: StageContext, tokenizer: PreTrainedTokenizerBase) -> EvaluationData:
    """Read all rows. Raises `UserError` if a metric's column is empty in every row of its task."""
    rollout = stage.rollout

    def read(sources: Sequence[Source], max_new_tokens: int) -> tuple[Sequence[PromptRow], DataReport]:
        return prepare_prompts(
            sources,
            tokenizer,
            max_prompt_length=rollout.max_model_length - max_new_tokens,
            seed=context.seed,
            stage_dirs=context.stage_dirs,
        )

    prompts: Sequence[PromptRow] = []
    report: dict[str, Any] = {}
    if stage.prompts:
        prompts, counts = read(stage.prompts, rollout.max_new_tokens)
        report = counts.to_dict()
        context.say(f"  data: {counts.summary()}")
    tasks = []
    for settings in stage.prompt_tasks:
        task = resolve_task(settings, rollout)
        rows, counts = read(task.prompts, task.max_new_tokens)
        require_scorable(task.name, task.metrics, Samples(rows, [], tokenizer))
        tasks.append((task, rows))
        report.setdefault("tasks", {})[task.name] = counts.to_dict()
        context.say(f"  task {task.name}: {counts.summary()}")
    pairs: Pairs = []
    if stage.preferences:
        # Held-out sources are tokenised first even if they stream.
        data = Data(train=stage.preferences, held_out=stage.preferences, max_length=rollout.max_model_length)
        held_out = prepare_dpo_pairs(data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs).held_out
        pairs = list(held_out or ())
    return EvaluationData(prompts, pairs, tasks, report)
