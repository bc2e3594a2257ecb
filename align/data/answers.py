"""Read a sampled answer as a message: its content, and its reasoning if the template separates it by special tokens.

Decoding without special tokens is enough for most templates. gpt-oss writes an answer as channels that only special
tokens separate, and other templates begin the reasoning or a tool call with one. Without these tokens the parts of an
answer would run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from align.data.shapes import DropRow, Message
from align.data.templates import ChatTemplate, render

_USER = {"role": "user", "content": "What is 2 + 2?"}
_CONTENT, _REASONING = "Sentinel-7", "Thought-7"
_ANSWER = {"role": "assistant", "content": _CONTENT}
_REASONED = {**_ANSWER, "reasoning_content": _REASONING}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdef012", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}
UNREADABLE = "the chat template writes no answer with the special tokens of the sample"


@dataclass(frozen=True)
class Layout:
    """Form in which the template writes an answer after the prompt.

    before: text before the reasoning, or before the content of an answer without reasoning.
    between: text between the reasoning and the content; None for an answer without reasoning.
    """

    before: str
    between: str | None = None

    def message(self, text: str) -> Message | None:
        """The message that this layout writes as `text`, if any."""
        if not text.startswith(self.before):
            return None
        content = text.removeprefix(self.before)
        if self.between is None:
            return {"role": "assistant", "content": content}
        reasoning, between, content = content.partition(self.between)
        return {"role": "assistant", "content": content, "reasoning_content": reasoning} if between else None


class AnswerReader:
    """Reads sampled answers as the messages that a tokenizer's chat template would write with the same special tokens.

    Without a chat template an answer is plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    @cached_property
    def separators(self) -> frozenset[int]:
        """Special tokens that the template writes inside an answer, and that decoding without special tokens removes.

        Empty for most templates.
        """
        if self._template is None:
            return frozenset()
        written = [self._written(_ANSWER), self._written(_REASONED)]
        if self._template.renders_calls:
            written.append(self._written(_CALL))
        return frozenset(token for text in written if text for token in self._special(text)) - self._ends

    def message(self, ids: Sequence[int]) -> Message:
        """The assistant's message; ids: tokens as sampled, with or without the token that ends the turn.

        Raises `DropRow` if the template writes no answer with these special tokens, for example for a tool call or an
        answer that was truncated in its reasoning. Special tokens that the template never writes in an answer are
        removed.
        """
        separators = [token for token in self._without_end(ids) if token in self.separators]
        text = self.transcript(ids)
        if not separators:
            return {"role": "assistant", "content": text}
        for layout in self._layouts:
            message = layout.message(text)
            if message and separators == self._special(layout.before + (layout.between or "")):
                return message
        raise DropRow(UNREADABLE)

    def text(self, ids: Sequence[int]) -> str:
        """Content of an answer; if it cannot be read as a message, its whole text including the separators."""
        try:
            return str(self.message(ids)["content"])
        except DropRow:
            return self.transcript(ids)

    def transcript(self, ids: Sequence[int]) -> str:
        """The whole text of an answer, with the separators of its parts and without other special tokens."""
        if not self.separators:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        kept = [i for i in self._without_end(ids) if i in self.separators or i not in self._removed]
        return str(self.tokenizer.decode(kept))

    @cached_property
    def _removed(self) -> frozenset[int]:
        """Ids that decoding without special tokens removes."""
        added = {token for token, text in self.tokenizer.added_tokens_decoder.items() if text.special}
        return frozenset(added | set(self.tokenizer.all_special_ids))

    @cached_property
    def _ends(self) -> frozenset[int]:
        assert self._template is not None
        eos = self.tokenizer.eos_token_id
        return frozenset(token for token in (self._template.ends.answer, eos) if token is not None)

    @cached_property
    def _layouts(self) -> list[Layout]:
        before, _, rest = self._written(_REASONED).partition(_REASONING)
        between, found, _ = rest.partition(_CONTENT)
        plain = Layout(self._written(_ANSWER).partition(_CONTENT)[0])
        return [Layout(before, between), plain] if found else [plain]

    def _written(self, message: Message) -> str:
        """Text that the template writes for an assistant message after the prompt; "" if it refuses the message."""
        try:
            prompt = str(render(self.tokenizer, [_USER], prompt=True))
            text = str(render(self.tokenizer, [_USER, message]))
        except DropRow:
            return ""
        return text.removeprefix(prompt) if text.startswith(prompt) else ""

    def _special(self, text: str) -> list[int]:
        assert self._template is not None
        return [token for token in self._template.tokens(text) if token in self._removed]

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        ids = list(ids)
        return ids[:-1] if ids and self._template and ids[-1] in self._ends else ids
