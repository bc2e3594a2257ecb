"""Chat templates: encode conversations, mark the assistant's tokens, check that a template can be trained on.

Ids and masks are lists of length T, the tokens of one rendered conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from align.data.formats import DropRow, Message
from align.errors import UserError

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
_SYSTEM_TURN = {"role": "system", "content": "Be brief."}
PROBES: tuple[list[Message], ...] = (
    [_USER],
    [_USER, _ASSISTANT],
    [_SYSTEM_TURN, _USER, _ASSISTANT],
    [_USER, _ASSISTANT, *_MORE],
    [_SYSTEM_TURN, _USER, _ASSISTANT, *_MORE],
)
"""Conversations on which templates are compared and checked."""


# --- rendering --------------------------------------------------------------------------------------------


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(input_ids [T], assistant_mask [T]) of a conversation; the mask is 1 on the assistant's tokens, otherwise 0."""
    encoded = _apply(tokenizer, messages, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids [T] of a whole conversation. The template needs no generation markers."""
    return list(_apply(tokenizer, messages)["input_ids"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message] | str) -> list[int]:
    """Ids [T] of the prompt and the header of the assistant's turn. A string is one user turn."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(_apply(tokenizer, messages, add_generation_prompt=True)["input_ids"])


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase, *, end: int | None) -> list[int]:
    """Ids [T] of an assistant's answer, without the header that `encode_prompt` appends to the prompt.

    The answer is tokenised apart from the prompt, as a sampled completion is.

    end: token that ends the turn; None for a truncated turn.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
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
                    rendered.append(_render(tokenizer, tokenizer.chat_template, probe, prompt))
                except Exception:  # a template may raise anything for a conversation that it does not support
                    rendered.append(None)
    known = json.dumps([sorted(tokenizer.get_vocab().items()), rendered])
    return hashlib.sha256(known.encode()).hexdigest()


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    """Apply the chat template. Raises `UserError` without one, `DropRow` if the template refuses the conversation."""
    _require_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), return_dict=True, **options)
    except TemplateError as error:
        raise DropRow(f"refused by the chat template: {error}") from error


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"{name}: it has no chat template. Add one to its folder as chat_template.jinja.")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn: the end-of-sequence token, and the special token, if any, with which the template ends an
    assistant turn."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        content = "Sentinel-7"
        rendered = _render(tokenizer, tokenizer.chat_template, [_USER, {"role": "assistant", "content": content}])
        tail = tokenizer(rendered.rpartition(content)[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids += [int(token) for token in tail[:1] if token in special]
    return list(dict.fromkeys(ids))


def _render(tokenizer: PreTrainedTokenizerBase, template: Any, messages: list[Message], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(  # type: ignore[return-value]  # text, as tokenize=False
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


# --- preparing and checking -------------------------------------------------------------------------------


def prepare_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Replace the tokenizer's template by one with generation markers that renders the same; True if replaced.

    A template that has generation markers is kept. A ChatML template without tools is replaced by ours if both render
    every probe the same. Templates that TRL knows are replaced by TRL's training version. A tokenizer without a
    template, but with ChatML's tokens, gets the default template. Any other template is kept; `check_template` refuses
    it if it cannot be trained on.
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
    candidates = [DEFAULT_TEMPLATE]
    default_system = _default_system(tokenizer)
    if default_system is not None:
        candidates.append(chatml_template(default_system))
    # Our ChatML template does not render tools, so it must not replace a template that does.
    if "tools" not in current:
        for candidate in candidates:
            if _same_rendering(tokenizer, current, candidate):
                tokenizer.chat_template = candidate
                return True
    try:
        known = get_training_chat_template(tokenizer)
    except Exception:  # TRL does not know this template, or the template cannot render TRL's probes
        return False
    if known is None:
        return False
    tokenizer.chat_template = known
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
        rendered = _render(tokenizer, tokenizer.chat_template, [_USER])
    except Exception:  # a template may raise anything for a conversation that it does not support
        return None
    head, tail = f"{TURN_START}system\n", f"{TURN_END}\n{TURN_START}user\n"
    return rendered.removeprefix(head).partition(tail)[0] if rendered.startswith(head) and tail in rendered else None


def _same_rendering(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> bool:
    try:
        return all(
            _render(tokenizer, first, probe, prompt) == _render(tokenizer, second, probe, prompt)
            for probe in PROBES
            for prompt in (False, True)
        )
    except Exception:
        return False


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` unless the template can be used for training with a loss on assistant turns.

    The template must mark the assistant's tokens and its end-of-turn token (otherwise the model never learns to stop),
    and preserve prefixes (otherwise prompts differ between training and generation).
    """
    name = tokenizer.name_or_path or "the tokenizer"
    _require_template(tokenizer)
    conversation = [_USER, _ASSISTANT, *_MORE]
    ids, mask = encode_conversation(tokenizer, conversation)
    if not any(mask):
        raise UserError(
            f"{name}: the chat template marks no assistant tokens, so no token would be in the loss. Put "
            "{% generation %} ... {% endgeneration %} around the assistant's content and end-of-turn token."
        )
    stops = set(stop_token_ids(tokenizer))
    # The end-of-turn token need not come last, because some published templates also mark the line break after it.
    turns = [list(run) for marked, run in groupby(range(len(ids)), key=lambda t: mask[t]) if marked]
    if len(turns) != 2 or not all(any(ids[t] in stops for t in turn) for turn in turns):
        raise UserError(
            f"{name}: the {{% generation %}} block of the chat template does not include the end-of-turn token, so the "
            "model would never learn to stop. Move {% endgeneration %} after that token."
        )
    for count in (1, 3):
        prompt = encode_prompt(tokenizer, conversation[:count])
        longer = encode_messages(tokenizer, conversation[: count + 1])
        if longer[: len(prompt)] != prompt or ids[: len(prompt)] != prompt:
            raise UserError(
                f"{name}: the chat template is not prefix-preserving: it renders a prompt differently when an answer "
                "follows, so prompts would differ between training and generation. Use a template that does not "
                "rewrite earlier turns."
            )
