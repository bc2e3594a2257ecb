"""Rows of single tool calls from conversations in Glaive's form, and the verifier that compares two calls."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TURNS = {"human": "User", "gpt": "Assistant", "observation": "Result", "function_call": "Call"}
LONGEST = 800
"""Characters of a prompt; longer ones are left out."""


def calls(conversation: dict[str, Any]) -> list[dict[str, str]]:
    """A row per call: the functions and all turns before the call as `prompt`, the call as `completion`."""
    rows, turns = [], []
    for turn in conversation["conversations"]:
        if turn["from"] == "function_call":
            prompt = "\n".join(
                [
                    "Functions:",
                    conversation["tools"],
                    "",
                    *turns,
                    "",
                    "Write the next call as JSON with name and arguments.",
                ]
            )
            rows.append({"prompt": prompt, "completion": turn["value"]})
        turns.append(f"{TURNS[turn['from']]}: {turn['value']}")
    return [row for row in rows if len(row["prompt"]) <= LONGEST]


def split(file: Path, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(rows to train on, at least `held_out` rows of other conversations)."""
    with file.open(encoding="utf-8") as lines:
        conversations = [json.loads(line) for line in lines]
    random.Random(0).shuffle(conversations)
    train: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    for conversation in conversations:
        (held if len(held) < held_out else train).extend(calls(conversation))
    return train, held


def call_of(text: str) -> Any:
    """The call that `text` is, as JSON; None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def same_call(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 if name and arguments equal those of the row's call; the order of the arguments does not matter."""
    return [
        float(call_of(text) is not None and call_of(text) == call_of(row["completion"]))
        for text, row in zip(completions, rows, strict=True)
    ]
