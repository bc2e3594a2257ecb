"""Make preference pairs: the reference answer is chosen; a sample or another prompt's reference is rejected.

Rank 0 samples and writes the pairs, while the other ranks wait.
"""

from __future__ import annotations

import random
from contextlib import closing

from transformers import PreTrainedTokenizerBase

from align.config.stages import SampleStage
from align.data.answers import AnswerReader
from align.data.chat import stop_token_ids
from align.data.prepare import PromptRow
from align.data.shapes import DropRow, Message
from align.parallel.group import from_rank_0
from align.parallel.sharding import world
from align.recipes.sampled_rows import pair_row, prompts_of, write_rows
from align.rollout.base import RolloutEngine, SamplingSettings
from align.rollout.build import build_engine
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_tokenizer


def run(stage: SampleStage, context: StageContext) -> StageResult:
    return from_rank_0("sample", lambda: _sample(stage, context))


def _sample(stage: SampleStage, context: StageContext) -> StageResult:
    rollout = stage.rollout
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    splits = prompts_of(stage, context, tokenizer)
    engine = build_engine(parent, rollout, dtype=context.recipe.dtype, seed=context.seed, beside_ranks=world()[1] > 1)
    counts: dict[str, float] = {}
    with closing(engine):
        for split, (rows, report) in splits.items():
            context.say(f"  {split}: {report.summary()}")
            with_reference = [row for row in rows if row.reference]
            pairs, unreadable = _pairs(with_reference, stage, engine, tokenizer, context.seed)
            write_rows(context, split, pairs)
            counts[f"{split}_pairs"] = len(pairs)
            counts[f"{split}_without_reference"] = len(rows) - len(with_reference)
            counts[f"{split}_unreadable"] = unreadable
            counts[f"{split}_empty_or_equal"] = len(with_reference) - len(pairs) - unreadable
    words = {name: name.replace("train_", "training ").replace("held_out_", "held-out ") for name in counts}
    context.say("  " + ", ".join(f"{v:.0f} {words[name].replace('_', ' ')}" for name, v in counts.items() if v))
    return StageResult(counts, {split: report.to_dict() for split, (_, report) in splits.items()})


def _pairs(
    rows: list[PromptRow], stage: SampleStage, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[dict], int]:
    """(preference pairs for prompts with a reference, number of samples that cannot be read as a message).

    Rejected answers that are empty, equal to the reference or unreadable are dropped.
    """
    chooser = random.Random(seed)
    neighbours = [chooser.random() < stage.neighbours for _ in rows]
    sampling = SamplingSettings(
        max_new_tokens=stage.rollout.max_new_tokens,
        temperature=stage.rollout.temperature,
        seed=seed,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
    )
    prompts = [list(row.ids) for row, neighbour in zip(rows, neighbours, strict=True) if not neighbour]
    sampled = iter(engine.generate(prompts, sampling))
    reader, pairs, unreadable = AnswerReader(tokenizer), [], 0
    for i, (row, neighbour) in enumerate(zip(rows, neighbours, strict=True)):
        finished = True
        if neighbour:
            rejected: Message = {"role": "assistant", "content": rows[(i + 1) % len(rows)].reference or ""}
        else:
            (sample,) = next(sampled)
            try:
                rejected = reader.message(sample.token_ids)
            except DropRow:
                unreadable += 1
                continue
            rejected["content"] = rejected["content"].strip()
            finished = sample.finished
        if rejected["content"] and rejected["content"] != row.reference:
            chosen: Message = {"role": "assistant", "content": row.reference}
            origin = "neighbour" if neighbour else "sampled"
            # No end-of-turn token is added to a sample that was truncated at max_new_tokens.
            pairs.append(pair_row(row, chosen, rejected, rejected_finished=finished, origin=origin))
    return pairs, unreadable
