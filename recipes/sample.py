"""Sampling preference pairs: the reference answer is preferred to the model's own, or to a neighbour's reference."""

from __future__ import annotations

import json
import random

from align.config.stages import SampleStage
from align.data import PromptRow, prepare_prompts, stop_token_ids
from align.rollout.base import SamplingSettings
from align.rollout.build import build_engine
from align.run.context import StageContext, StageResult
from align.run.folder import write_text
from align.train.checkpoint import load_tokenizer


def run(stage: SampleStage, context: StageContext) -> StageResult:
    rollout = stage.rollout
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    room = rollout.max_model_length - rollout.max_new_tokens
    splits = {
        split: prepare_prompts(
            sources, tokenizer, max_prompt_length=room, seed=context.seed, stage_dirs=context.stage_dirs
        )
        for split, sources in (("train", stage.train), ("held_out", stage.held_out))
        if sources
    }
    engine = build_engine(parent, rollout, dtype=context.recipe.dtype, seed=context.seed)
    counts: dict[str, float] = {}
    for split, (rows, report) in splits.items():
        context.say(f"  {split}: {report.summary()}")
        with_reference = [row for row in rows if row.reference]
        chooser = random.Random(context.seed)
        neighbours = [chooser.random() < stage.neighbours for _ in with_reference]
        asked = [row for row, neighbour in zip(with_reference, neighbours, strict=True) if not neighbour]
        sampling = SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            seed=context.seed,
            stop_token_ids=tuple(stop_token_ids(tokenizer)),
        )
        sampled = iter(engine.generate([list(row.ids) for row in asked], sampling))
        pairs = []
        for i, (row, neighbour) in enumerate(zip(with_reference, neighbours, strict=True)):
            finished = True
            if neighbour:
                rejected = with_reference[(i + 1) % len(with_reference)].reference or ""
            else:
                (sample,) = next(sampled)
                rejected = str(tokenizer.decode(sample.token_ids, skip_special_tokens=True)).strip()
                finished = sample.finished
            if rejected and rejected != row.reference:
                pairs.append(_pair(row, rejected, "neighbour" if neighbour else "sampled", finished))
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        write_text(context.dir / "data" / f"{split}.jsonl", lines)
        counts[f"{split}_pairs"] = len(pairs)
        counts[f"{split}_without_reference"] = len(rows) - len(with_reference)
        counts[f"{split}_empty_or_equal"] = len(with_reference) - len(pairs)
    engine.close()
    context.say("  " + ", ".join(f"{value:.0f} {name}" for name, value in counts.items() if value))
    return StageResult(counts, {split: report.to_dict() for split, (_, report) in splits.items()})


def _pair(row: PromptRow, rejected: str, origin: str, finished: bool) -> dict:
    """rejected_finished: False for a sample that was cut at max_new_tokens, which then gets no end-of-turn token."""
    return {
        "prompt": row.messages,
        "chosen": [{"role": "assistant", "content": row.reference}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "rejected_finished": finished,
        "origin": origin,
    }
