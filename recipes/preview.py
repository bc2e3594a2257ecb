"""Preview of a stage's data: its rows as the model sees them, and why others were dropped. Trains nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.config.filters import Filter
from align.config.parts import Data, RowSource, Source
from align.config.ppo import PpoStage
from align.config.recipe import BASE, Recipe, is_path
from align.config.stage import StageWithParent
from align.config.stages import EvaluateStage, SamplingStage, Stage, TrainingStage
from align.data.prepare import prepare_dpo_pairs, prepare_prompts, prepare_stage
from align.data.report import REASONS, DataReport
from align.data.show import Labels, LengthBias, LengthBin, Side, histogram, length_bias, sides_of
from align.data.store.examples import dropped_examples
from align.data.store.stream import StreamedRows
from align.data.store.tokenised import TokenisedRows, list_hashes, list_lengths
from align.data.streaming import StreamedReport
from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from align.recipes.base import base_tokenizer
from align.run.context import StageContext
from align.run.folder import MODEL
from align.train.checkpoint import load_tokenizer

EXAMPLE = 200
"""Characters of an example of a dropped row."""
STREAMED = 1000
"""Token rows of a stream that are counted."""


@dataclass(frozen=True)
class Lengths:
    """Tokens per row of the training split; of a pair, those of its longer sequence with the prompt.

    computed    mean tokens that a forward pass computes per row; of a pair, the prompt and both answers
    duplicates  rows whose tokens equal those of an earlier row
    """

    mean: float
    computed: float
    longest: int
    bins: list[LengthBin]
    duplicates: int


@dataclass(frozen=True)
class Preview:
    """The data of a stage. What is None is not known of a source that streams, or does not apply to the stage.

    read       returns training rows `start` to `start + count` as sequences of tokens
    total      training rows
    report     counts of rows and tokens; of a source that streams, of its first rows
    streams    True if the rows stream
    examples   {reason: (file and line, the dropped row as JSON text)}
    bias       lengths of the answers of pairs
    labels     completions of each label
    steps      optimizer steps of the stage, or iterations of PPO
    step_name  "optimizer steps" or "PPO iterations"
    use        what the stage does with its rows
    """

    read: Callable[[int, int], list[list[Side]]]
    total: int | None = None
    report: DataReport | None = None
    streams: bool = False
    examples: Mapping[str, tuple[str, str]] | None = None
    lengths: Lengths | None = None
    bias: LengthBias | None = None
    labels: Labels | None = None
    steps: int | None = None
    step_name: str = "optimizer steps"
    use: str = "to train on"

    def rows(self, start: int, count: int) -> list[list[Side]]:
        """`count` rows from row `start` on. Raises `UserError` if there is no such row."""
        if self.total is not None and start >= self.total:
            raise UserError(f"--row {start}: the stage has {self.total:,} rows. Choose a smaller number.")
        return self.read(start, count)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as JSON types."""
        examples = {reason: {"where": where, "row": row} for reason, (where, row) in (self.examples or {}).items()}
        return {
            **(self.report.to_dict() if self.report else {}),
            "examples": examples,
            "lengths": self.lengths and asdict(self.lengths),
            "length_bias": self.bias and asdict(self.bias),
            "labels": self.labels and asdict(self.labels),
            "steps": self.steps,
            "streams": self.streams,
        }


def preview(recipe: Recipe, name: str, run_dir: Path, show: Callable[[str], None] = lambda line: None) -> Preview:
    """The data of stage `name`. show: shows how far the tokenisation is.

    Raises `UserError` if the stage has none, or its data or tokenizer cannot be read.
    """
    if name not in recipe.stages:
        raise UserError(f"the recipe has no stage '{name}'. Use one of {', '.join(recipe.stages)}.")
    stage, context = recipe.stages[name], StageContext(recipe, name, run_dir, progress=show)
    if isinstance(stage, TrainingStage):
        return _of_training(stage, context)
    if isinstance(stage, PpoStage | SamplingStage):
        return _of_prompts(stage, context)
    if stage.prompts:
        return _of_evaluation(stage, context)
    raise UserError(
        f"stage '{name}': it has no `prompts`, and the rows of its tasks and preferences are not shown. Run "
        "`align check RECIPE --data` for the counts of its preferences, or choose another stage."
    )


def has_rows(stage: Stage) -> bool:
    """True if `preview` has something to show of the stage."""
    return not isinstance(stage, EvaluateStage) or bool(stage.prompts)


def count_preferences(recipe: Recipe, name: str, run_dir: Path, show: Callable[[str], None]) -> DataReport:
    """Counts of the preference pairs of an evaluate stage."""
    stage, context = recipe.stages[name], StageContext(recipe, name, run_dir, progress=show)
    assert isinstance(stage, EvaluateStage)
    # Held-out sources are tokenised first even if they stream.
    sources: list[Source] = [
        source.model_copy(update={"streaming": False}) if isinstance(source, RowSource) else source
        for source in stage.preferences
    ]
    data = Data(train=sources, max_length=stage.rollout.max_model_length)
    tokenizer = _evaluation_tokenizer(stage, context)
    return prepare_dpo_pairs(data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=show).report


def parent_tokenizer(reference: str, context: StageContext) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. If neither it nor an ancestor has been run, the one that the base model will have.

    reference: an earlier stage, `base` or a folder.
    """
    while not is_path(reference) and not (context.run_dir / reference / MODEL / "config.json").is_file():
        if reference == BASE:
            return base_tokenizer(context.recipe.model, context.recipe.seed)
        parent = context.recipe.stages[reference]
        assert isinstance(parent, StageWithParent), "a report has no checkpoint"
        reference = parent.init_from
    return load_tokenizer(context.checkpoint(reference))


def _of_training(stage: TrainingStage, context: StageContext) -> Preview:
    tokenizer = parent_tokenizer(stage.init_from, context)
    data = prepare_stage(stage, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=context.progress)
    if isinstance(data.train, StreamedRows) and isinstance(data.report, StreamedReport):
        return _of_stream(data.train, data.report, tokenizer, stage.max_steps)
    assert data.rows is not None, "only a stream has no rows"
    steps = stage.max_steps or math.ceil(stage.epochs * math.ceil(len(data.train) / stage.batch_size))
    rows, prompts = data.train, _prompt_tokens(data.train, data.rows)
    lengths, bias = _sizes(rows, prompts)
    computed = None
    if bias is not None and prompts is not None:
        computed = float(prompts.mean()) + bias.chosen_tokens + bias.rejected_tokens
    return Preview(
        read=lambda start, count: [
            _sides(rows[i], tokenizer, None if prompts is None else int(prompts[i]))
            for i in _range(start, count, len(rows))
        ],
        total=len(data.train),
        report=data.report,
        examples=_examples(data.rows),
        lengths=_lengths(lengths, data.rows, computed),
        bias=bias,
        labels=_labels(rows, data.rows),
        steps=steps,
    )


def _of_stream(
    stream: StreamedRows, report: StreamedReport, tokenizer: PreTrainedTokenizerBase, steps: int | None
) -> Preview:
    """Counts of the first rows. The tokenised rows of the first pass are read, at most `STREAMED`."""
    counted = report.now()
    for number in range(STREAMED):
        stream[number]
        if report.passes:  # the source has fewer rows, and begins again
            break
        counted = report.now()
    return Preview(
        read=lambda start, count: [_sides(stream[i], tokenizer) for i in range(start, start + count)],
        report=counted,
        streams=True,
        steps=steps,
    )


def _of_prompts(stage: PpoStage | SamplingStage, context: StageContext) -> Preview:
    if isinstance(stage, PpoStage):
        sources, longest = stage.prompts, stage.max_prompt_length
    else:
        sources, longest = stage.train, stage.rollout.max_model_length - stage.rollout.max_new_tokens
    found = _prompts(sources, longest, parent_tokenizer(stage.init_from, context), context, stage.filters)
    steps = stage.steps if isinstance(stage, PpoStage) else None
    return replace(found, steps=steps, step_name="PPO iterations")


def _of_evaluation(stage: EvaluateStage, context: StageContext) -> Preview:
    longest = stage.rollout.max_model_length - stage.rollout.max_new_tokens
    found = _prompts(stage.prompts, longest, _evaluation_tokenizer(stage, context), context)
    return replace(found, use="to evaluate")


def _evaluation_tokenizer(stage: EvaluateStage, context: StageContext) -> PreTrainedTokenizerBase:
    tokenizer = parent_tokenizer(stage.models[0], context)
    set_template_defaults(tokenizer, stage.chat_template_kwargs, f"stages.{context.name}.chat_template_kwargs")
    return tokenizer


def _prompts(
    sources: Sequence[Source],
    longest: int,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    filters: Sequence[Filter] = (),
) -> Preview:
    prompts, report = prepare_prompts(
        sources,
        tokenizer,
        max_prompt_length=longest,
        seed=context.seed,
        stage_dirs=context.stage_dirs,
        filters=filters,
        show=context.progress,
    )
    return Preview(
        read=lambda start, count: [
            _sides({"input_ids": list(prompts[i].ids)}, tokenizer) for i in _range(start, count, len(prompts))
        ],
        total=len(prompts),
        report=report,
        examples=_examples(prompts.rows),
        lengths=_lengths(prompts.rows.tokens["tokens"], prompts.rows),
    )


def _sides(
    row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None = None
) -> list[Side]:
    return sides_of(row, lambda ids: str(tokenizer.decode(list(ids))), prompt_tokens)


def _range(start: int, count: int, total: int) -> range:
    return range(start, min(start + count, total))


def _prompt_tokens(rows: Any, tokenised: TokenisedRows) -> np.ndarray | None:
    """Tokens of the prompt of each pair or labelled row; None for other rows."""
    if "prompt_ids" in rows.column_names:
        return list_lengths(rows, "prompt_ids")
    if "chosen_ids" not in rows.column_names:
        return None
    counts = tokenised.tokens  # of both sequences, which begin with the prompt, and of both answers
    return np.asarray((counts["tokens"] - counts["loss"]) // 2)


def _sizes(rows: Any, prompts: np.ndarray | None) -> tuple[np.ndarray, LengthBias | None]:
    """(tokens per row; of a pair, those of its longer sequence; lengths of the answers of pairs)."""
    if prompts is None:
        return list_lengths(rows, "input_ids"), None
    if "completion_ids" in rows.column_names:
        return prompts + list_lengths(rows, "completion_ids"), None
    chosen, rejected = list_lengths(rows, "chosen_ids"), list_lengths(rows, "rejected_ids")
    if "prompt_ids" not in rows.column_names:
        chosen, rejected = chosen - prompts, rejected - prompts
    return prompts + np.maximum(chosen, rejected), length_bias(zip(chosen.tolist(), rejected.tolist()))


def _labels(rows: Any, tokenised: TokenisedRows) -> Labels | None:
    labels = tokenised.labels()
    if labels is None:
        return None
    lengths = list_lengths(rows, "completion_ids")
    desirable, undesirable = (float(lengths[kind].mean()) if kind.any() else None for kind in (labels, ~labels))
    texts = np.stack([list_hashes(rows, name) for name in ("prompt_ids", "completion_ids")], 1)
    _, text = np.unique(texts, axis=0, return_inverse=True)
    text = text.reshape(-1)
    both = np.isin(text, text[labels]) & np.isin(text, text[~labels])
    return Labels(desirable, undesirable, int(both.sum()))


def _lengths(lengths: np.ndarray, rows: TokenisedRows, computed: float | None = None) -> Lengths:
    """computed: as `Lengths.computed`; default: the mean of `lengths`."""
    digests, mean = rows.tokens["digest"], float(lengths.mean())
    return Lengths(
        mean=mean,
        computed=mean if computed is None else computed,
        longest=int(lengths.max()),
        bins=histogram(lengths.tolist()),
        duplicates=len(digests) - len(np.unique(digests)),
    )


def _examples(rows: TokenisedRows) -> dict[str, tuple[str, str]]:
    return {reason: (found.where, _short(found.row)) for reason, found in dropped_examples(rows, REASONS).items()}


def _short(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= EXAMPLE else f"{text[:EXAMPLE]}..."
