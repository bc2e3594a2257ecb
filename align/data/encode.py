"""Encode a row as token rows, one function per kind of trainer. Nothing here reads or writes files.

Columns, which have TRL's names; each value is a list of token ids:

    pretrain, sft   input_ids, labels (-100: not in the loss).
    reward_model    chosen_ids, rejected_ids, both with the prompt.
    dpo             prompt_ids, chosen_ids, rejected_ids; the latter two without the prompt.

TRL's ids differ from ours only in what the template puts after the end of a turn (a line break in ChatML).

As in sampling, a completion in a pair ends with its end-of-turn token unless it was truncated. A reward model then
reads its score at the same token in training and in PPO.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from align.data import shapes
from align.data.chat import ConversationEncoder, check_template, encode_messages
from align.data.rows import Row
from align.data.shapes import Conversation, DropRow, Pair, Shape, Unreadable
from align.data.splits import prompt_key
from align.errors import UserError

IGNORED = -100
"""Label of tokens that are not in the loss."""

Kind = Literal["text", "sft", "sft_all_tokens", "reward_pairs", "dpo_pairs", "prompts"]

ACCEPTED: dict[Kind, tuple[Shape, ...]] = {
    "text": ("text", "messages", "prompt_completion"),
    "sft": ("messages", "prompt_completion"),
    "sft_all_tokens": ("messages", "prompt_completion", "text"),
    "reward_pairs": ("preference",),
    "dpo_pairs": ("preference",),
    "prompts": ("prompt", "prompt_completion", "preference", "messages"),
}
"""Shapes that each kind of trainer accepts."""

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("input_ids",),
    "sft": ("input_ids", "labels"),
    "sft_all_tokens": ("input_ids", "labels"),
    "reward_pairs": ("chosen_ids", "rejected_ids"),
    "dpo_pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "prompts": ("input_ids", "messages", "reference", "row", "variables"),
}
"""Columns of the token rows. Those that `is_ids` names are lists of int32, the others JSON text."""


def is_ids(column: str) -> bool:
    """True for a column of token ids or labels."""
    return column == "labels" or column.endswith("ids")


@dataclass(frozen=True)
class Encoding:
    """Settings that determine how a row is encoded, besides the tokenizer.

    max_length: maximum tokens of a row, including the prompt; of the prompt for `prompts`; unused for `text`.
    """

    kind: Kind
    max_length: int = 0


@dataclass
class Encoded:
    """One token row and its counts.

    loss_tokens: tokens in the loss, without the row's first token; for pairs, the tokens of both answers.
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
        """Tokens of all id columns; the prompt of a reward-model pair counts twice."""
        return sum(len(ids) for name, ids in self.columns.items() if name.endswith("ids"))


Encoder: TypeAlias = Callable[[Row], list[Encoded]]
"""Returns the token rows of a row. Raises `DropRow` for a row that cannot be used."""


def build_encoder(encoding: Encoding, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of a kind of trainer. Raises `UserError` if the tokenizer cannot be used for it."""
    length = encoding.max_length
    match encoding.kind:
        case "text":
            return _text_encoder(tokenizer)
        case "sft":
            return _masked_encoder(tokenizer, length)
        case "sft_all_tokens":
            return _all_tokens_encoder(tokenizer, length)
        case "reward_pairs":
            return _reward_pair_encoder(tokenizer, length)
        case "dpo_pairs":
            return _dpo_pair_encoder(tokenizer, length)
        case "prompts":
            return _prompt_encoder(tokenizer, length)


# --- texts and conversations ------------------------------------------------------------------------------


def _text_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    if tokenizer.eos_token_id is None:
        raise _no_eos("which pretraining puts after each document")

    def encode(row: Row) -> list[Encoded]:
        if row.get("text") is None:
            conversation, variables = shapes.conversation(row), shapes.template_variables(row)
            messages = conversation["prompt"] + conversation["completion"]
            ids, key = encode_messages(tokenizer, messages, variables), conversation_key(conversation)
        else:
            key = shapes.text(row)
            ids = list(tokenizer(key)["input_ids"])
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return [Encoded({"input_ids": ids}, len(ids), key=key)]

    return encode


def _masked_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    check_template(tokenizer)
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[Encoded]:
        conversation, variables = shapes.conversation(row), shapes.template_variables(row)
        messages, key = conversation["prompt"] + conversation["completion"], conversation_key(conversation)
        masked = encoder.rows(messages, variables, first=len(conversation["prompt"]))
        rows = [(ids, [i if kept else IGNORED for i, kept in zip(ids, mask, strict=True)]) for ids, mask in masked]
        return _cut(rows, key, max_length)

    return encode


def _all_tokens_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    def encode(row: Row) -> list[Encoded]:
        if row.get("text") is not None:
            key = shapes.text(row)
            ids = list(tokenizer(key)["input_ids"])
            if tokenizer.eos_token_id is None:
                raise _no_eos("which ends each text")
            ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
            return _cut([(ids, ids)], key, max_length)
        conversation, variables = shapes.conversation(row), shapes.template_variables(row)
        messages, key = conversation["prompt"] + conversation["completion"], conversation_key(conversation)
        ids = encode_messages(tokenizer, messages, variables)
        return _cut([(ids, ids)], key, max_length)

    return encode


def _cut(rows: list[tuple[list[int], list[int]]], key: str, max_length: int) -> list[Encoded]:
    """The rows (input_ids [T], labels [T]) of one conversation, truncated. Rows without a token in the loss are left
    out; raises `DropRow` if all are."""
    if not any(_loss_tokens(labels) for _, labels in rows):
        raise DropRow("nothing to train on")
    encoded = []
    for ids, labels in rows:
        kept = labels[:max_length]
        if count := _loss_tokens(kept):
            columns = {"input_ids": ids[:max_length], "labels": kept}
            encoded.append(Encoded(columns, count, truncated=len(ids) > max_length, key=key))
    if not encoded:
        raise DropRow("no answer token within max_length")
    encoded[0].split = len(rows) > 1
    return encoded


def _loss_tokens(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def conversation_key(conversation: Conversation) -> str:
    """Key of a conversation's prompt: the column `prompt`, otherwise everything before the last assistant turn."""
    if conversation["prompt"]:
        return prompt_key(conversation["prompt"])
    turns = conversation["completion"]
    last = max(number for number, message in enumerate(turns) if message["role"] == "assistant")
    return prompt_key(turns[:last])


def _no_eos(use: str) -> UserError:
    return UserError(f"The tokenizer has no end-of-sequence token, {use}. Set eos_token in tokenizer_config.json.")


# --- pairs ------------------------------------------------------------------------------------------------


def _reward_pair_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[Encoded]:
        pair, prompt, chosen, rejected = _encode_pair(encoder, row, max_length)
        columns = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return [Encoded(columns, len(chosen) + len(rejected), key=prompt_key(pair["prompt"]))]

    return encode


def _dpo_pair_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[Encoded]:
        pair, prompt, chosen, rejected = _encode_pair(encoder, row, max_length)
        columns = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return [Encoded(columns, len(chosen) + len(rejected), key=prompt_key(pair["prompt"]))]

    return encode


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


# --- prompts ----------------------------------------------------------------------------------------------


def _prompt_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    encoder = ConversationEncoder(tokenizer)

    def encode(row: Row) -> list[Encoded]:
        messages, reference = shapes.prompt(row)
        variables = shapes.template_variables(row)
        ids = encoder.prompt(messages, variables)
        if len(ids) > max_length:
            raise DropRow("longer than max_prompt_length")
        read = {column: value for column, value in row.items() if not isinstance(value, Unreadable)}
        texts = {"messages": messages, "reference": reference, "row": read, "variables": variables}
        return [Encoded({"input_ids": ids} | {name: as_json(value) for name, value in texts.items()}, 0)]

    return encode


def as_json(value: Any) -> str:
    """JSON text of a value of a row. Values without a JSON type (dates, bytes of a Parquet file) become strings."""
    return json.dumps(value, default=str)
