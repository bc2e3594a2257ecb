"""Rows made of sampled completions: the prompts, and what later stages read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.stages import SamplingStage
from align.data.prepare import DataReport, PromptRow, prepare_prompts
from align.data.shapes import TEMPLATE_COLUMNS, Message
from align.run.context import StageContext
from align.run.folder import write_text


def prompts_of(
    stage: SamplingStage, context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[Sequence[PromptRow], DataReport]]:
    """The prompts of the splits that the stage has, `train` and `held_out`."""
    rollout = stage.rollout
    return {
        split: prepare_prompts(
            sources,
            tokenizer,
            max_prompt_length=rollout.max_model_length - rollout.max_new_tokens,
            seed=context.seed,
            stage_dirs=context.stage_dirs,
            filters=stage.filters if split == "train" else (),
            show=context.progress,
        )
        for split, sources in (("train", stage.train), ("held_out", stage.held_out))
        if sources
    }


def completion_row(row: PromptRow, completion: Message, **more: Any) -> dict[str, Any]:
    """A row of a prompt and its completion. more: columns for readers."""
    return {**_template_columns(row), "prompt": row.messages, "completion": [completion], **more}


def pair_row(row: PromptRow, chosen: Message, rejected: Message, **more: Any) -> dict[str, Any]:
    """A row of preference data. more: further columns, such as `rejected_finished`."""
    return {**_template_columns(row), "prompt": row.messages, "chosen": [chosen], "rejected": [rejected], **more}


def write_rows(context: StageContext, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows where a source `{kind: stage}` reads them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(context.dir / "data" / f"{split}.jsonl", lines)


def _template_columns(row: PromptRow) -> dict[str, Any]:
    return {name: row.row[name] for name in TEMPLATE_COLUMNS if row.row.get(name) is not None}
