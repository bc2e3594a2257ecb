"""Show token rows as the model sees them, and describe their lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, control tokens included."""
Columns = Mapping[str, Sequence[int]]
"""Token ids and labels of one row, by column."""
NOT_IN_LOSS = -100


class Segment(NamedTuple):
    """A run of tokens that are all in the loss, or all not in it."""

    text: str
    in_loss: bool


@dataclass(frozen=True)
class Side:
    """One sequence of a row.

    name      "text", "prompt", "chosen", "rejected", "desirable" or "undesirable"
    ids       token ids [T]
    labels    [T]: the id of a token in the loss, otherwise -100
    segments  its text
    """

    name: str
    ids: list[int]
    labels: list[int]
    segments: list[Segment]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        text = "".join(segment.text for segment in self.segments)
        return {"text": text, "input_ids": self.ids, "labels": self.labels}


def sides_of(columns: Columns, decode: Decode, prompt_tokens: int | None = None) -> list[Side]:
    """The sequences of a row; of a pair or a labelled row its prompt, and each answer through its end of turn.

    prompt_tokens: tokens of the prompt that both sequences of a reward model's pair share. Default: their common
        beginning, which may include the beginning of both answers.
    """
    if "completion_ids" in columns:
        name = "desirable" if columns["label"][0] else "undesirable"
        return [
            _side("prompt", columns["prompt_ids"], [NOT_IN_LOSS] * len(columns["prompt_ids"]), decode),
            _side(name, columns["completion_ids"], columns["completion_labels"], decode),
        ]
    if "chosen_ids" not in columns:
        labels = columns.get("labels", [NOT_IN_LOSS] * len(columns["input_ids"]))
        return [_side("text", columns["input_ids"], labels, decode)]
    chosen, rejected = list(columns["chosen_ids"]), list(columns["rejected_ids"])
    prompt = list(columns.get("prompt_ids", ()))
    if "prompt_ids" not in columns:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        shared = shared if prompt_tokens is None else prompt_tokens
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return [
        _side("prompt", prompt, [NOT_IN_LOSS] * len(prompt), decode),
        _side("chosen", chosen, columns.get("chosen_labels", chosen), decode),
        _side("rejected", rejected, columns.get("rejected_labels", rejected), decode),
    ]


def _side(name: str, ids: Sequence[int], labels: Sequence[int], decode: Decode) -> Side:
    segments, start = [], 0
    kept = [label != NOT_IN_LOSS for label in labels]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kept[end] != kept[start]:
            segments.append(Segment(decode(ids[start:end]), kept[start]))
            start = end
    return Side(name, list(ids), list(labels), segments)


class LengthBin(NamedTuple):
    """Rows of at least `low` and at most `high` tokens."""

    low: int
    high: int
    rows: int


def histogram(lengths: Sequence[int], bins: int = 8) -> list[LengthBin]:
    """Counts of rows in `bins` ranges of equal width, rounded up to a multiple of eight tokens."""
    if not lengths:
        return []
    width = 8 * math.ceil(max(lengths) / bins / 8)
    counts = [0] * math.ceil(max(lengths) / width)
    for length in lengths:
        counts[max(0, length - 1) // width] += 1
    return [LengthBin(number * width + 1, (number + 1) * width, count) for number, count in enumerate(counts)]


@dataclass(frozen=True)
class Labels:
    """Completions of each label.

    desirable_tokens    mean tokens of a desirable completion; None if there is none
    undesirable_tokens  mean tokens of an undesirable completion; None if there is none
    contradictory       rows whose prompt and completion occur with the other label too
    """

    desirable_tokens: float | None
    undesirable_tokens: float | None
    contradictory: int


@dataclass(frozen=True)
class LengthBias:
    """Lengths of the answers of pairs. A preference for length is learned where chosen answers are longer.

    chosen_longer    share of pairs whose chosen answer has more tokens
    rejected_longer  share of pairs whose rejected answer has more tokens
    chosen_tokens    mean tokens of a chosen answer
    rejected_tokens  mean tokens of a rejected answer
    """

    chosen_longer: float
    rejected_longer: float
    chosen_tokens: float
    rejected_tokens: float


def length_bias(lengths: Iterable[tuple[int, int]]) -> LengthBias | None:
    """The bias of pairs with these (chosen, rejected) answer lengths; None without pairs."""
    pairs = list(lengths)
    if not pairs:
        return None
    count = len(pairs)
    return LengthBias(
        chosen_longer=sum(chosen > rejected for chosen, rejected in pairs) / count,
        rejected_longer=sum(chosen < rejected for chosen, rejected in pairs) / count,
        chosen_tokens=sum(chosen for chosen, _ in pairs) / count,
        rejected_tokens=sum(rejected for _, rejected in pairs) / count,
    )


def bar(share: float, width: int = 24) -> str:
    """A horizontal bar of `share` of `width` characters, in eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
