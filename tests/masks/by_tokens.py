"""Training rows found token by token: every prefix of a conversation is rendered and tokenised anew.

The slow construction that `align.data.turns` and `align.data.masks` must equal. It uses the tokenizer and its template
through `apply_chat_template` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Masked = tuple[list[int], list[int]]
REASONING = ("reasoning_content", "reasoning", "thinking")


class Refused(Exception):
    """Raised where a turn cannot be trained."""


def shown(messages: Sequence[Message], *, parse: bool = True) -> list[dict[str, Any]]:
    """Messages as templates expect them."""
    result = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "train"}
        reasoning = next((message[name] for name in REASONING if message.get(name)), None)
        if reasoning is not None:
            message = {**dict.fromkeys(REASONING, reasoning), **message}
        if parse and message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        result.append(message)
    return result


def render(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any], *, prompt: bool = False) -> str:
    options = {"tokenize": False, "add_generation_prompt": prompt, **variables}
    try:
        return tokenizer.apply_chat_template(shown(messages), **options)
    except TypeError:  # DeepSeek-V3's template reads the arguments as text
        return tokenizer.apply_chat_template(shown(messages, parse=False), **options)


def without_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without reasoning; gpt-oss writes the content of a message with tool calls as reasoning too."""
    bare = [{key: value for key, value in message.items() if key not in REASONING} for message in messages]
    return [{**message, "content": ""} if message.get("tool_calls") else message for message in bare]


def tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def turn(
    tokenizer: Any, messages: Sequence[Message], number: int, variables: Mapping[str, Any], ends: Mapping[str, Any]
) -> tuple[int, int, list[int]]:
    """(first token, last token + 1, ids) of the assistant turn `messages[number]` in the context of its generation."""
    before = messages[:number]
    head = tokens(tokenizer, render(tokenizer, before, variables, prompt=True))
    ids = tokens(tokenizer, render(tokenizer, messages[: number + 1], variables))
    if ids[: len(head)] != head:
        bare = without_reasoning(before)
        bare_head = tokens(tokenizer, render(tokenizer, bare, variables, prompt=True))
        bare_ids = tokens(tokenizer, render(tokenizer, [*bare, messages[number]], variables))
        if bare_ids[: len(bare_head)] != bare_head:
            raise Refused("prompt")
        ids = head + bare_ids[len(bare_head) :]
    found = [t + 1 for t in range(len(head), len(ids)) if ids[t] in ends["ids"]]
    if ends["implied"] and not found:
        ids.append(ends["call"] if messages[number].get("tool_calls") else ends["answer"])
        found = [len(ids)]
    if len(found) != 1:
        raise Refused("end")
    return len(head), found[0], ids


def rows(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any], ends: Mapping[str, Any]) -> list:
    """Rows (ids [T], mask [T]) that train every assistant turn.

    ends: {"ids": tokens that end a turn, "answer" and "call": those after an answer and after tool calls, "implied":
        True if only the next turn writes them}.
    """
    numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", 1)]
    if not numbers:
        return []
    turns = [turn(tokenizer, messages, number, variables, ends) for number in numbers]

    def begins(one: tuple[int, int, list[int]], ids: list[int]) -> bool:
        return ids[: one[1]] == one[2][: one[1]]

    ids = turns[-1][2]
    if numbers[-1] + 1 < len(messages):
        whole = tokens(tokenizer, render(tokenizer, messages, variables))
        ids = whole if all(begins(one, whole) for one in turns) else ids
    found: list[Masked] = []
    while turns:
        mask = [0] * len(ids)
        for start, end, _ in (one for one in turns if begins(one, ids)):
            mask[start:end] = [1] * (end - start)
        found.append((ids, mask))
        turns = [one for one in turns if not begins(one, ids)]
        ids = turns[-1][2] if turns else ids
    return found[::-1]
