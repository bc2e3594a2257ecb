"""Tokenise the texts of rows, many in one call, and mark the tokens in the loss.

Ids and masks are lists of length T, the tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.data.control import ControlTokens
from align.data.shapes import DropRow
from align.data.templates import ChatTemplate
from align.data.turns import SHARED_TOKEN, RowText, Turn

Masked = tuple[list[int], list[int]]
"""(input_ids [T], mask [T]); the mask is 1 on tokens in the loss, otherwise 0."""
TokenAt = Callable[[int], int | None]
"""Gives the index of the token with this character of a text; None if no token has it."""


class Answer(NamedTuple):
    """Ids of a prompt and of the answer to it, through the answer's last end-of-turn token.

    mask: 1 on the tokens of the answer that the assistant generates, 0 on those of other turns and of headers.
    """

    prompt: list[int]
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Tokens:
    """A rendered text and its ids.

    token_at: index of the token with this character; None if the character has no token, or without offsets.
    """

    template: ChatTemplate
    text: str
    ids: list[int]
    token_at: TokenAt

    def before(self, stop: int) -> int | None:
        """Number of tokens of the first `stop` characters; None if these alone would have other tokens.

        A tokenizer encodes the text after an added token independently of the text before it. So it suffices to compare
        the tokens from the last added token on.
        """
        if stop == len(self.text):
            return len(self.ids)
        begin = self.template.last_token_before(self.text, stop)
        first = self.token_at(begin) if begin >= 0 else None
        if first is not None:
            head = self.template.header_tokens(self.text[begin:stop])
            if head[0] in self.template.special and self.ids[first : first + len(head)] == head:
                return first + len(head)
        head = self.template.tokens(self.text[:stop])
        return len(head) if self.ids[: len(head)] == head else None

    def inside(self, start: int, stop: int) -> range:
        """Indices of the tokens with a character of `start` to `stop`."""
        places = range(start, stop)
        first = next((t for c in places if (t := self.token_at(c)) is not None), None)
        last = next((t for c in reversed(places) if (t := self.token_at(c)) is not None), None)
        return range(0) if first is None or last is None else range(first, last + 1)


def tokenise(template: ChatTemplate, texts: Sequence[str]) -> list[Tokens]:
    """Tokens of rendered texts; those without hidden names in one call of the tokenizer."""
    plain = [text for text in texts if not ControlTokens.has_hidden(text)]
    encoded = _encoded(template.tokenizer, plain) if plain else []
    found = (Tokens(template, text, *parts) for text, parts in zip(plain, encoded, strict=True))
    return [_with_hidden_names(template, text) if ControlTokens.has_hidden(text) else next(found) for text in texts]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], TokenAt]]:
    """(ids, `Tokens.token_at`) of texts.

    The Rust tokenizer is called itself where the tokenizer would only pass the texts on: its wrapper, which also makes
    lists of what is not needed here, takes a tenth of the time.
    """
    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        batch = tokenizer(texts, add_special_tokens=False, verbose=False)
        encodings = batch.encodings or [None] * len(texts)
        finders = [_no_offsets if encoding is None else encoding.char_to_token for encoding in encodings]
        return list(zip(batch["input_ids"], finders, strict=True))
    rust = tokenizer.backend_tokenizer
    rust.no_padding()
    rust.no_truncation()
    rust.encode_special_tokens = tokenizer.split_special_tokens
    return [(encoding.ids, encoding.char_to_token) for encoding in rust.encode_batch(texts, add_special_tokens=False)]


def _with_hidden_names(template: ChatTemplate, text: str) -> Tokens:
    encoding = template.control.encode(text)

    def token_at(character: int) -> int | None:
        return encoding.char_to_token(len(template.control.spelled(text[:character])))

    return Tokens(template, text, list(encoding.ids), token_at)


def _no_offsets(character: int) -> int | None:
    return None


def masked_rows(rows: Sequence[RowText], tokens: Sequence[Tokens]) -> list[Masked]:
    """(input_ids, mask) of the rows of one conversation, in the order of their last trained turns.

    A turn whose first token would merge with the end of its prompt gets a row of its own, in which the answer is
    tokenised apart from the prompt, as a sampled answer is.
    """
    found: list[tuple[int, Masked]] = []
    for row, encoded in zip(rows, tokens, strict=True):
        mask, placed = [0] * len(encoded.ids), []
        for turn in row.turns:
            start, end = encoded.before(turn.start), encoded.before(turn.end)
            if start is None or end is None:
                found.append((turn.number, _apart(encoded, row, turn)))
            else:
                mask[start:end] = [1] * (end - start)
                placed.append(turn.number)
        if row.marked is not None:
            inside = {t for span in row.marked for t in encoded.inside(*span)}
            mask = [int(kept and t in inside) for t, kept in enumerate(mask)]
        if placed:
            found.append((placed[-1], (encoded.ids, mask)))
    return [row for _, row in sorted(found, key=lambda numbered: numbered[0])]


def _apart(encoded: Tokens, row: RowText, turn: Turn) -> Masked:
    prompt, answer = _split(encoded.template, row.text[: turn.end], turn.start)
    mask = [1] * len(answer.ids)
    if row.marked is not None:
        spans = [(max(0, start - turn.start), min(stop, turn.end) - turn.start) for start, stop in row.marked]
        inside = {t for span in spans for t in answer.inside(*span)}
        mask = [int(t in inside) for t in range(len(answer.ids))]
    return prompt + answer.ids, [0] * len(prompt) + mask


def _split(template: ChatTemplate, text: str, start: int) -> tuple[list[int], Tokens]:
    """(ids of the first `start` characters, tokens of the others). Raises `DropRow` if they spell another text."""
    prompt, (answer,) = template.tokens(text[:start]), tokenise(template, [text[start:]])
    if template.decode(prompt + answer.ids) != template.decode(template.tokens(text)):
        raise DropRow(SHARED_TOKEN)
    return prompt, answer


def masked_answer(row: RowText, start: int, encoded: Tokens) -> Answer:
    """The answer in a row whose first `start` characters are the prompt."""
    first = encoded.before(start)
    if first is None:
        if len(row.turns) != 1 or row.turns[0].start != start:
            raise DropRow(SHARED_TOKEN)
        prompt, answer = _split(encoded.template, row.text, start)
        return Answer(prompt, answer.ids, [1] * len(answer.ids))
    mask = [0] * len(encoded.ids)
    for turn in row.turns:
        begin, end = encoded.before(turn.start), encoded.before(turn.end)
        if begin is None or end is None:
            raise DropRow(SHARED_TOKEN)
        mask[begin:end] = [1] * (end - begin)
    return Answer(encoded.ids[:first], encoded.ids[first:], mask[first:])
