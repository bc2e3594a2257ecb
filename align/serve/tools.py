"""Tool calls: which of vLLM's parsers reads the calls that a model's chat template writes.

A parser is used only if it reads the template's own rendering of calls, whole and streamed token by token. It is called
as by vLLM's chat route.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.shapes import DropRow, Message
from align.data.templates import ChatTemplate, render

PARSERS = (
    *("hermes", "qwen3_coder", "llama3_json", "mistral", "glm45", "glm47", "hunyuan_a13b", "hy_v3", "deepseek_v3"),
    *("deepseek_v31", "deepseek_v32", "granite", "granite4", "granite-20b-fc", "phi4_mini_json", "lfm2", "kimi_k2"),
    *("minimax_m2", "ernie45", "seed_oss", "cohere_command3", "gemma4", "functiongemma", "olmo3", "pythonic"),
    *("llama4_pythonic", "internlm", "jamba", "xlam", "step3", "apertus", "longcat", "mimo"),
)
"""vLLM's parsers in the order in which they are tried."""
USER = {"role": "user", "content": "What is the weather in Paris for 3 days?"}
ANSWER = "It is sunny."
NAME, ARGUMENTS = "get_weather", ({"city": "Paris", "days": 3}, {"city": "Rome", "days": 12})
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "Forecast of the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
]
IDS = ("abcdef012", "abcdef013")
"""Ids of the calls; Mistral's template accepts only nine letters and digits."""
NO_TEMPLATE = "the model has no chat template"
NOT_RENDERED = "the chat template does not render tools and their calls, so the model would never see them"
NOT_READ = "no parser of vLLM reads the tool calls that the chat template writes"


def tool_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Reason why the chat template has no tool calls, if any."""
    if not tokenizer.chat_template:
        return NO_TEMPLATE
    template = ChatTemplate.of(tokenizer)
    return None if template.renders_tools and template.renders_calls else NOT_RENDERED


def find_parser(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first parser of vLLM that reads the template's calls, if any."""
    return next((name for name in PARSERS if reads_calls(name, tokenizer)), None)


def reads_calls(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if vLLM's parser reads one call, two calls if the template renders them, and an answer without calls."""
    texts = {}
    for number in (1, 2):
        with suppress(DropRow):
            texts[number] = written(tokenizer, _calling(ARGUMENTS[:number]))
    with _without_messages():
        return bool(texts) and all(
            read(name, tokenizer, text, streamed=streamed)[1] == [(NAME, values) for values in ARGUMENTS[:number]]
            and read(name, tokenizer, ANSWER, streamed=streamed) == (ANSWER, [])
            for number, text in texts.items()
            for streamed in (False, True)
        )


@contextmanager
def _without_messages() -> Iterator[None]:
    """Hide the messages of parsers about texts of another form."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _calling(arguments: Sequence[dict[str, Any]]) -> Message:
    calls = [
        {"id": number, "type": "function", "function": {"name": NAME, "arguments": json.dumps(values)}}
        for number, values in zip(IDS, arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def written(tokenizer: PreTrainedTokenizerBase, message: Message) -> str:
    """The text that the model generates for an assistant's message, without the token that ends the turn.

    Raises `DropRow` if the template refuses the message.
    """
    tools = {"tools": TOOLS}
    whole = render(tokenizer, [USER, message], tools)
    prompt = render(tokenizer, [USER], tools, prompt=True)
    text = whole[next((i for i, pair in enumerate(zip(whole, prompt)) if pair[0] != pair[1]), len(prompt)) :]
    template = ChatTemplate.of(tokenizer)
    end = template.end_after(message)
    before, found, _ = text.rpartition(template.name(end)) if end is not None else ("", "", "")
    return before if found else text


def read(
    name: str, tokenizer: PreTrainedTokenizerBase, text: str, *, streamed: bool
) -> tuple[str, list[tuple[str, Any]]]:
    """(content, calls as (name, arguments)) that vLLM's parser finds in a generated text; no calls if it fails."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    try:
        made: Any = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
        values = {"model": "model", "messages": [USER], "tools": TOOLS, "tool_choice": "auto"}
        request = ChatCompletionRequest.model_validate(values)
        parser = made(tokenizer, request.tools, chat_template_kwargs={})
        request = parser.adjust_request(request)
        shown = bool(getattr(request, "skip_special_tokens", True))
        if streamed:
            return _streamed(parser, request, tokenizer, ids, skip_special_tokens=shown)
        decoded = tokenizer.decode(ids, skip_special_tokens=shown)
        _, content, calls = parser.parse(decoded, request, enable_auto_tools=True, model_output_token_ids=ids)
        return content or "", [(call.name, json.loads(call.arguments)) for call in calls or []]
    except Exception:  # a parser of another format fails in its own way
        return "", []


def _streamed(
    parser: Any, request: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], *, skip_special_tokens: bool
) -> tuple[str, list[tuple[str, Any]]]:
    content, names, arguments = "", dict[int, str](), dict[int, str]()
    shown = ""
    for number, token in enumerate(ids, 1):
        text = str(tokenizer.decode(ids[:number], skip_special_tokens=skip_special_tokens))
        delta = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text.removeprefix(shown)
        shown += delta
        message = parser.parse_delta(delta, [token], request, prompt_token_ids=[], finished=number == len(ids))
        if message is None:
            continue
        content += message.content or ""
        for call in message.tool_calls or []:
            function = call.function
            if function is not None and function.name:
                names[call.index] = function.name
            if function is not None and function.arguments:
                arguments[call.index] = arguments.get(call.index, "") + function.arguments
    return content, [(names[index], json.loads(arguments[index])) for index in sorted(names)]
