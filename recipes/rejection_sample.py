"""Rejection sampling: sample several completions per prompt, score them, and keep the good ones as rows.

Every rank calls `run`. Rank 0 samples, chooses and writes; reward models are sharded, so all ranks score together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.stages import RejectionSampleStage
from align.data.answers import AnswerReader
from align.data.chat import stop_token_ids
from align.data.prepare import PromptRow
from align.data.shapes import DropRow, Message
from align.errors import UserError
from align.parallel.group import from_rank_0
from align.parallel.sharding import world
from align.recipes.sampled_rows import completion_row, pair_row, prompts_of, write_rows
from align.reward.mixture import Scorer
from align.rl.models import load_reward_models
from align.rl.score import to_experience
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.build import build_engine
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_tokenizer

PROMPTS_AT_A_TIME = 256
"""Prompts whose completions are sampled, and then scored, together."""
TOLERANCE = 1e-6
"""A score is a sum of float32 values."""


@dataclass(frozen=True)
class Candidate:
    """A completion that can be kept.

    message: the completion as an assistant message. score: its score.
    """

    message: Message
    score: float


@dataclass
class Tally:
    """Counts and scores of the completions of a split.

    prompts: prompts. sampled: completions. truncated: completions that reached max_new_tokens. unreadable: completions
    that are not a message. empty: completions without content. repeated: completions equal to another of their prompt.
    kept: rows. prompts_kept: prompts with a row. score: sum of all scores. best: sum over prompts of the highest score.
    highest: highest score of all.
    """

    prompts: int = 0
    sampled: int = 0
    truncated: int = 0
    unreadable: int = 0
    empty: int = 0
    repeated: int = 0
    kept: int = 0
    prompts_kept: int = 0
    score: float = 0.0
    best: float = 0.0
    highest: float = float("-inf")

    def metrics(self, split: str) -> dict[str, float]:
        """Counts and means for the manifest."""
        counts = ("sampled", "truncated", "unreadable", "empty", "repeated", "kept", "prompts_kept")
        found: dict[str, float] = {f"{split}_{name}": getattr(self, name) for name in counts}
        found[f"{split}_score"] = self.score / max(self.sampled, 1)
        found[f"{split}_best_score"] = self.best / max(self.prompts, 1)
        return found

    def line(self) -> str:
        dropped = [f"{count} {name}" for name in DROPPED if (count := getattr(self, name))]
        return (
            f"{self.kept} rows of {self.prompts_kept} of {self.prompts} prompts, from {self.sampled} completions"
            f"{' (' + ', '.join(dropped) + ')' if dropped else ''}; score {self.score / max(self.sampled, 1):.4f}, "
            f"of the best of each prompt {self.best / max(self.prompts, 1):.4f}"
        )


DROPPED = ("truncated", "unreadable", "empty", "repeated")


def run(stage: RejectionSampleStage, context: StageContext) -> StageResult:
    tokenizer = load_tokenizer(context.checkpoint(stage.init_from))
    splits = prompts_of(stage, context, tokenizer)
    metrics: dict[str, float] = {}
    with ExitStack() as stack:
        every = [row for rows, _ in splits.values() for row in rows]
        load_models = partial(load_reward_models, stage, context)
        scorer = Scorer(stage.rewards, every, tokenizer, load_models=load_models, say=context.say)
        stack.callback(scorer.close)
        sampler = Sampler(stage, context, tokenizer)
        stack.callback(sampler.close)
        reader = AnswerReader(tokenizer)
        for number, (split, (rows, report)) in enumerate(splits.items()):
            context.say(f"  {split}: {report.summary()}")
            kept: list[dict[str, Any]] = []
            tally = Tally()
            for start in range(0, len(rows), PROMPTS_AT_A_TIME):
                part = rows[start : start + PROMPTS_AT_A_TIME]
                groups = sampler.sample(part, number, start)
                flat = [completion for group in groups for completion in group]
                repeated = [row for row in part for _ in range(stage.samples)]
                scores = scorer.score(to_experience(flat), repeated, flat)[0].tolist()
                for index, (row, group) in enumerate(zip(part, groups, strict=True)):
                    own = scores[index * stage.samples : (index + 1) * stage.samples]
                    kept += rows_of(stage, row, candidates(group, own, reader, tally), tally)
                context.progress(f"  {split}: {start + len(part)} of {len(rows)} prompts, {len(kept)} rows")
            metrics |= tally.metrics(split)
            context.say(f"  {split}: {tally.line()}")
            if not kept:
                raise UserError(
                    f"stages.{context.name}: none of the {tally.sampled} completions for {split} makes a row; their "
                    f"highest score is {tally.highest:.4g}. Lower threshold or margin, raise samples, or change keep."
                )
            from_rank_0("rejection_sample: write", partial(write_rows, context, split, kept))
    return StageResult(metrics, {split: report.to_dict() for split, (_, report) in splits.items()})


class Sampler:
    """The rollout engine, on rank 0. All ranks make the same calls."""

    def __init__(self, stage: RejectionSampleStage, context: StageContext, tokenizer: PreTrainedTokenizerBase):
        self.stage, self.seed = stage, context.seed
        self.stop_ids = tuple(stop_token_ids(tokenizer))
        self._engine: RolloutEngine | None = None

        def start() -> None:
            parent, dtype = context.checkpoint(stage.init_from), context.recipe.dtype
            beside = world()[1] > 1
            self._engine = build_engine(parent, stage.rollout, dtype=dtype, seed=self.seed, beside_ranks=beside)

        from_rank_0("rejection_sample: start the engine", start)

    def sample(self, rows: Sequence[PromptRow], split: int, start: int) -> list[list[Completion]]:
        """The completions of each prompt. split, start: number of the split and of the first prompt in it."""
        sampling = SamplingSettings(
            max_new_tokens=self.stage.rollout.max_new_tokens,
            temperature=self.stage.rollout.temperature,
            seed=(self.seed * 2 + split) * 1_000_003 + start,
            stop_token_ids=self.stop_ids,
            n=self.stage.samples,
        )

        def generate() -> list[list[Completion]]:
            assert self._engine is not None
            return self._engine.generate([list(row.ids) for row in rows], sampling)

        return from_rank_0("rejection_sample: sample", generate)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def candidates(
    group: Sequence[Completion], scores: Sequence[float], reader: AnswerReader, tally: Tally
) -> list[Candidate]:
    """The completions of a prompt that can be kept, the best first; of equal scores the first sampled."""
    found: dict[str, Candidate] = {}
    for completion, score in zip(group, scores, strict=True):
        if not completion.finished:
            tally.truncated += 1
            continue
        try:
            message = reader.message(completion.token_ids)
        except DropRow:
            tally.unreadable += 1
            continue
        message["content"] = message["content"].strip()
        if not message["content"]:
            tally.empty += 1
            continue
        text = json.dumps(message, sort_keys=True)
        if text in found:
            tally.repeated += 1
            continue
        found[text] = Candidate(message, score)
    tally.prompts += 1
    tally.sampled += len(group)
    tally.score += sum(scores)
    tally.best += max(scores)
    tally.highest = max(tally.highest, *scores)
    return sorted(found.values(), key=lambda candidate: -candidate.score)


def rows_of(
    stage: RejectionSampleStage, row: PromptRow, ordered: Sequence[Candidate], tally: Tally
) -> list[dict[str, Any]]:
    """The rows that `keep` makes of a prompt's candidates, the best first."""
    lowest = stage.lowest
    good = [candidate for candidate in ordered if lowest is None or candidate.score >= lowest - TOLERANCE]
    if stage.keep == "pairs":
        made = []
        if good and (gap := good[0].score - ordered[-1].score) > 0 and gap >= stage.margin:
            best, worst = good[0], ordered[-1]
            scores = {"chosen_score": best.score, "rejected_score": worst.score}
            made = [pair_row(row, best.message, worst.message, **scores)]
    else:
        most = 1 if stage.keep == "best" else stage.per_prompt
        made = [completion_row(row, candidate.message, score=candidate.score) for candidate in good[:most]]
    tally.kept += len(made)
    tally.prompts_kept += bool(made)
    return made
