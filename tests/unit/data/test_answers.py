"""Sampled answers read as messages, with the chat templates of families that separate the parts by special tokens."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.answers import UNREADABLE, AnswerReader
from align.data.chat import ConversationEncoder, encode_prompt
from align.data.shapes import DropRow
from tests.chat_templates import SHAPES, tokenizer_for

USER = {"role": "user", "content": "a"}
FINAL, ANALYSIS, NEXT = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"

# For each template and sampled text: the reasoning and the content.
READABLE = [
    ("gptoss", f"{ANALYSIS}one two{NEXT}{FINAL}bc<|return|>", "one two", "bc"),
    ("gptoss", f"{FINAL}bc<|return|>", None, "bc"),
    ("gptoss", f"{FINAL}bc", None, "bc"),  # truncated in the final channel
    ("gptoss", f"{ANALYSIS}one{NEXT}{FINAL}b", "one", "b"),
    ("gptoss", "bc<|return|>", None, "bc"),
    ("qwen3", "<think>\none\n</think>\n\nbc<|im_end|>", "one", "bc"),
    ("qwen3", "<think>\n\n</think>\n\nbc<|im_end|>", "", "bc"),
    ("qwen3", "bc<|im_end|>", None, "bc"),
    ("hy3", "<think>one</think>bc<|eos|>", "one", "bc"),
    ("mistral", " bc</s>", None, " bc"),
    ("chatml", "bc<|im_end|>", None, "bc"),
    ("hunyuan_v1", "<think>\none\n</think>\n<answer>\nbc\n</answer><|eos|>", None, None),
]
UNREADABLE_TEXTS = [
    ("gptoss", f"{ANALYSIS}one"),  # truncated in the reasoning
    ("gptoss", f"{ANALYSIS}one{NEXT} to=functions.add<|channel|>commentary json<|message|>{{}}<|call|>"),
    ("gptoss", f"{ANALYSIS}one{NEXT}{ANALYSIS}two{NEXT}{FINAL}bc<|return|>"),
    ("gptoss", "<|channel|>commentary<|message|>bc<|return|>"),
    ("qwen3", "<think>\none"),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}]</s>'),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: tokenizer_for(SHAPES[name]) for name in {case[0] for case in READABLE}}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("name", "sampled", "reasoning", "content"), READABLE)
def test_reasoning_and_content_are_separated(
    tokenizers: dict[str, Any], name: str, sampled: str, reasoning: str | None, content: str | None
) -> None:
    tokenizer = tokenizers[name]
    message = AnswerReader(tokenizer).message(ids_of(tokenizer, sampled))
    if content is None:  # the separators are ordinary text, which stays in the content
        content = sampled.removesuffix("<|eos|>")
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    assert AnswerReader(tokenizer).text(ids_of(tokenizer, sampled)) == content


@pytest.mark.parametrize(("name", "sampled"), [case[:2] for case in READABLE if case[0] in ("gptoss", "hy3", "chatml")])
def test_the_template_writes_the_message_as_it_was_sampled(tokenizers: dict[str, Any], name: str, sampled: str) -> None:
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, sampled)
    prompt, answer, _ = ConversationEncoder(tokenizer).answer([USER], [AnswerReader(tokenizer).message(ids)])
    assert prompt == encode_prompt(tokenizer, [USER])
    if sampled == "bc<|return|>":  # the model wrote no channel; the template adds it
        ids = ids_of(tokenizer, FINAL) + ids
    assert answer[: len(ids)] == ids


@pytest.mark.parametrize(("name", "sampled"), UNREADABLE_TEXTS)
def test_an_answer_that_the_template_writes_differently_is_refused(
    tokenizers: dict[str, Any], name: str, sampled: str
) -> None:
    reader, ids = AnswerReader(tokenizers[name]), ids_of(tokenizers[name], sampled)
    with pytest.raises(DropRow, match=UNREADABLE):
        reader.message(ids)
    assert reader.text(ids) == sampled.removesuffix("</s>").removesuffix("<|return|>")


def test_special_tokens_outside_the_layout_are_removed(tokenizers: dict[str, Any]) -> None:
    for name, before in (("chatml", ""), ("gptoss", FINAL)):
        tokenizer = tokenizers[name]
        ids = ids_of(tokenizer, before + "b<|pad|>c")
        assert tokenizer.pad_token_id in ids
        assert AnswerReader(tokenizer).message(ids)["content"] == "bc"


def test_a_tokenizer_without_template_has_plain_answers() -> None:
    tokenizer = tokenizer_for(SHAPES["chatml"])
    tokenizer.chat_template = None
    assert AnswerReader(tokenizer).message(ids_of(tokenizer, "bc<|im_end|>")) == {"role": "assistant", "content": "bc"}
