"""The texts of a row that filters read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.filters import Part
from align.data.shapes import REASONING, Message, Shape, conversation, pair, prompt, shape_of, text, unpaired


@dataclass(frozen=True)
class Texts:
    """The texts of one row.

    prompts  every turn that is not the assistant's, in order
    answers  every assistant turn; the text of a `text` row; both answers of a pair
    others   reasoning of the assistant, arguments of tool calls
    """

    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def part(self, part: Part) -> str:
        """The texts of `part`, joined with line breaks; `all` includes the others."""
        every = self.prompts + self.answers + self.others
        return "\n".join({"prompt": self.prompts, "answer": self.answers, "all": every}[part])


def texts_of(row: Mapping[str, Any], accepted: Sequence[Shape]) -> Texts:
    """The texts of a row of one of the accepted shapes. Raises `DropRow` for a row that cannot be used.

    A row of token ids has no texts.
    """
    match shape_of(row, accepted):
        case "token_ids" | None:
            return Texts()
        case "text":
            return Texts(answers=(text(row),))
        case "preference":
            both = pair(row)
            return _texts([*both["prompt"], *both["chosen"], *both["rejected"]])
        case "unpaired":
            labelled = unpaired(row)
            return _texts([*labelled["prompt"], *labelled["completion"]])
        case "prompt":
            return _texts(prompt(row)[0])
        case _ if "prompt" in accepted:  # only the prompt is used; a reference answer is not judged
            return _texts(prompt(row)[0])
        case _:
            turns = conversation(row)
            return _texts([*turns["prompt"], *turns["completion"]])


def _texts(messages: Sequence[Message]) -> Texts:
    answers = [message for message in messages if message["role"] == "assistant"]
    reasoning = [message[name] for message in answers for name in REASONING if message.get(name)]
    calls = [call["function"]["arguments"] for message in answers for call in message.get("tool_calls") or ()]
    return Texts(
        prompts=tuple(message["content"] for message in messages if message["role"] != "assistant"),
        answers=tuple(message["content"] for message in answers if message["content"]),
        others=(*reasoning, *calls),
    )
