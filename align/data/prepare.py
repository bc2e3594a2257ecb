"""Tokenise the data section of a recipe, one function per kind of trainer.

Columns, which have TRL's names; each value is a list of token ids:

    pretrain, sft   input_ids, labels (-100: not in the loss).
    reward_model    chosen_ids, rejected_ids, both with the prompt.
    dpo             prompt_ids, chosen_ids, rejected_ids; the latter two without the prompt.

TRL's ids differ from ours only in what the template puts after the end of a turn (a line break in ChatML).

As in sampling, a completion in a pair ends with its end-of-turn token unless it was truncated. A reward model then
reads its score at the same token in training and in PPO.

The report counts dropped rows by reason.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from align.config.parts import Data, Source
from align.data import shapes
from align.data.chat import ConversationEncoder, check_template, encode_messages
from align.data.rows import Row
from align.data.shapes import Conversation, DropRow, Message, Pair, Shape, Unreadable
from align.data.sources import describe_source, load_rows
from align.data.splits import is_held_out, prompt_key
from align.errors import UserError

IGNORED = -100
"""Label of tokens that are not in the loss."""
StageDirs = Mapping[str, Path] | None


@dataclass(frozen=True)
class DataReport:
    """Counts of rows and tokens.

    rows_read      all rows of the sources
    rows_train     rows in the training split; for pretraining, documents
    rows_held_out  rows in the held-out split; for pretraining, documents
    dropped        {reason: rows dropped}, over both splits
    truncated      rows truncated to the maximum length, over both splits
    split          conversations that became several rows, because the chat template renders earlier turns differently
                   once others follow; over both splits
    tokens         tokens of the training rows; prompts of reward-model pairs count twice
    loss_tokens    training tokens in the loss, without each row's first token; for pairs, the tokens of both answers
    fingerprint    SHA-256 over the ids and labels of all rows, training rows first
    """

    rows_read: int
    rows_train: int
    rows_held_out: int
    dropped: dict[str, int]
    truncated: int
    tokens: int
    loss_tokens: int
    fingerprint: str
    split: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    def summary(self) -> str:
        """One line for the terminal."""
        if self.loss_tokens:
            parts = [f"{self.rows_train:,} training rows ({self.tokens:,} tokens, {self.loss_tokens:,} in the loss)"]
        else:
            parts = [f"{self.rows_train:,} prompts ({self.tokens:,} tokens)"]
        if self.rows_held_out:
            parts.append(f"{self.rows_held_out:,} held out")
        if self.split:
            parts.append(f"{self.split:,} conversations trained as several rows")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(self.dropped.items())]
        return f"{self.rows_read:,} rows read: " + ", ".join(parts)


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows for a trainer. held_out is None if the recipe holds out no rows."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    report: DataReport


@dataclass(frozen=True)
class PromptRow:
    """A prompt for generation.

    ids        tokens of the prompt and of the header of the assistant's turn
    messages   the prompt as messages
    reference  reference answer, if the data has one
    row        the row as read, for reward functions
    variables  keyword arguments for the chat template
    """

    ids: tuple[int, ...]
    messages: list[Message]
    reference: str | None
    row: dict[str, Any] = field(repr=False)
    variables: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class _Encoded:
    """One tokenised row and its counts.

    key: prompt or text of the row; its hash decides the split.
    split: True on the first row of a conversation that became several.
    """

    columns: dict[str, Any]
    loss_tokens: int
    truncated: bool = False
    key: str = ""
    split: bool = False

    @property
    def tokens(self) -> int:
        names = [name for name in self.columns if name.endswith("ids")]
        return sum(len(self.columns[name]) for name in names)


@dataclass
class _Tally:
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def _loss_tokens(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


# --- entry points -----------------------------------------------------------------------------------------


def prepare_text(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None
) -> Prepared:
    """Concatenate documents and split them into rows of `max_length` tokens (input_ids = labels), for pretraining.

    Each document ends with the end-of-sequence token. Conversations are rendered with the chat template. Only the last
    row of a split may be shorter; it is dropped if it has a single token, which leaves no token to predict. No row
    counts as truncated.
    """
    if tokenizer.eos_token_id is None:
        raise _no_eos("which pretraining puts after each document")

    def encode(row: Row) -> list[_Encoded]:
        if row.get("text") is None:
            conversation, variables = shapes.conversation(row), shapes.template_variables(row)
            messages = conversation["prompt"] + conversation["completion"]
            ids, key = encode_messages(tokenizer, messages, variables), _conversation_key(conversation)
        else:
            key = shapes.text(row)
            ids = list(tokenizer(key)["input_ids"])
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return [_Encoded({"input_ids": ids}, len(ids), key=key)]

    def pack(documents: list[_Encoded]) -> list[_Encoded]:
        stream = [token for document in documents for token in document.columns["input_ids"]]
        blocks = [stream[start : start + data.max_length] for start in range(0, len(stream), data.max_length)]
        # A row's first token is not in the loss.
        return [_Encoded({"input_ids": b, "labels": b}, len(b) - 1) for b in blocks if len(b) > 1]

    return _prepare(data, encode, ("text", "messages", "prompt_completion"), seed, stage_dirs, pack)


def prepare_sft(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool,
    seed: int,
    stage_dirs: StageDirs = None,
) -> Prepared:
    """Conversations as input_ids and labels, for SFTTrainer.

    assistant_only_loss: the loss includes only assistant turns; in a prompt/completion row, only those of the
        completion. If False, it includes every token, and `text` rows are accepted too.

    Rows longer than `max_length` are truncated at the end, and dropped if no token in the loss remains.
    """
    accepted: tuple[Shape, ...] = ("messages", "prompt_completion")
    if assistant_only_loss:
        check_template(tokenizer)
        encoder = ConversationEncoder(tokenizer)
    else:
        accepted = (*accepted, "text")

    def encode(row: Row) -> list[_Encoded]:
        if not assistant_only_loss and row.get("text") is not None:
            key = shapes.text(row)
            ids = list(tokenizer(key)["input_ids"])
            if tokenizer.eos_token_id is None:
                raise _no_eos("which ends each text")
            ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
            return _cut([(ids, ids)], key, data.max_length)
        conversation, variables = shapes.conversation(row), shapes.template_variables(row)
        messages, key = conversation["prompt"] + conversation["completion"], _conversation_key(conversation)
        if not assistant_only_loss:
            ids = encode_messages(tokenizer, messages, variables)
            return _cut([(ids, ids)], key, data.max_length)
        masked = encoder.rows(messages, variables, first=len(conversation["prompt"]))
        rows = [(ids, [i if kept else IGNORED for i, kept in zip(ids, mask, strict=True)]) for ids, mask in masked]
        return _cut(rows, key, data.max_length)

    return _prepare(data, encode, accepted, seed, stage_dirs)


def _cut(rows: list[tuple[list[int], list[int]]], key: str, max_length: int) -> list[_Encoded]:
    """The rows (input_ids [T], labels [T]) of one conversation, truncated. Rows without a token in the loss are left
    out; raises `DropRow` if all are."""
    if not any(_loss_tokens(labels) for _, labels in rows):
        raise DropRow("nothing to train on")
    encoded = []
    for ids, labels in rows:
        kept = labels[:max_length]
        if count := _loss_tokens(kept):
            columns = {"input_ids": ids[:max_length], "labels": kept}
            encoded.append(_Encoded(columns, count, truncated=len(ids) > max_length, key=key))
    if not encoded:
        raise DropRow("no answer token within max_length")
    encoded[0].split = len(rows) > 1
    return encoded


def prepare_reward_pairs(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None
) -> Prepared:
    """Preference pairs as chosen_ids and rejected_ids, both with the prompt, for RewardTrainer.

    A pair is dropped if the prompt and one of the answers exceed `max_length`, or if both answers are equal.
    """
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[_Encoded]:
        pair, prompt, chosen, rejected = _encode_pair(encoder, row, data.max_length)
        columns = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return [_Encoded(columns, len(chosen) + len(rejected), key=prompt_key(pair["prompt"]))]

    return _prepare(data, encode, ("preference",), seed, stage_dirs)


def prepare_dpo_pairs(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int, stage_dirs: StageDirs = None
) -> Prepared:
    """Preference pairs as prompt_ids, chosen_ids, rejected_ids and messages, for DPOTrainer.

    Drops the same pairs as `prepare_reward_pairs`.
    """
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[_Encoded]:
        pair, prompt, chosen, rejected = _encode_pair(encoder, row, data.max_length)
        columns = {**pair, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return [_Encoded(columns, len(chosen) + len(rejected), key=prompt_key(pair["prompt"]))]

    return _prepare(data, encode, ("preference",), seed, stage_dirs)


def _encode_pair(
    encoder: ConversationEncoder, row: Row, max_length: int
) -> tuple[Pair, list[int], list[int], list[int]]:
    """(messages by column, prompt ids, chosen ids, rejected ids); chosen and rejected ids exclude the prompt."""
    pair, variables = shapes.pair(row), shapes.template_variables(row)
    prompt, sides = list[int](), []
    for side, answer in (("chosen", pair["chosen"]), ("rejected", pair["rejected"])):
        prompt, ids, _ = encoder.answer(pair["prompt"], answer, variables)
        # A sample that was truncated at its length limit has no end-of-turn token in PPO. Remove the template's.
        if row.get(f"{side}_finished") is False and ids and ids[-1] in encoder.template.end_ids:
            ids = ids[:-1]
        sides.append(ids)
    if len(prompt) + max(map(len, sides)) > max_length:
        raise DropRow("longer than max_length")
    if sides[0] == sides[1]:
        raise DropRow("chosen equals rejected")
    return pair, prompt, sides[0], sides[1]


def prepare_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    seed: int,
    stage_dirs: StageDirs = None,
) -> tuple[list[PromptRow], DataReport]:
    """(prompts in the order of the shuffled mixture, report). Prompts over `max_prompt_length` tokens are dropped.

    Raises `UserError` if no prompt remains.
    """
    accepted: tuple[Shape, ...] = ("prompt", "prompt_completion", "preference", "messages")
    tally, prompts = _Tally(), []
    encoder = ConversationEncoder(tokenizer)
    for row in load_rows(sources, seed=seed, stage_dirs=stage_dirs, accepted=accepted):
        tally.read += 1
        try:
            messages, reference = shapes.prompt(row)
            variables = shapes.template_variables(row)
            ids = encoder.prompt(messages, variables)
            if len(ids) > max_prompt_length:
                raise DropRow("longer than max_prompt_length")
            read = {column: value for column, value in row.items() if not isinstance(value, Unreadable)}
            prompts.append(PromptRow(tuple(ids), messages, reference, read, variables))
        except DropRow as reason:
            tally.dropped[str(reason)] += 1
    if not prompts:
        raise _nothing_left(sources, tally, "max_prompt_length or rollout.max_model_length")
    columns = dict.fromkeys(column for prompt in prompts for column in prompt.row)
    for prompt in prompts:  # a reward function finds the same columns in every row
        prompt.row.update({column: None for column in columns if column not in prompt.row})
    encoded = [_Encoded({"input_ids": prompt.ids}, 0) for prompt in prompts]
    return prompts, _report(tally, encoded, [], len(prompts))


# --- shared -----------------------------------------------------------------------------------------------


def _conversation_key(conversation: Conversation) -> str:
    """Key of a conversation's prompt: the column `prompt`, otherwise everything before the last assistant turn."""
    if conversation["prompt"]:
        return prompt_key(conversation["prompt"])
    turns = conversation["completion"]
    last = max(number for number, message in enumerate(turns) if message["role"] == "assistant")
    return prompt_key(turns[:last])


def _no_eos(use: str) -> UserError:
    return UserError(f"The tokenizer has no end-of-sequence token, {use}. Set eos_token in tokenizer_config.json.")


def _prepare(
    data: Data,
    encode: Callable[[Row], list[_Encoded]],
    accepted: tuple[Shape, ...],
    seed: int,
    stage_dirs: StageDirs,
    pack: Callable[[list[_Encoded]], list[_Encoded]] = lambda rows: rows,
) -> Prepared:
    """Read, encode, split, pack and count. Raises `UserError` if a split that the recipe asks for would be empty."""
    tally = _Tally()
    rows = load_rows(data.train, seed=seed, stage_dirs=stage_dirs, accepted=accepted)
    # Held-out sources are read before the slow encoding, so that an error in them is reported early.
    others = load_rows(data.held_out, seed=seed, stage_dirs=stage_dirs, accepted=accepted) if data.held_out else None
    train, held_out = _encode_all(rows, encode, tally), []
    if not train:
        raise _nothing_left(data.train, tally, "data.max_length")
    if others is not None:
        held_out = _encode_all(others, encode, tally)
        if not held_out:
            raise _nothing_left(data.held_out, tally, "data.max_length")
    elif data.held_out_fraction > 0:
        held_out = [row for row in train if is_held_out(row.key, data.held_out_fraction)]
        train = [row for row in train if not is_held_out(row.key, data.held_out_fraction)]
        if not train or not held_out:
            raise UserError(
                f"held_out_fraction {data.held_out_fraction} of {len(train) + len(held_out)} rows leaves one split "
                "empty. Add rows, or set `held_out` to sources."
            )
    counts = len(train), len(held_out)
    train, held_out = pack(train), pack(held_out)
    report = _report(tally, train, held_out, *counts)
    return Prepared(_to_dataset(train), _to_dataset(held_out) if held_out else None, report)


def _encode_all(rows: Iterable[Any], encode: Callable[[Row], list[_Encoded]], tally: _Tally) -> list[_Encoded]:
    encoded = []
    for row in rows:
        tally.read += 1
        try:
            encoded += encode(row)
        except DropRow as reason:
            tally.dropped[str(reason)] += 1
    return encoded


def _nothing_left(sources: Sequence[Source], tally: _Tally, setting: str) -> UserError:
    names = ", ".join(describe_source(source) for source in sources)
    reasons = ", ".join(f"{reason}: {count} row{'s' * (count > 1)}" for reason, count in tally.dropped.most_common())
    advice = f"; raise {setting}" if any("max_" in reason for reason in tally.dropped) else ""
    return UserError(f"{names}: all {tally.read} rows were dropped ({reasons}){advice}.")


def _report(
    tally: _Tally, train: list[_Encoded], held_out: list[_Encoded], n_train: int, n_held: int = 0
) -> DataReport:
    digest = hashlib.sha256()
    for row in (*train, *held_out):
        for name in sorted(row.columns):
            if name.endswith("ids") or name == "labels":
                ids = array("q", row.columns[name])
                digest.update(f"{name}{len(ids)}:".encode() + ids.tobytes())
    return DataReport(
        rows_read=tally.read,
        rows_train=n_train,
        rows_held_out=n_held,
        dropped=dict(sorted(tally.dropped.items())),
        truncated=sum(row.truncated for row in (*train, *held_out)),
        tokens=sum(row.tokens for row in train),
        loss_tokens=sum(row.loss_tokens for row in train),
        fingerprint=digest.hexdigest(),
        split=sum(row.split for row in (*train, *held_out)),
    )


def _to_dataset(rows: list[_Encoded]) -> datasets.Dataset:
    arrays = {}
    for name in rows[0].columns:
        ids = name.endswith("ids") or name == "labels"  # int32 takes half the memory of Arrow's default, int64
        arrays[name] = pa.array([row.columns[name] for row in rows], pa.list_(pa.int32()) if ids else None)
    return datasets.Dataset(InMemoryTable(pa.table(arrays)))
