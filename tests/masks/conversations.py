"""Random conversations: tools, thinking, system turns, empty turns, Unicode, several tool results, weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from align.data.templates import ChatTemplate

_PIECES = (
    *(
        "the answer",
        "is",
        "4",
        "x = y + 1",
        "Grüße aus Köln",
        "你好，世界",
        "مرحبا بالعالم",
        "नमस्ते",
        "שלום",
        "🙂👩‍👩‍👧",
        "e\u0301",
    ),
    *(
        "\u200bzero\u200b",
        "<b>bold</b>",
        "{% raw %}",
        "{{ x }}",
        '"quoted"',
        "it's",
        "\\n",
        "a\\tb",
        "```py\nf(x)\n```",
    ),
    *(
        "| a | b |\n|---|---|",
        "<tag>",
        "</tag>",
        "assistant",
        "user\n",
        "[INST",
        "<|im_",
        "|>",
        "1,5\u00a0%",
        "\U0001f600",
    ),
)
_GAPS = (" ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "")
_EDGES = ("", "", "", "", " ", "\n", "  ", "\n\n", "\n ", "\t")


@dataclass(frozen=True)
class Drawn:
    """A conversation with what was drawn for it.

    hostile: its texts have names of control tokens.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    hostile: bool = False

    @property
    def weighted(self) -> bool:
        """True if a turn is taken out of the loss."""
        return any(message.get("train", 1) != 1 for message in self.messages)


class Generator:
    """Draws conversations that a template can render; every tenth may have a part that it cannot."""

    def __init__(self, template: ChatTemplate, seed: str):
        self._random, self._template, self._number = Random(seed), template, 0
        names = [str(token) for token in template.tokenizer.added_tokens_decoder.values()]
        self._inside = "</think>" in template.text and not template.renders_reasoning
        self._names = [name for name in names if "think" not in name.lower()]

    def draw(self) -> Drawn:
        """The next conversation."""
        chance, template = self._chance, self._template
        odd = chance(0.1)
        self._hostile = chance(0.1)
        calls, results = odd or template.renders_calls, odd or template.renders_results
        thinks = (odd or template.renders_reasoning) and chance(0.5)
        variables: dict[str, Any] = {}
        if (odd or template.renders_tools) and chance(0.5):
            variables["tools"] = [self._tool() for _ in range(self._random.randint(1, 2))]
        if "enable_thinking" in template.text and chance(0.3):
            variables["enable_thinking"] = chance(0.5)
        messages: list[dict[str, Any]] = []
        if chance(0.4):
            messages.append({"role": "system", "content": self._text()})
        for _ in range(self._random.randint(1, 4)):
            messages.append({"role": "user", "content": self._text(empty=0.05)})
            while calls and results and chance(0.3):
                made = [self._call() for _ in range(self._random.choice((1, 1, 1, 2, 3)))]
                messages.append(self._assistant(thinks, "" if chance(0.6) else self._text(), tool_calls=made))
                messages += [self._result(call) for call in made]
            messages.append(self._assistant(thinks, self._text(empty=0.03)))
        if chance(0.05):
            messages.append({"role": "user", "content": self._text()})
        return Drawn(messages, variables, self._hostile)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _text(self, empty: float = 0.0) -> str:
        if self._chance(empty):
            return ""
        self._number += 1
        parts = [self._random.choice(_PIECES) for _ in range(self._random.randint(0, 6))]
        parts.insert(self._random.randint(0, len(parts)), f"m{self._number}")
        if self._hostile and self._chance(0.5):
            parts.insert(self._random.randint(0, len(parts)), self._random.choice(self._names))
        text = parts[0]
        for part in parts[1:]:
            text += self._random.choice(_GAPS) + part
        return self._random.choice(_EDGES) + text + self._random.choice(_EDGES)

    def _assistant(self, thinks: bool, content: str, **more: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, **more}
        if thinks and self._chance(0.7):
            message["reasoning_content"] = self._text()
        elif self._inside and self._chance(0.7):
            message["content"] = f"<think>\n{self._text()}\n</think>\n\n{content}"
        if self._chance(0.1):
            message["train"] = 0
        return message

    def _call(self) -> dict[str, Any]:
        self._number += 1
        values = [self._text(), self._random.randint(-9, 9), 0.5, True, None, [1, "two"], {"k": self._text()}, {}, ""]
        arguments = {f"k{n}": self._random.choice(values) for n in range(self._random.randint(0, 3))}
        function = {"name": f"f{self._number}", "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call{self._number:05}", "type": "function", "function": function}

    def _result(self, call: dict[str, Any]) -> dict[str, Any]:
        content = self._text() if self._chance(0.7) else json.dumps({"r": self._text()}, ensure_ascii=False)
        return {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": content}

    def _tool(self) -> dict[str, Any]:
        self._number += 1
        properties = {"k0": {"type": "string", "description": self._text()}, "k1": {"type": "integer"}}
        parameters = {"type": "object", "properties": properties, "required": ["k0"]}
        function = {"name": f"f{self._number}", "description": self._text(), "parameters": parameters}
        return {"type": "function", "function": function}
