"""Chat templates: encode conversations, mark the assistant's tokens, check that a template can be trained on.

Ids and masks are lists of length T, the tokens of one rendered conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from align.data.masks import Answer, Masked, masked_answer, masked_rows, tokenise
from align.data.shapes import DropRow, Message
from align.data.templates import ChatTemplate, Variables, render, require_template
from align.data.turns import HEADER, NO_END, SHARED_TOKEN, RowText, completion_text, training_texts
from align.errors import UserError

S = TypeVar("S")
T = TypeVar("T")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

_CHATML = (
    "{%- for message in messages -%}"
    "@SYSTEM@"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_SYSTEM = "{%- if loop.first and message['role'] != 'system' -%}{{- @TEXT@ -}}{%- endif -%}"


def chatml_template(default_system: str | None = None) -> str:
    """ChatML template with generation markers around each assistant turn's content and end-of-turn token.

    default_system: content of a system turn that is added to conversations without one, as SmolLM2 and Qwen2.5 do. With
        None, no system turn is added.
    """
    if default_system is None:
        return _CHATML.replace("@SYSTEM@", "")
    turn = f"{TURN_START}system\n{default_system}{TURN_END}\n"
    quoted = turn.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return _CHATML.replace("@SYSTEM@", _SYSTEM.replace("@TEXT@", f"'{quoted}'"))


DEFAULT_TEMPLATE = chatml_template()
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_TEMPLATE = chatml_template(SMOLLM2_SYSTEM)
"""Renders exactly like the template published with SmolLM2-Instruct, which has no generation markers."""

_USER = {"role": "user", "content": "What is 2 + 2?"}
_ASSISTANT = {"role": "assistant", "content": "It's 4."}
_MORE = [{"role": "user", "content": " And\n\n3 + 3? "}, {"role": "assistant", "content": '6\n\nor "six".'}]
_REASONED = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"}
_SYSTEM_TURN = {"role": "system", "content": "Be brief."}
PROBES: tuple[list[Message], ...] = (
    [_USER],
    [_USER, _ASSISTANT],
    [_SYSTEM_TURN, _USER, _ASSISTANT],
    [_USER, _ASSISTANT, *_MORE],
    [_SYSTEM_TURN, _USER, _ASSISTANT, *_MORE],
)
"""Conversations on which templates are compared and checked."""


# --- encoding ---------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A conversation to train on.

    variables: keyword arguments for the chat template.
    first: index of the first message that may be in the loss.
    """

    messages: Sequence[Message]
    variables: Variables | None = None
    first: int = 0


class ConversationEncoder:
    """Encodes the conversations of a data set with a tokenizer's chat template.

    No text of a conversation becomes a control token. `escaped` counts the conversations in which one would have.

    The methods `*_of` encode many conversations with one call of the tokenizer; a `DropRow` among the results is the
    reason why that conversation cannot be used. The others encode one, and raise it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.template = ChatTemplate.of(tokenizer)
        self.escaped = 0
        # These templates render each turn the same in every context, and mark what is generated.
        self._keeps_turns = tokenizer.chat_template in (DEFAULT_TEMPLATE, chatml_template(_default_system(tokenizer)))

    def rows(self, messages: Sequence[Message], variables: Variables | None = None, *, first: int = 0) -> list[Masked]:
        """Rows (input_ids [T], mask [T]) that train the assistant turns from message `first` on.

        See `align.data.turns.training_texts`.
        """
        return _only(self.rows_of([Conversation(messages, variables, first)]))

    def rows_of(self, conversations: Sequence[Conversation]) -> list[list[Masked] | DropRow]:
        """Rows of each conversation; see `rows`."""

        def texts(conversation: Conversation) -> list[RowText]:
            messages, variables = self._hidden(conversation.messages, conversation.variables)
            first, keeps_turns = conversation.first, self._keeps_turns
            return training_texts(self.template, messages, variables, first=first, keeps_turns=keeps_turns)

        planned = [_tried(texts, conversation) for conversation in conversations]
        tokens = iter(tokenise(self.template, [row.text for rows in _used(planned) for row in rows]))
        return [
            rows if isinstance(rows, DropRow) else _tried(partial(masked_rows, rows), [next(tokens) for _ in rows])
            for rows in planned
        ]

    def answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], variables: Variables | None = None
    ) -> Answer:
        """Ids of the prompt, and ids and mask of the answer through its last end-of-turn token."""
        return _only(self.answers_of([(prompt, answer, variables)]))

    def answers_of(
        self, pairs: Sequence[tuple[Sequence[Message], Sequence[Message], Variables | None]]
    ) -> list[Answer | DropRow]:
        """The answer of each (prompt, answer, template variables); see `answer`."""

        def text(pair: tuple[Sequence[Message], Sequence[Message], Variables | None]) -> tuple[RowText, int]:
            prompt, answer, variables = pair
            messages, variables = self._hidden([*prompt, *answer], variables)
            return completion_text(self.template, messages[: len(prompt)], messages[len(prompt) :], variables)

        planned = [_tried(text, pair) for pair in pairs]
        tokens = iter(tokenise(self.template, [row.text for row, _ in _used(planned)]))
        return [
            found if isinstance(found, DropRow) else _tried(partial(masked_answer, *found), next(tokens))
            for found in planned
        ]

    def prompt(self, messages: Sequence[Message], variables: Variables | None = None) -> list[int]:
        """Ids [P] of the prompt and the header of the assistant's turn."""
        return _only(self.prompts_of([Conversation(messages, variables)]))

    def prompts_of(self, conversations: Sequence[Conversation]) -> list[list[int] | DropRow]:
        """Ids of each prompt; see `prompt`."""
        return self._whole(conversations, prompt=True)

    def whole_of(self, conversations: Sequence[Conversation]) -> list[list[int] | DropRow]:
        """Ids [T] of each whole conversation."""
        return self._whole(conversations, prompt=False)

    def _whole(self, conversations: Sequence[Conversation], *, prompt: bool) -> list[list[int] | DropRow]:
        def text(conversation: Conversation) -> str:
            messages, variables = self._hidden(conversation.messages, conversation.variables)
            self.template.require_rendered(messages, variables)
            return self.template.render(messages, variables, prompt=prompt)

        planned = [_tried(text, conversation) for conversation in conversations]
        tokens = iter(tokenise(self.template, list(_used(planned))))
        return [found if isinstance(found, DropRow) else next(tokens).ids for found in planned]

    def _hidden(
        self, messages: Sequence[Message], variables: Variables | None
    ) -> tuple[Sequence[Message], Variables | None]:
        messages, variables, escaped = self.template.hide(messages, variables)
        self.escaped += escaped
        return messages, variables


def _tried(function: Callable[[S], T], argument: S) -> T | DropRow:
    try:
        return function(argument)
    except DropRow as reason:
        return reason


def _used(results: Iterable[T | DropRow]) -> Iterator[T]:
    return (result for result in results if not isinstance(result, DropRow))


def _only(results: list[T | DropRow]) -> T:
    (result,) = results
    if isinstance(result, DropRow):
        raise result
    return result


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], variables: Variables | None = None
) -> list[int]:
    """Ids [T] of a whole conversation. None of its texts becomes a control token."""
    return ChatTemplate.of(tokenizer).ids(messages, variables)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message] | str, variables: Variables | None = None
) -> list[int]:
    """Ids [T] of the prompt and the header of the assistant's turn. A string is one user turn.

    None of the texts becomes a control token.

    variables: keyword arguments for the template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ChatTemplate.of(tokenizer).ids(messages, variables, prompt=True)


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase, *, end: int | None) -> list[int]:
    """Ids [T] of an assistant's answer, without the header that `encode_prompt` appends to the prompt.

    The answer is tokenised apart from the prompt, as a sampled completion is. Its text becomes no control token.

    end: token that ends the turn; None for a truncated turn.
    """
    template = ChatTemplate.of(tokenizer)
    ids = template.tokens(template.control.hide_answer(text))
    return ids if end is None else [*ids, end]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and of the chat template's rendering of `PROBES`.

    Models whose tokenizers have equal fingerprints can exchange token ids.
    """
    rendered: list[Any] = []
    if tokenizer.chat_template:
        for probe in PROBES:
            for prompt in (False, True):
                try:
                    rendered.append(render(tokenizer, probe, prompt=prompt))
                except DropRow:
                    rendered.append(None)
    known = json.dumps([sorted(tokenizer.get_vocab().items()), rendered])
    return hashlib.sha256(known.encode()).hexdigest()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn: the end-of-sequence token, and the special tokens, if any, with which the template ends
    an answer and a turn with tool calls."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        ends = ChatTemplate.of(tokenizer).ends
        ids += [token for token in (ends.answer, ends.call) if token is not None]
    return list(dict.fromkeys(ids))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: the template's end-of-turn token, otherwise the end-of-sequence token, if any."""
    if tokenizer.chat_template and (answer := ChatTemplate.of(tokenizer).ends.answer) is not None:
        return answer
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


# --- preparing and checking -------------------------------------------------------------------------------


def prepare_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Replace the tokenizer's template where needed; True if replaced.

    A template that training can use is kept, except that a ChatML template without markers and tools is replaced by
    ours if both render every probe the same. A template that training cannot use is replaced by TRL's training version
    if TRL knows it. A tokenizer without a template, but with ChatML's tokens, gets the default template. Any other
    template is kept; `check_template` refuses it if it cannot be trained on.
    """
    current = tokenizer.chat_template
    if not current:
        vocabulary = tokenizer.get_vocab()
        if TURN_START in vocabulary and TURN_END in vocabulary:
            tokenizer.chat_template = DEFAULT_TEMPLATE
            return True
        return False
    if not isinstance(current, str) or "endgeneration" in current:
        return False
    # Our ChatML template does not render tools, so it must not replace a template that does.
    if "tools" not in current:
        candidates = [DEFAULT_TEMPLATE]
        default_system = _default_system(tokenizer)
        if default_system is not None:
            candidates.append(chatml_template(default_system))
        for candidate in candidates:
            if _same_rendering(tokenizer, current, candidate):
                tokenizer.chat_template = candidate
                return True
    if template_problem(tokenizer) is None:
        return False
    from trl.chat_template_utils import get_training_chat_template  # loads torch, which a tokenising process lacks

    try:
        known = get_training_chat_template(tokenizer)
    except Exception:  # TRL does not know this template, or the template cannot render TRL's probes
        return False
    if known is None:
        return False
    tokenizer.chat_template = known
    if template_problem(tokenizer) is not None:
        tokenizer.chat_template = current
        return False
    return True


def set_system_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Set the system turn that a ChatML template adds to conversations without one. With "" it adds no turn."""
    prepare_chat_template(tokenizer)
    if tokenizer.chat_template not in (DEFAULT_TEMPLATE, chatml_template(_default_system(tokenizer))):
        raise UserError(
            "model.system_prompt: the chat template of the source is not ChatML, so its system turn cannot be changed; "
            "remove the key."
        )
    tokenizer.chat_template = chatml_template(text or None)


def _default_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        rendered = str(render(tokenizer, [_USER]))
    except DropRow:
        return None
    head, tail = f"{TURN_START}system\n", f"{TURN_END}\n{TURN_START}user\n"
    return rendered.removeprefix(head).partition(tail)[0] if rendered.startswith(head) and tail in rendered else None


def _same_rendering(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> bool:
    try:
        return all(
            render(tokenizer, probe, template=first, prompt=prompt)
            == render(tokenizer, probe, template=second, prompt=prompt)
            for probe in PROBES
            for prompt in (False, True)
        )
    except DropRow:
        return False


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` unless the template can be used for training with a loss on assistant turns."""
    require_template(tokenizer)
    if problem := template_problem(tokenizer):
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'}: {problem}")


def template_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Reason why the template cannot be used for training with a loss on assistant turns, if any.

    An assistant turn must begin with the header that generation gets, and end with a special token (otherwise the model
    never learns to stop). If the template has markers, they must include that token.
    """
    template, refusals = ChatTemplate.of(tokenizer), list[str]()
    rows: list[Masked] = []
    for answer, later in ((_ASSISTANT, _MORE[1]), (_REASONED, _REASONED)):
        try:
            texts = training_texts(template, [_USER, answer, _MORE[0], later])
            rows = masked_rows(texts, tokenise(template, [row.text for row in texts]))
            break
        except DropRow as reason:
            refusals.append(str(reason))
    if not rows:
        return _explained(refusals[0])
    if not any(any(mask) for _, mask in rows):
        return (
            "the chat template marks no assistant tokens, so no token would be in the loss. Put "
            "{% generation %} ... {% endgeneration %} around the assistant's content and end-of-turn token, or remove "
            "both."
        )
    ends = [token for ids, mask in rows for token, marked in zip(ids, mask, strict=True) if marked]
    if sum(token in template.end_ids for token in ends) < 2:
        return (
            "the {% generation %} block of the chat template does not include the end-of-turn token, so the "
            "model would never learn to stop. Move {% endgeneration %} after that token."
        )
    return None


def _explained(reason: str) -> str:
    """The problem of a template that cannot be used for any conversation of two turns, by the reason for the first."""
    if reason.startswith(HEADER) or reason == SHARED_TOKEN:
        return (
            "the chat template renders a prompt differently when an answer follows, so prompts would differ between "
            "training and generation. Use a template whose generation prompt is the beginning of an assistant turn."
        )
    if reason == NO_END:
        return (
            "the chat template writes no special token at the end of an assistant turn, so the model would never learn "
            "to stop. Put the end-of-turn token after the assistant's content."
        )
    return f"the chat template cannot render a conversation of two turns ({reason}). Use another template."
