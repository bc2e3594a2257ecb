"""Encode the prompts and targets of tasks: the only place where an evaluation makes token ids of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat import stop_token_ids
from align.data.shapes import Message
from align.data.templates import ChatTemplate
from align.errors import UserError
from align.rollout.requests import Pair, Request


class Unscorable(Exception):
    """A document cannot be scored; the message is the reason."""


class Encoder:
    """Encoder for one tokenizer and one maximum length. Counts truncated prompts and unstable seams.

    truncate: remove the beginning of a prompt that is too long. Otherwise the document is not scored.
    temperature, max_new_tokens: replace those of every request, if not None.
    unstable_seams: pairs, by task, whose context has other tokens alone than before the continuation.
    truncated: {task: prompts whose beginning was removed}.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        truncate: bool = False,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ):
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_token_ids = tuple(stop_token_ids(tokenizer))
        self.unstable_seams: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    # --- text ------------------------------------------------------------------------------------------------

    def text(self, text: str, *, rendered: bool = False) -> list[int]:
        """Token ids of a text. Raises `Unscorable` if they begin with BOS twice.

        The tokenizer adds its special tokens, such as BOS, unless the text begins with BOS.
        rendered: a chat template has written the text and all its special tokens, so none is added.
        """
        bos = self.tokenizer.bos_token
        if rendered:
            ids = ChatTemplate.of(self.tokenizer).tokens(text)
        else:
            ids = self._tokens(text, special=not (bos and text.startswith(str(bos))))
        self._require_one_bos(ids)
        return ids

    def chat_text(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Text of a conversation for `text` with `rendered`; a last message of the assistant is left open.

        Names of control tokens in the messages are hidden, so that no text of a document becomes a control token.
        """
        template = ChatTemplate.of(self.tokenizer)
        messages, hidden, _ = template.hide(messages, self._options(messages, variables))
        return template.render(messages, hidden, prompt=_asks(messages))

    def chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, with the header of the answer unless the last message is the assistant's."""
        return self.text(self.chat_text(messages, variables), rendered=True)

    # --- requests --------------------------------------------------------------------------------------------

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        task: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        rendered: bool = False,
    ) -> Request:
        """A request for one completion of `prompt`, which ends at the tokens that end a turn and at `stop`.

        A stop string that is a special token becomes a stop token, because completions are decoded without special
        tokens. The seed is set by the runner. Raises `Unscorable` if prompt and completion exceed `max_length`.
        """
        max_new_tokens = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        temperature = temperature if self.temperature is None else self.temperature
        ids = self.text(prompt, rendered=rendered) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise Unscorable("the prompt is empty")
        ids = self._fit(ids, self.max_length - max_new_tokens, task, f"{max_new_tokens} new tokens")
        special = {text: token for token, text in self._special_tokens().items()}
        stop_ids = [*self.stop_token_ids, *(special[text] for text in stop if text in special)]
        texts = tuple(text for text in stop if text and text not in special)
        return Request(
            tuple(ids), max_new_tokens, temperature, top_p, tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(stop_ids))
        )

    def pair(self, context: str, continuation: str, *, task: str, rendered: bool = False) -> Pair:
        """The tokens of `continuation` after those of `context`, encoded together as they would be read.

        White space at the end of the context belongs to the continuation. An empty context is BOS, or else the
        end-of-sequence token. Raises `Unscorable` if the continuation has no token of its own.
        """
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if context:
            whole = self.text(context + continuation, rendered=rendered)
            prefix = self.text(context, rendered=rendered)
            if whole[: len(prefix)] != prefix:
                self.unstable_seams[task] += 1
            target, prefix = whole[len(prefix) :], whole[: len(prefix)]
        else:
            prefix, target = [self.first_token], self._tokens(continuation, special=False)
            if target[:1] == prefix:
                target = target[1:]
        if not target:
            raise Unscorable(
                f"the continuation {continuation!r} has no token of its own after the context; "
                "set target_delimiter, so that it begins with a space"
            )
        if len(target) > self.max_length:
            raise Unscorable(f"the continuation has {len(target)} tokens, but max_length is {self.max_length}")
        prefix = self._fit(prefix, self.max_length + 1 - len(target), task, f"{len(target)} tokens of continuation")
        return Pair(tuple(prefix), tuple(target))

    def windows(self, text: str) -> list[Pair]:
        """A whole text as targets, each token once, after as long a prefix as `max_length` allows.

        The first window begins after the first token (see `first_token`) and is full; a later one has one token of
        context, except the last, which has as much as makes it full.
        """
        ids = self._tokens(text, special=False)
        if not ids:
            raise Unscorable("the text is empty")
        pairs = [Pair((self.first_token,), tuple(ids[: self.max_length]))]
        done = len(pairs[0].target_ids)
        while done < len(ids):
            end = min(done + self.max_length, len(ids))
            start = end - self.max_length - 1
            pairs.append(Pair(tuple(ids[start:done]), tuple(ids[done:end])))
            done = end
        return pairs

    @property
    def first_token(self) -> int:
        """The token before a text: BOS, or else the end-of-sequence token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(
            f"{self.tokenizer.name_or_path}: the tokenizer has neither bos_token nor eos_token, so a text without "
            "context cannot be scored. Set one in tokenizer_config.json."
        )

    # --- parts -----------------------------------------------------------------------------------------------

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _require_one_bos(self, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise Unscorable("the prompt begins with BOS twice")

    def _fit(self, ids: list[int], longest: int, task: str, beside: str) -> list[int]:
        """The ids, or with `truncate` their last `longest`."""
        if len(ids) <= longest:
            return ids
        if not self.truncate or longest < 1:
            raise Unscorable(f"the prompt has {len(ids)} tokens; with {beside} it exceeds max_length {self.max_length}")
        self.truncated[task] += 1
        return ids[-longest:]

    def _special_tokens(self) -> dict[int, str]:
        added = {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens))

    @staticmethod
    def _options(messages: Sequence[Message], variables: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**(variables or {}), **({} if _asks(messages) else {"continue_final_message": True})}


def _asks(messages: Sequence[Message]) -> bool:
    """True if the next message is the assistant's."""
    return not messages or messages[-1]["role"] != "assistant"
