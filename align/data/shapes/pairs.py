"""Preference pairs. Both answers may be text, messages, or whole conversations that repeat the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.rows import value_of
from align.data.shapes.base import DropRow, Message, Pair
from align.data.shapes.messages import is_transcript, to_messages
from align.data.shapes.parts import alpaca_turns, talk_of, with_system
from align.data.shapes.recognise import TALKS, require_shape


def pair(row: Mapping[str, Any]) -> Pair:
    """The preference pair of a row.

    The prompt is `prompt`, otherwise the column of messages or Alpaca's `instruction`, otherwise the common beginning
    of both conversations. A prompt that both conversations repeat is removed from them.
    """
    require_shape(row, ("preference",))
    ours, theirs = _sides(row)
    prompt = _prompt(row)
    if prompt is None and isinstance(ours, str) and isinstance(theirs, str) and not is_transcript(ours):
        text, ours, theirs = _split_strings(ours, theirs)
        prompt = to_messages(text, "user")
    chosen, rejected = to_messages(ours, "assistant"), to_messages(theirs, "assistant")
    if prompt is None or _repeats(chosen, prompt) or _repeats(rejected, prompt):
        prompt, chosen, rejected = _split_prompt(prompt, chosen, rejected)
    prompt = with_system(row, prompt)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise DropRow(f"{side} does not end with an assistant turn")
        if answer[0]["role"] in ("system", "user"):
            raise DropRow(f"{side} neither answers the prompt nor repeats it")
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _sides(row: Mapping[str, Any]) -> tuple[Any, Any]:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return value_of(row, "chosen"), value_of(row, "rejected")
    chosen, rejected = value_of(row, "output")
    return chosen, rejected


def _prompt(row: Mapping[str, Any]) -> list[Message] | None:
    if row.get("prompt") is not None:
        return to_messages(value_of(row, "prompt"), "user")
    if row.get("instruction") is not None:
        return alpaca_turns(row)
    if any(row.get(column) is not None for column in TALKS):
        messages = talk_of(row)
        # Some data sets repeat the chosen conversation in `messages`.
        return messages if messages[-1]["role"] != "assistant" else None
    return None


def _same(ours: Message, theirs: Message) -> bool:
    return (
        ours["role"] == theirs["role"]
        and ours["content"].strip() == theirs["content"].strip()
        and ours.get("tool_calls") == theirs.get("tool_calls")
    )


def _begins(messages: Sequence[Message], prompt: Sequence[Message]) -> bool:
    return len(messages) >= len(prompt) and all(_same(ours, theirs) for ours, theirs in zip(messages, prompt))


def _repeats(answer: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """True if an answer is a whole conversation rather than a continuation of the prompt."""
    return answer[0]["role"] in ("system", "user") or _begins(answer, prompt)


def _split_prompt(
    given: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of two whole conversations, whose common beginning must contain `given`."""
    if given is not None:
        # One side may be a whole conversation and the other only an answer.
        chosen, rejected = (
            side if _repeats(side, given) else [*given, *side]
            for side in (chosen, rejected)
        )  # fmt: skip
    shared = 0
    for ours, theirs in zip(chosen, rejected):
        if not _same(ours, theirs):
            break
        shared += 1
    # Equal conversations share their answers too. The prompt must not include the last message, so that the comparison
    # of the answers finds them equal.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not (chosen[shared]["role"] == rejected[shared]["role"] == "assistant"):
        shared -= 1
    if shared <= 0:
        raise DropRow("chosen and rejected share no prompt")
    prompt = chosen[:shared]
    if given is not None and not any(_begins(prompt[start:], given) for start in range(len(prompt))):
        if len(given) <= shared or not _begins(given[-shared:], prompt):  # they may lack the system prompt
            raise DropRow("chosen and rejected begin with another prompt than the column prompt")
        prompt = given
    return prompt, chosen[shared:], rejected[shared:]


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two strings with a common beginning, split at a word boundary."""
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    end = 0
    for ours, theirs in zip(chosen, rejected):
        if ours != theirs:
            break
        end += 1
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1
    if not chosen[:end].strip():
        raise DropRow("chosen and rejected share no prompt")
    return chosen[:end].rstrip(), chosen[end:], rejected[end:]
