"""Encode rows as token rows, for each kind of trainer. Nothing here reads or writes files.

Columns, which have TRL's names; each value is a list of token ids:

    pretrain, sft   input_ids, labels (-100: not in the loss).
    reward_model    chosen_ids, rejected_ids, both with the prompt.
    dpo             prompt_ids, chosen_ids, rejected_ids; the latter two without the prompt. chosen_labels and
                    rejected_labels are -100 on tokens of user and tool messages inside an answer.
    kto             prompt_ids, completion_ids and completion_labels, as for dpo; label, which is [1] for a desirable
                    completion and [0] for an undesirable one. A preference pair becomes two rows.

TRL's ids differ from ours only in what the template puts after the end of a turn (a line break in ChatML).

As in sampling, a completion in a pair ends with its end-of-turn token unless it was truncated. A reward model then
reads its score at the same token in training and in PPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.config.filters import Filter
from align.data import shapes
from align.data.accepted import ACCEPTED, Kind
from align.data.chat import ConversationEncoder, check_template
from align.data.filters.items import evaluation_items
from align.data.filters.judge import Judge
from align.data.filters.texts import texts_of
from align.data.masks import Answer
from align.data.row_plans import (
    Completions,
    Plan,
    as_json,
    plan_completions,
    plan_conversation,
    plan_pair,
    plan_prompt,
    plan_text_or_conversation,
)
from align.data.rows import Row
from align.data.shapes import DropRow
from align.data.splits import prompt_key
from align.errors import UserError

IGNORED = -100
"""Label of tokens that are not in the loss."""

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("input_ids",),
    "sft": ("input_ids", "labels"),
    "sft_all_tokens": ("input_ids", "labels"),
    "reward_pairs": ("chosen_ids", "rejected_ids"),
    "dpo_pairs": ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_labels", "rejected_labels"),
    "labelled": ("prompt_ids", "completion_ids", "completion_labels", "label"),
    "prompts": ("input_ids", "messages", "reference", "row", "variables"),
}
"""Columns of the token rows. Those that `is_ids` names are lists of int32, the others JSON text."""

BATCH = 256
"""Rows that are tokenised in one call."""


def is_ids(column: str) -> bool:
    """True for a column of integers: token ids or labels."""
    return column.endswith(("label", "labels", "ids"))


@dataclass(frozen=True)
class Encoding:
    """Settings that determine how a row is encoded, besides the tokenizer.

    max_length: maximum tokens of a row, including the prompt; of the prompt for `prompts`; unused for `text`.
    filters: drop rows for what their texts are.
    """

    kind: Kind
    max_length: int = 0
    filters: tuple[Filter, ...] = ()


@dataclass
class Encoded:
    """One token row and its counts.

    columns: int32 arrays [T] of ids and labels, or JSON text.
    loss_tokens: tokens in the loss, without the row's first token; for pairs, the tokens of both answers.
    key: prompt or text of the row; its hash decides the split.
    split: True on the first row of a conversation or pair that became several.
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


_Masked = tuple[np.ndarray, np.ndarray]
"""(ids [N], mask [N]) of an answer; the mask is False on tokens of user and tool messages."""
Result = list[Encoded] | DropRow
"""The token rows of a row, or the reason why it cannot be used."""
S = TypeVar("S")
T = TypeVar("T")


class RowEncoder:
    """Encodes rows for a kind of trainer. Raises `UserError` if the tokenizer cannot be used for it.

    escaped: number of rows so far with a text that would have become a control token.
    """

    def __init__(self, encoding: Encoding, tokenizer: PreTrainedTokenizerBase):
        self.encoding, self.tokenizer = encoding, tokenizer
        if encoding.kind == "sft":
            check_template(tokenizer)
        if encoding.kind == "text" and tokenizer.eos_token_id is None:
            raise _no_eos("which pretraining puts after each document")
        self._chat = ConversationEncoder(tokenizer) if tokenizer.chat_template else None
        self._judge = Judge(encoding.filters, evaluation_items(encoding.filters)) if encoding.filters else None
        self._methods: dict[Kind, Callable[[Sequence[Row]], list[Result]]] = {
            "text": self._whole,
            "sft": self._masked,
            "sft_all_tokens": self._whole,
            "reward_pairs": self._pairs,
            "dpo_pairs": self._pairs,
            "labelled": self._labelled,
            "prompts": self._prompts,
        }

    @property
    def chat(self) -> ConversationEncoder:
        """The encoder of conversations. Raises `UserError` if the tokenizer has no chat template."""
        if self._chat is None:
            self._chat = ConversationEncoder(self.tokenizer)
        return self._chat

    @property
    def escaped(self) -> int:
        return 0 if self._chat is None else self._chat.escaped

    @property
    def too_short(self) -> dict[str, int]:
        """{evaluation set: items with too few words to be found by the filter of contamination}."""
        return {} if self._judge is None else self._judge.too_short

    def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """The token rows of each row."""
        settled = [self._settled(row) for row in rows]
        kept = [row for row, result in zip(rows, settled, strict=True) if result is None]
        encode = self._methods[self.encoding.kind]
        encoded = (result for start in range(0, len(kept), BATCH) for result in encode(kept[start : start + BATCH]))
        return [next(encoded) if result is None else result for result in settled]

    def _settled(self, row: Row) -> Result | None:
        """The result of a row that needs no tokenisation, if any: token ids, which have no texts that a filter could
        judge, or a row that a filter refuses."""
        if shapes.shape_of(row, ACCEPTED[self.encoding.kind]) == "token_ids":
            return _tried(self._token_ids, row)
        return None if self._judge is None else self._refusal(row)

    def _token_ids(self, row: Row) -> list[Encoded]:
        found = shapes.token_ids(row)
        if max(found["input_ids"]) >= len(self.tokenizer):
            raise DropRow("input_ids has an id that the tokenizer lacks")
        ids, labels = (np.array(values, np.int32) for values in (found["input_ids"], found["labels"]))
        # The first token in the loss ends what decides the split, as a prompt does.
        start = next((n for n, label in enumerate(found["labels"]) if n and label != IGNORED), len(ids))
        key = as_json(found["input_ids"][:start] if IGNORED in found["labels"] else found["input_ids"])
        if self.encoding.kind == "text":
            if ids[-1] != self.tokenizer.eos_token_id:
                ids = np.append(ids, np.int32(self.tokenizer.eos_token_id))
            return [Encoded({"input_ids": ids}, len(ids), key=key)]
        return _truncated([(ids, labels)], key, self.encoding.max_length)

    def _refusal(self, row: Row) -> DropRow | None:
        """The reason of a filter, or the reason why the row has no texts, if any."""
        assert self._judge is not None
        try:
            reason = self._judge(texts_of(row, ACCEPTED[self.encoding.kind]))
        except DropRow as unusable:
            return unusable
        return None if reason is None else DropRow(f"filter: {reason}")

    # --- conversations and texts --------------------------------------------------------------------------

    def _masked(self, rows: Sequence[Row]) -> list[Result]:
        planned = [_tried(plan_conversation, row) for row in rows]
        encoded = iter(self.chat.rows_of([found.chat for found in _used(planned)]))

        def encode(plan: Plan) -> list[Encoded]:
            masked = _used_or_raised(next(encoded))
            pairs = [(np.array(ids, np.int32), np.frombuffer(bytes(mask), bool)) for ids, mask in masked]
            labelled = [(ids, np.where(mask, ids, np.int32(IGNORED))) for ids, mask in pairs]
            return _truncated(labelled, plan.key, self.encoding.max_length)

        return [plan if isinstance(plan, DropRow) else _tried(encode, plan) for plan in planned]

    def _whole(self, rows: Sequence[Row]) -> list[Result]:
        """Every token in the loss: texts, and whole conversations."""
        planned = [_tried(plan_text_or_conversation, row) for row in rows]
        texts = [plan.key for plan in _used(planned) if not plan.chat.messages]
        chats = [plan.chat for plan in _used(planned) if plan.chat.messages]
        text_ids = iter(self.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        chat_ids = iter(self.chat.whole_of(chats) if chats else [])

        def finish(plan: Plan) -> list[Encoded]:
            is_text, end = not plan.chat.messages, self.tokenizer.eos_token_id
            ids = list(next(text_ids) if is_text else _used_or_raised(next(chat_ids)))
            if self.encoding.kind == "text" or is_text:
                if end is None:
                    raise _no_eos("which ends each text")
                ids += [end] if ids[-1:] != [end] else []
            tokens = np.array(ids, np.int32)
            if self.encoding.kind == "text":
                return [Encoded({"input_ids": tokens}, len(tokens), key=plan.key)]
            return _truncated([(tokens, tokens)], plan.key, self.encoding.max_length)

        return [plan if isinstance(plan, DropRow) else _tried(finish, plan) for plan in planned]

    # --- pairs and prompts --------------------------------------------------------------------------------

    def _pairs(self, rows: Sequence[Row]) -> list[Result]:
        planned = [_tried(plan_pair, row) for row in rows]
        texts = [
            (pair["prompt"], answer, variables)
            for pair, variables in _used(planned)
            for answer in (pair["chosen"], pair["rejected"])
        ]
        answers = iter(self.chat.answers_of(texts))

        def finish(row: Row) -> list[Encoded]:
            sides = {"chosen": next(answers), "rejected": next(answers)}
            prompt, found = list[int](), []
            for side, answer in sides.items():
                prompt, masked = self._answer(answer, finished=row.get(f"{side}_finished"))
                found.append(masked)
            return [self._pair_row(prompt, *found)]

        results = [
            plan if isinstance(plan, DropRow) else _tried(finish, row) for row, plan in zip(rows, planned, strict=True)
        ]
        for plan, result in zip(planned, results, strict=True):
            if not isinstance(plan, DropRow) and not isinstance(result, DropRow):
                result[0].key = prompt_key(plan[0]["prompt"])
        return results

    def _answer(self, answer: Answer | DropRow, finished: Any) -> tuple[list[int], _Masked]:
        """Ids of the prompt, and the answer. finished: False for a sample that was truncated."""
        prompt, own, mask = _used_or_raised(answer)
        # A sample that was truncated at its length limit has no end-of-turn token in PPO. Remove the template's.
        if finished is False and own and own[-1] in self.chat.template.end_ids:
            own, mask = own[:-1], mask[:-1]
        return prompt, (np.array(own, np.int32), np.array(mask, bool))

    def _pair_row(self, prompt: list[int], chosen: _Masked, rejected: _Masked) -> Encoded:
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = chosen, rejected
        if len(prompt) + max(len(chosen_ids), len(rejected_ids)) > self.encoding.max_length:
            raise DropRow("longer than max_length")
        if np.array_equal(chosen_ids, rejected_ids):
            raise DropRow("chosen equals rejected")
        before = np.array(prompt, np.int32)
        if self.encoding.kind == "reward_pairs":
            columns = {"chosen_ids": np.append(before, chosen_ids), "rejected_ids": np.append(before, rejected_ids)}
            return Encoded(columns, len(chosen_ids) + len(rejected_ids))
        if not (chosen_mask.any() and rejected_mask.any()):
            raise DropRow("nothing to train on")
        columns = {"prompt_ids": before, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        columns["chosen_labels"] = np.where(chosen_mask, chosen_ids, np.int32(IGNORED))
        columns["rejected_labels"] = np.where(rejected_mask, rejected_ids, np.int32(IGNORED))
        return Encoded(columns, int(chosen_mask.sum() + rejected_mask.sum()))

    def _labelled(self, rows: Sequence[Row]) -> list[Result]:
        planned = [_tried(plan_completions, row) for row in rows]
        texts = [
            (plan.prompt, completion, plan.variables) for plan in _used(planned) for completion, *_ in plan.completions
        ]
        answers = iter(self.chat.answers_of(texts))

        def finish(plan: Completions) -> list[Encoded]:
            found = [(next(answers), label, finished) for _, label, finished in plan.completions]
            encoded = [
                self._labelled_row(*self._answer(answer, finished), label, prompt_key(plan.prompt))
                for answer, label, finished in found
            ]
            encoded[0].split = len(encoded) > 1
            return encoded

        return [plan if isinstance(plan, DropRow) else _tried(finish, plan) for plan in planned]

    def _labelled_row(self, prompt: list[int], completion: _Masked, label: bool, key: str) -> Encoded:
        ids, mask = completion
        if len(prompt) + len(ids) > self.encoding.max_length:
            raise DropRow("longer than max_length")
        if not mask.any():
            raise DropRow("nothing to train on")
        columns = {"prompt_ids": np.array(prompt, np.int32), "completion_ids": ids}
        columns |= {"completion_labels": np.where(mask, ids, np.int32(IGNORED)), "label": np.array([label], np.int32)}
        return Encoded(columns, int(mask.sum()), key=key)

    def _prompts(self, rows: Sequence[Row]) -> list[Result]:
        planned = [_tried(plan_prompt, row) for row in rows]
        encoded = iter(self.chat.prompts_of([found.chat for found in _used(planned)]))

        def finish(plan: Plan) -> list[Encoded]:
            ids = _used_or_raised(next(encoded))
            if len(ids) > self.encoding.max_length:
                raise DropRow("longer than max_prompt_length")
            columns = {"input_ids": np.array(ids, np.int32)}
            return [Encoded(columns | {name: as_json(value) for name, value in plan.texts.items()}, 0)]

        return [plan if isinstance(plan, DropRow) else _tried(finish, plan) for plan in planned]


def _truncated(rows: list[tuple[np.ndarray, np.ndarray]], key: str, max_length: int) -> list[Encoded]:
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


def _loss_tokens(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels[1:] != IGNORED))


def _no_eos(use: str) -> UserError:
    return UserError(f"The tokenizer has no end-of-sequence token, {use}. Set eos_token in tokenizer_config.json.")


def _tried(function: Callable[[S], T], argument: S) -> T | DropRow:
    try:
        return function(argument)
    except DropRow as reason:
        return reason


def _used(results: Iterable[T | DropRow]) -> Iterator[T]:
    return (result for result in results if not isinstance(result, DropRow))


def _used_or_raised(result: T | DropRow) -> T:
    if isinstance(result, DropRow):
        raise result
    return result
