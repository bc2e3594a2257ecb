"""A tokenizer's chat template: render conversations, find the token that ends a turn, find what the template ignores.

Ids are lists of length T, the tokens of one rendered conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.control import TAGS, ControlTokens, alternatives
from align.data.shapes import REASONING, DropRow, Message
from align.errors import UserError

T = TypeVar("T")
Variables = Mapping[str, Any]
"""Keyword arguments for a chat template; see `align.data.shapes.template_variables`."""

_USER = {"role": "user", "content": "What is 2 + 2?"}
_SENTINEL, _NAME, _RESULT = "Sentinel-7", "sentinel_seven", "Result-7"
_CALL_ID = "abcdef012"  # Mistral's template accepts only ids of nine letters and digits
_ANSWER = {"role": "assistant", "content": _SENTINEL}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": json.dumps({"a": _SENTINEL})}}
    ],
}
_TOOL_RESULT = {"role": "tool", "name": _NAME, "tool_call_id": _CALL_ID, "content": _RESULT}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        },
    }
]
_HEADER_LENGTH = 200
"""Longest header of an assistant's turn in characters. A longer one is tokenised apart, which is slow."""
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""Errors that a template raises for a conversation that it does not support."""


class TurnEnds(NamedTuple):
    """Tokens that end an assistant turn.

    answer: after an answer; None if the template writes no special token there.
    call: after tool calls; None if the template does not render tool calls.
    implied: the template writes these tokens only as the beginning of the next turn, as GLM-4's does.
    """

    answer: int | None
    call: int | None
    implied: bool = False


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"{name}: it has no chat template. Add one to its folder as chat_template.jinja.")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    variables: Variables | None = None,
    *,
    template: str | None = None,
    prompt: bool = False,
) -> str:
    """Text of a conversation. Raises `UserError` without a template, `DropRow` if it refuses the conversation.

    variables: keyword arguments for the template.
    template: a chat template to use instead of the tokenizer's.
    prompt: append the header of the assistant's turn.
    """
    if template is None:
        require_template(tokenizer)
    options = {"tokenize": False, "chat_template": template, "add_generation_prompt": prompt, **(variables or {})}
    return _attempt(lambda shown: str(tokenizer.apply_chat_template(shown, **options)), messages)


def _attempt(rendering: Callable[[list[Message]], T], messages: Sequence[Message]) -> T:
    try:
        try:
            return rendering([_for_template(m) for m in messages])
        except TypeError:
            if not any(message.get("tool_calls") for message in messages):
                raise
            # DeepSeek-V3's template joins the arguments to a text, so they must be JSON text.
            return rendering([_for_template(m, parse=False) for m in messages])
    except _FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DropRow(f"refused by the chat template: {reason}") from error


def _for_template(message: Message, *, parse: bool = True) -> Message:
    """The message as templates expect it: parsed arguments of tool calls, the reasoning under each of its names, and no
    weight in the loss."""
    message = {key: value for key, value in message.items() if key != "train"}
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    if reasoning is not None:
        message = {**dict.fromkeys(REASONING, reasoning), **message}
    if parse and message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _unescaped(message: Message) -> Message:
    """The message with arguments of tool calls as JSON text without escapes, which may spell a control token's name."""
    calls = message.get("tool_calls")
    if not calls or not any("\\u" in call["function"]["arguments"] for call in calls):
        return message
    plain = [
        {**call, "function": {**call["function"], "arguments": _without_escapes(call["function"]["arguments"])}}
        for call in calls
    ]
    return {**message, "tool_calls": plain}


def _without_escapes(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except ValueError:
        raise DropRow("the arguments of a tool call are not valid JSON") from None


@lru_cache(maxsize=8)
def _template(tokenizer: PreTrainedTokenizerBase, state: str) -> ChatTemplate:
    """The template of a tokenizer in this state."""
    return ChatTemplate(tokenizer)


class ChatTemplate:
    """The chat template of a tokenizer, with what was found by rendering short conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_template(tokenizer)
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._headers: dict[str, list[int]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of the tokenizer; the object of an earlier call unless the tokenizer has changed since."""
        require_template(tokenizer)
        return _template(tokenizer, json.dumps([tokenizer.chat_template, len(tokenizer), tokenizer.all_special_ids]))

    @property
    def text(self) -> str:
        """The source of the template; of a template with several variants, all of them."""
        template: Any = self.tokenizer.chat_template
        return template if isinstance(template, str) else "\n".join(template.values())

    @property
    def has_markers(self) -> bool:
        """True if the template marks the assistant's text with `{% generation %}`."""
        return "endgeneration" in self.text

    @cached_property
    def control(self) -> ControlTokens:
        """The special tokens, and the other added tokens that structure a conversation in the template."""
        return ControlTokens(self.tokenizer, [i for i in self._structure if self._names[i] not in TAGS])

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _structure(self) -> list[int]:
        """The added tokens of conversations without tools."""
        texts = [self._probe(_USER, _ANSWER, _USER), self._probe({"role": "system", "content": _SENTINEL}, _USER)]
        texts.append(self._probe(_USER, prompt=True))
        found = {i for text in texts for i in self.tokens(text)} | set(self.end_ids)
        return sorted(found.intersection(self._names))

    def hide(
        self, messages: Sequence[Message], variables: Variables | None = None
    ) -> tuple[Sequence[Message], Variables | None, bool]:
        """See `ControlTokens.hide`."""
        return self.control.hide([_unescaped(message) for message in messages], variables)

    def render(self, messages: Sequence[Message], variables: Variables | None = None, *, prompt: bool = False) -> str:
        """Text of a conversation whose control tokens' names are hidden; see `render`."""
        return str(render(self.tokenizer, messages, variables, prompt=prompt))

    def render_marked(
        self, messages: Sequence[Message], variables: Variables | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation, and (first, last + 1) character of each `{% generation %}` block."""
        options: dict[str, Any] = {**self.tokenizer.special_tokens_map, **(variables or {})}
        template = self.tokenizer.get_chat_template(None, options.get("tools"))

        def rendering(shown: list[Message]) -> tuple[str, list[tuple[int, int]]]:
            # transformers annotates the result as one string; it is (texts, marked characters of each).
            found: Any = render_jinja_template(
                [shown], chat_template=template, return_assistant_tokens_mask=True, **options
            )
            return found[0][0], found[1][0]

        return _attempt(rendering, messages)

    def ids(
        self, messages: Sequence[Message], variables: Variables | None = None, *, prompt: bool = False
    ) -> list[int]:
        """Ids [T] of a conversation; with `prompt`, followed by the header of the assistant's turn.

        No text of the conversation becomes a control token.
        """
        messages, variables, _ = self.hide(messages, variables)
        return self.tokens(self.render(messages, variables, prompt=prompt))

    def tokens(self, text: str) -> list[int]:
        """Ids [T] of a rendered text, which may have hidden names of control tokens."""
        if ControlTokens.has_hidden(text):
            return list(self.control.encode(text).ids)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def header_tokens(self, text: str) -> list[int]:
        """Like `tokens`, for a short text that recurs."""
        if text not in self._headers:
            if len(self._headers) > 1000:
                self._headers.clear()
            self._headers[text] = self.tokens(text)
        return self._headers[text]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, with control tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def last_token_before(self, text: str, stop: int) -> int:
        """Index of the character at which the last added token before `stop` begins; -1 if none is near."""
        return max(
            (text.rfind(self._names[i], max(0, stop - _HEADER_LENGTH), stop) for i in self._structure), default=-1
        )

    def _probe(self, *messages: Message, prompt: bool = False, **variables: Any) -> str:
        try:
            return render(self.tokenizer, messages, variables, prompt=prompt)
        except DropRow:
            return ""

    def _specials(self, text: str) -> list[int]:
        return [token for token in self.tokens(text) if token in self.special]

    @cached_property
    def ends(self) -> TurnEnds:
        """The tokens that end an assistant turn."""
        answered, called = self._probe(_USER, _ANSWER), self._probe(_USER, _CALL)
        tail = self._specials(answered.rpartition(_SENTINEL)[2]) if answered else []
        if not tail:
            answer = self._first_of_next_turn(answered, _USER, _ANSWER, _USER)
            call = self._first_of_next_turn(called, _USER, _CALL, _TOOL_RESULT) if self.renders_calls else None
            return TurnEnds(answer, call, implied=answer is not None)
        end = self._last_before_next_turn(answered) or tail[0]
        call_tail = self._specials(called.rpartition(_SENTINEL)[2]) if self.renders_calls else []
        call = None if not call_tail else end if end in call_tail else call_tail[-1]
        return TurnEnds(end, call)

    def _last_before_next_turn(self, answered: str) -> int | None:
        """The last of the special tokens directly after an answer, if any, that another turn may follow.

        Cohere's template ends the response with one token and the turn with another.
        """
        longer = self._probe(_USER, _ANSWER, _USER)
        end = None
        for one, other in zip(*(self.tokens(text.rpartition(_SENTINEL)[2]) for text in (answered, longer))):
            if one != other or one not in self.special:
                break
            end = one
        return end

    def _first_of_next_turn(self, before: str, *messages: Message) -> int | None:
        longer = self._probe(*messages)
        following = self.tokens(longer.removeprefix(before))[:1] if before and longer.startswith(before) else []
        return following[0] if following and following[0] in self.special else None

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an assistant turn, or the end-of-sequence token if the template writes none."""
        found = [token for token in (self.ends.answer, self.ends.call) if token is not None]
        eos = self.tokenizer.eos_token_id
        return found or ([] if eos is None else [int(eos)])

    @cached_property
    def end_pattern(self) -> re.Pattern[str]:
        """Matches the tokens that end an assistant turn in a rendered text."""
        return alternatives(self.name(token) for token in self.end_ids)

    def name(self, token: int) -> str:
        """The text that becomes this control token."""
        return self._names.get(token) or self.decode([token])

    def end_after(self, message: Message) -> int | None:
        """The token that ends this assistant turn."""
        return self.ends.call if message.get("tool_calls") else self.ends.answer

    @cached_property
    def renders_calls(self) -> bool:
        """False if the template ignores or refuses tool calls."""
        called = self._probe(_USER, _CALL)
        return _NAME in called and _SENTINEL in called

    @cached_property
    def renders_content_beside_calls(self) -> bool:
        """False if the template ignores or refuses the content of a message with tool calls."""
        return _RESULT in self._probe(_USER, {**_CALL, "content": _RESULT})

    @cached_property
    def renders_reasoning_beside_calls(self) -> bool:
        """False if the template ignores or refuses the reasoning of a message with tool calls."""
        return _RESULT in self._probe(_USER, {**_CALL, "reasoning_content": _RESULT})

    @cached_property
    def renders_results(self) -> bool:
        """False if the template ignores or refuses tool results."""
        return _RESULT in self._probe(_USER, _CALL, _TOOL_RESULT)

    @cached_property
    def renders_tools(self) -> bool:
        """False if the template ignores or refuses the schemas of tools."""
        return _NAME in self._probe(_USER, tools=_TOOLS)

    @cached_property
    def renders_reasoning(self) -> bool:
        """False if the template ignores or refuses reasoning_content."""
        return _SENTINEL in self._probe(_USER, {"role": "assistant", "content": "4", "reasoning_content": _SENTINEL})

    @cached_property
    def ignores_system(self) -> bool:
        """True if the template renders a conversation without its system prompt."""
        text = self._probe({"role": "system", "content": _RESULT}, _USER)
        return text != "" and _RESULT not in text

    def require_rendered(self, messages: Sequence[Message], variables: Variables | None = None) -> None:
        """Raise `DropRow` if the template would silently leave out a part of the conversation."""
        if any(message.get("tool_calls") for message in messages) and not self.renders_calls:
            raise DropRow("the chat template does not render tool calls")
        if self.ignores_system and any(m["role"] == "system" and m["content"].strip() for m in messages):
            raise DropRow("the chat template does not render system prompts")
        calling = [message for message in messages if message.get("tool_calls")]
        if any(message["content"].strip() for message in calling) and not self.renders_content_beside_calls:
            raise DropRow("the chat template does not render content beside tool calls")
        if any(message["role"] == "tool" for message in messages) and not self.renders_results:
            raise DropRow("the chat template does not render tool results")
        if any(message.get(name) for message in messages for name in REASONING) and not self.renders_reasoning:
            raise DropRow("the chat template does not render reasoning_content")
        if any(m.get(name) for m in calling for name in REASONING) and not self.renders_reasoning_beside_calls:
            raise DropRow("the chat template does not render reasoning_content beside tool calls")
        for name in variables or ():
            if name == "tools" and not self.renders_tools:
                raise DropRow("the chat template does not render tools")
            if name not in self.text:
                raise DropRow(f"the chat template does not read {name}")
