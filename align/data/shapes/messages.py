"""Messages in the forms that people write, as canonical messages.

A list may mix OpenAI's keys `role` and `content` with ShareGPT's `from` and `value`. A message's content is text, null
beside tool calls, or a list of text parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from align.data.shapes.base import DropRow, Message, as_text, json_text, kind_of, parsed_json, shown

ROLES = {
    alias: role
    for role, aliases in {
        "system": "system developer system_prompt",
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt bot chatbot model ai bing bard claude gemini",
        "tool": "tool observation function ipython tool_response tool_result function_response function_result",
        "function_call": "function_call tool_call",
    }.items()
    for alias in aliases.split()
}
"""Role of each known speaker, in lower case. A `function_call` message is the assistant's: its text is a tool call."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message with the assistant's reasoning."""
MESSAGE_KEYS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id"}
    | {"train", "weight", "mask", *REASONING}
)
"""Keys of a message that are read."""
_USUAL_KEYS, _USUAL_ROLES = {"role", "content"}, ("system", "user", "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {"image": "image", "image_url": "image", "input_image": "image", "audio": "audio", "input_audio": "audio"}
_MEDIA |= {"audio_url": "audio", "video": "video", "video_url": "video", "input_video": "video", "file": "file"}
_HH_START, _HH_TURN = re.compile(r"\s*\n\nHuman:"), re.compile(r"\n\n(Human|Assistant):")


def to_messages(value: Any, role: str) -> list[Message]:
    """Convert a column's value to canonical messages.

    Text becomes one message of `role`, or the turns of an HH transcript. One message object is a list of one. Raises
    `DropRow` if the value is empty or a message cannot be used.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, bool | int | float | Decimal):
        value = as_text(value, f"{_article(role)} {role} turn")
    if isinstance(value, str):
        if not value.strip():
            raise DropRow(f"empty {role} turn")
        return hh_turns(value) if is_transcript(value) else [{"role": role, "content": value}]
    if not value:
        raise DropRow("empty conversation")
    if not isinstance(value, list):
        raise DropRow(f"{_article(role)} {role} turn is {kind_of(value)}, not text or messages")
    return [_message(item) for item in value]


def is_transcript(text: str) -> bool:
    """True for text in the form of Anthropic's HH data."""
    return _HH_START.match(text) is not None


def hh_turns(text: str) -> list[Message]:
    """Turns of a transcript in the form of Anthropic's HH data: "\\n\\nHuman: ...\\n\\nAssistant: ...".

    An empty last turn of the assistant, which ends a prompt, is left out.
    """
    _, *parts = _HH_TURN.split(text)
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2]):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    for turn in turns:
        if not turn["content"]:
            raise DropRow(f"empty {turn['role']} turn")
    return turns


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise DropRow("a message is not an object with role and content")
    # The usual message has nothing to convert. In a million rows the steps below take a minute to find that out.
    if item.keys() == _USUAL_KEYS and item["role"] in _USUAL_ROLES:
        content = item["content"]
        if isinstance(content, str) and content.strip():
            return {"role": item["role"], "content": content}
    given = {key: value for key, value in item.items() if value is not None}
    speaker = given.get("role", given.get("from"))
    if not isinstance(speaker, str):
        raise DropRow("a message has no role")
    role = ROLES.get(speaker.strip().lower())
    if role is None:
        raise DropRow(f"unknown role '{shown(speaker)}'")
    content, reasoning = _content(given.get("content", given.get("value")), role)
    if role == "function_call":
        role, calls, content = "assistant", _listed(parsed_json(content or "", "a tool call")), ""
    else:
        calls = _calls_of(given)
    if calls and role != "assistant":
        raise DropRow(f"{_article(role)} {role} message has tool calls")
    if content is None:
        if not calls and role != "tool":
            raise DropRow("a message has no text")
        content = ""
    if role == "assistant" and not content.strip() and not calls:
        raise DropRow("empty assistant turn")
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    for key in ("name", "tool_call_id"):
        if key in given:
            message[key] = as_text(given[key], f"{key} of a message")
    if reasoning := _reasoning(given, reasoning):
        message["reasoning_content"] = reasoning
    train = _train(given, role)
    return message if train is None else {**message, "train": train}


# --- content and reasoning --------------------------------------------------------------------------------


def _content(value: Any, role: str) -> tuple[str | None, str]:
    """(text of a message or None, reasoning of its parts)."""
    if value is None or isinstance(value, str):
        return value, ""
    if isinstance(value, list) and all(isinstance(p, str) or (isinstance(p, Mapping) and "type" in p) for p in value):
        texts: list[str] = []
        thoughts: list[str] = []
        for part in value:
            kind, text = _part(part)
            (thoughts if kind == "thinking" else texts).append(text)
        return "".join(texts), "".join(thoughts)
    if role in ("tool", "function_call"):  # a result or a call as an object
        return json_text(value, f"the content of a {role} message"), ""
    return as_text(value, "the content of a message"), ""


def _part(part: Any) -> tuple[str, str]:
    """(`text` or `thinking`, text) of a part of a message's content."""
    if isinstance(part, str):
        return "text", part
    kind = part["type"]
    if kind in _MEDIA:
        raise DropRow(f"a message has a part of type '{_MEDIA[kind]}', but only text is trained")
    key = "thinking" if kind == "thinking" else "text"
    if (kind not in _TEXT_PARTS and kind != "thinking") or not isinstance(part.get(key), str):
        raise DropRow(f"a message has a part of type '{shown(kind)}', but only text is trained")
    return key, part[key]


def _reasoning(given: Mapping[str, Any], of_parts: str) -> str:
    found = {of_parts} if of_parts else set()
    for key in REASONING:
        if key in given:
            if not isinstance(given[key], str):
                raise DropRow(f"{key} is {kind_of(given[key])}, not text")
            found |= {given[key]} if given[key] else set()
    if len(found) > 1:
        raise DropRow("a message has two different texts of reasoning")
    return next(iter(found), "")


# --- tool calls -------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _calls_of(given: Mapping[str, Any]) -> list[Any]:
    calls = given.get("tool_calls", given.get("function_call")) or []
    return _listed(parsed_json(calls, "tool_calls") if isinstance(calls, str) else calls)


def _tool_call(call: Any) -> dict[str, Any]:
    """A tool call as {"type": "function", "function": {"name", "arguments": JSON text}} and its id, if any.

    As JSON text, the arguments of all calls have the same type in a column. The text does not depend on whether the
    row has them as an object or as JSON text.
    """
    if isinstance(call, str):
        call = parsed_json(call, "a tool call")
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping):
        function = {}
    name, arguments = function.get("name"), function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    what = "the arguments of a tool call"
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, what)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise DropRow("a tool call is not an object with a name and arguments")
    known = {"id": as_text(call["id"], "the id of a tool call")} if call.get("id") is not None else {}
    return {**known, "type": "function", "function": {"name": name, "arguments": json_text(arguments, what)}}


# --- training weight --------------------------------------------------------------------------------------


def _train(given: Mapping[str, Any], role: str) -> float | None:
    """The weight of a message in the loss; None for the default, which is 1.

    `train` and `weight` are a truth value or a number of at least 0. `mask: true` excludes the message.
    """
    found = {key: _weight(given[key], key) for key in ("train", "weight", "mask") if key in given}
    if "mask" in found:
        if found["mask"] not in (0, 1):
            raise DropRow("mask is not true or false")
        found["mask"] = 1 - found["mask"]
    if len(set(found.values())) > 1:
        raise DropRow("train, weight and mask of a message contradict each other")
    weight = next(iter(found.values()), 1.0)
    if role != "assistant":
        if "train" in found and weight:
            raise DropRow(f"train is set on a {role} message, but only assistant messages are trained")
        return None
    return None if weight == 1 else weight


def _weight(value: Any, key: str) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
        raise DropRow(f"{key} of a message is not a truth value or a number of at least 0")
    return float(value)


def _article(role: str) -> str:
    return "an" if role == "assistant" else "a"
