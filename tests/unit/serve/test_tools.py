"""Parsers of tool calls against the chat templates of published models."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.errors import UserError
from align.serve import tools
from align.serve.command import parser_of_calls
from align.serve.tools import NOT_RENDERED, find_parser, read, reads_calls, tool_problem
from tests.chat_templates import MORE_SHAPES, SHAPES, tokenizer_for

PARSERS = {
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_5_nothink": "qwen3_coder",
    "llama3_1": "llama3_json",
    "mistral": "mistral",
    "glm4moe": "glm45",
    "hy3": "glm45",
    "gemma4": "gemma4",
    "lfm2_v2": "lfm2",
    "gptoss": None,
}
WITHOUT = ["chatml", "phi3", "gemma"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    shapes = {**SHAPES, **MORE_SHAPES}
    return {name: tokenizer_for(shapes[name]) for name in [*PARSERS, *WITHOUT]}


@pytest.mark.parametrize("shape", PARSERS)
def test_the_parser_is_the_one_that_reads_the_templates_calls(shape: str, tokenizers: dict[str, Any]) -> None:
    assert find_parser(tokenizers[shape]) == PARSERS[shape]


@pytest.mark.parametrize("shape", WITHOUT)
def test_templates_without_tools_have_no_parser(shape: str, tokenizers: dict[str, Any]) -> None:
    assert tool_problem(tokenizers[shape]) == NOT_RENDERED


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_in_the_form_of_qwen_2_5(streamed: bool, tokenizers: dict[str, Any]) -> None:
    """The text is that of Qwen2.5's model card."""
    calls = [("get_temperature", {"city": "San Francisco"}), ("get_date", {"days": 1})]
    lines = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    text = "Wait.\n" + "\n".join(f"<tool_call>\n{line}\n</tool_call>" for line in lines)
    content, found = read("hermes", tokenizers["qwen2_5"], text, streamed=streamed)
    assert found == calls
    assert content.strip() == "Wait."


def test_a_parser_of_another_form_is_not_used(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reads_calls("mistral", tokenizers["qwen2_5"])
    assert not reads_calls("hermes", tokenizers["llama3_1"])
    monkeypatch.setattr(tools, "PARSERS", ("mistral",))
    assert find_parser(tokenizers["qwen2_5"]) is None


def test_a_parser_that_is_given_must_read_the_calls(tokenizers: dict[str, Any]) -> None:
    def chosen(name: str | None) -> str | None:
        settings: Any = SimpleNamespace(tool_parser=name, checkpoint="model")
        return parser_of_calls(settings, tokenizers["qwen2_5"])

    assert chosen(None) == "hermes"
    assert chosen("qwen3_json") == "qwen3_json"
    with pytest.raises(UserError, match=r"--tool-parser mistral: it does not read .* so that 'hermes' is used\.$"):
        chosen("mistral")
