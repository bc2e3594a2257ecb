"""Tokenise the data section of a recipe, one function per kind of trainer.

Every row is encoded once per machine and kept in the cache folder; see `align.data.store`. The token rows are
memory-mapped, so a rank holds their order but not their tokens. `align.data.encode` lists the columns.

The report counts dropped rows by reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import datasets
from transformers import PreTrainedTokenizerBase

from align.config.filters import Filter
from align.config.parts import Data, Mixture, Source
from align.config.stages import DpoStage, KtoStage, PretrainStage, RewardModelStage, SftStage, TrainingStage
from align.data.accepted import Kind
from align.data.balance import held_out_note, prompt_note, require_both_labels, weight_note
from align.data.chat import check_template
from align.data.encode import Encoding
from align.data.no_rows import no_rows
from align.data.prompts import PromptRow, PromptRows
from align.data.report import DataReport, make_report
from align.data.store.blocks import block_lengths, blocks
from align.data.store.progress import Show, silent
from align.data.store.stream import StreamedRows
from align.data.store.tokenised import Store, TokenisedRows
from align.data.streaming import open_stream
from align.errors import UserError
from align.run.cache import cache_folder

__all__ = ["DataReport", "Prepared", "PromptRow", "PromptRows"]
StageDirs = Mapping[str, Path] | None


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows for a trainer.

    held_out: None if the recipe holds out no rows.
    train: `StreamedRows` if a training source streams.
    rows: the training rows before pretraining splits them, with their sources; None for a stream.
    """

    train: datasets.Dataset | StreamedRows
    held_out: datasets.Dataset | None
    report: DataReport
    rows: TokenisedRows | None = None


class Options(TypedDict):
    """Arguments that all functions below share."""

    seed: int
    stage_dirs: StageDirs
    show: Show


def prepare_stage(
    stage: TrainingStage,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    stage_dirs: StageDirs = None,
    show: Show = silent,
) -> Prepared:
    """The data of a training stage. show: shows how far the tokenisation is."""
    options: Options = {"seed": seed, "stage_dirs": stage_dirs, "show": show}
    match stage:
        case PretrainStage():
            return prepare_text(stage.data, tokenizer, attend_across=stage.attend_across, **options)
        case SftStage():
            return prepare_sft(stage.data, tokenizer, assistant_only_loss=stage.assistant_only_loss, **options)
        case RewardModelStage():
            return prepare_reward_pairs(stage.data, tokenizer, **options)
        case DpoStage():
            return prepare_dpo_pairs(stage.data, tokenizer, **options)
        case KtoStage():
            return prepare_labelled(stage, tokenizer, **options)
        case _:
            raise TypeError(f"no rows are prepared for a {type(stage).__name__}")


def prepare_text(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attend_across: bool = True,
    seed: int,
    stage_dirs: StageDirs = None,
    show: Show = silent,
) -> Prepared:
    """Concatenate documents and split them into rows of `max_length` tokens (input_ids = labels), for pretraining.

    Each document ends with the end-of-sequence token. Conversations are rendered with the chat template. Only the last
    row of a split may be shorter; it is dropped if it has a single token, which leaves no token to predict. No row
    counts as truncated. The column `documents` has the number of tokens of each document in the row.

    attend_across: a document's first token is predicted from the document before it, unless it begins a row.
    """
    encoding = Encoding("text")
    if data.streams:
        return _streamed(data, encoding, tokenizer, seed, stage_dirs or {}, show)
    train, held_out, report = _split_rows(data, encoding, tokenizer, seed, stage_dirs or {}, show)
    cache = cache_folder(data.cache)
    made = blocks(train, data.max_length, cache)
    made_held_out = None if held_out is None else blocks(held_out, data.max_length, cache)
    lengths = block_lengths(report.tokens, data.max_length)
    pieces = len(made.data.column("documents").combine_chunks().flatten())
    report = replace(
        report,
        tokens=sum(lengths),
        loss_tokens=sum(lengths) - (len(lengths) if attend_across else pieces),  # nothing predicts a first token
        fingerprint=hashlib.sha256(f"{report.fingerprint} {data.max_length}".encode()).hexdigest(),
    )
    return Prepared(made, made_held_out, report, train)


def prepare_sft(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool,
    seed: int,
    stage_dirs: StageDirs = None,
    show: Show = silent,
) -> Prepared:
    """Conversations as input_ids and labels, for SFTTrainer.

    assistant_only_loss: the loss includes only assistant turns; in a prompt/completion row, only those of the
        completion. If False, it includes every token, and `text` rows are accepted too.

    Rows longer than `max_length` are truncated at the end, and dropped if no token in the loss remains.
    """
    if assistant_only_loss:
        check_template(tokenizer)
    return _prepare(data, "sft" if assistant_only_loss else "sft_all_tokens", tokenizer, seed, stage_dirs, show)


def prepare_reward_pairs(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None, show: Show = silent
) -> Prepared:
    """Preference pairs as chosen_ids and rejected_ids, both with the prompt, for RewardTrainer.

    A pair is dropped if the prompt and one of the answers exceed `max_length`, or if both answers are equal.
    """
    return _prepare(data, "reward_pairs", tokenizer, seed, stage_dirs, show)


def prepare_dpo_pairs(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None, show: Show = silent
) -> Prepared:
    """Preference pairs as prompt_ids, chosen_ids and rejected_ids, for DPOTrainer.

    Drops the same pairs as `prepare_reward_pairs`.
    """
    return _prepare(data, "dpo_pairs", tokenizer, seed, stage_dirs, show)


def prepare_labelled(
    stage: KtoStage, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None, show: Show = silent
) -> Prepared:
    """Labelled completions as prompt_ids, completion_ids and label, for KTO. A preference pair becomes two rows.

    A row is dropped if prompt and completion exceed `max_length`, a pair if one of its answers does. Raises `UserError`
    if all rows have one label.
    """
    data = _prepare(stage.data, "labelled", tokenizer, seed, stage_dirs, show)
    require_both_labels(stage, data.report.desirable, data.report.undesirable)
    notes = [weight_note(stage, data.report.desirable, data.report.undesirable)]
    if isinstance(data.train, datasets.Dataset):
        notes.append(prompt_note(stage, data.train))
    if data.held_out is not None:
        notes.append(held_out_note(data.held_out))
    return replace(data, report=replace(data.report, notes=tuple(note for note in notes if note)))


def prepare_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    seed: int,
    stage_dirs: StageDirs = None,
    filters: Sequence[Filter] = (),
    cache: str | None = None,
    show: Show = silent,
) -> tuple[PromptRows, DataReport]:
    """(prompts in the order of the shuffled mixture, report). Prompts over `max_prompt_length` tokens are dropped.

    filters: drop prompts. cache: as `data.cache`. show: as in `prepare_stage`. Raises `UserError` if no prompt remains.
    """
    store = Store(cache_folder(cache), Encoding("prompts", max_prompt_length, tuple(filters)), tokenizer, show=show)
    rows = store.mix(store.plan(sources, stage_dirs or {}, seed), sources, Mixture(), seed)
    if not len(rows.indices):
        raise no_rows(rows, sources, "max_prompt_length or rollout.max_model_length", {"filters": filters})
    return PromptRows(rows), make_report([rows], rows, None, all_columns=True)


# --- shared -----------------------------------------------------------------------------------------------


def _prepare(
    data: Data, kind: Kind, tokenizer: PreTrainedTokenizerBase, seed: int, stage_dirs: StageDirs, show: Show
) -> Prepared:
    encoding = Encoding(kind, data.max_length)
    if data.streams:
        return _streamed(data, encoding, tokenizer, seed, stage_dirs or {}, show)
    train, held_out, report = _split_rows(data, encoding, tokenizer, seed, stage_dirs or {}, show)
    return Prepared(train.dataset(), None if held_out is None else held_out.dataset(), report, train)


def _streamed(
    data: Data,
    encoding: Encoding,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    stage_dirs: Mapping[str, Path],
    show: Show,
) -> Prepared:
    filtered = replace(encoding, filters=tuple(data.filters))
    train, held_out, report = open_stream(data, filtered, tokenizer, seed, stage_dirs)
    if data.held_out:
        store = Store(cache_folder(data.cache), encoding, tokenizer, data.workers, show)
        rows = store.mix(store.plan(data.held_out, stage_dirs, seed), data.held_out, Mixture(), seed)
        if not len(rows.indices):
            raise no_rows(rows, data.held_out, "data.max_length")
        held_out = blocks(rows, data.max_length, store.cache) if encoding.kind == "text" else rows.dataset()
        report = replace(report, rows_held_out=len(rows.tokens))
    return Prepared(train, held_out, report)


def _split_rows(
    data: Data,
    encoding: Encoding,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    stage_dirs: Mapping[str, Path],
    show: Show,
) -> tuple[TokenisedRows, TokenisedRows | None, DataReport]:
    """(training rows, held-out rows if any, report). Raises `UserError` if a split would be empty."""
    unfiltered = Store(cache_folder(data.cache), encoding, tokenizer, data.workers, show)
    store = replace(unfiltered, encoding=replace(encoding, filters=tuple(data.filters)))
    plans = store.plan(data.train, stage_dirs, seed)
    # Held-out sources are opened before the slow encoding, so that an error in them is reported early.
    others = unfiltered.plan(data.held_out, stage_dirs, seed)
    rows = store.mix(plans, data.train, data.mixture, seed)
    if not len(rows.indices):
        raise no_rows(rows, data.train, "data.max_length", {"data.filters": data.filters})
    if others:
        held_out = unfiltered.mix(others, data.held_out, Mixture(), seed)
        if not len(held_out.indices):
            raise no_rows(held_out, data.held_out, "data.max_length")
        return rows, held_out, make_report([rows, held_out], rows, held_out)
    if data.held_out_fraction == 0:
        return rows, None, make_report([rows], rows, None)
    train, held_out = rows.split(data.held_out_fraction)
    for split, kind, change in ((train, "training", "Lower"), (held_out, "held-out", "Raise")):
        if not len(split.indices):
            raise UserError(
                f"held_out_fraction {data.held_out_fraction} of {len(rows.indices):,} rows leaves no {kind} row. "
                f"{change} it, add rows with other prompts, or set `held_out` to sources."
            )
    return train, held_out, make_report([rows], train, held_out)
