"""Chat templates of model families for tests: those that TRL ships, and others written here in the shape of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import trl
from tokenizers import AddedToken

from align.data.tokenizer import train_tokenizer

SHIPPED = Path(trl.__file__).parent / "chat_templates"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The tools and the system message move to the last user turn, so earlier prompts change when turns are added.
MISTRAL = """{{ bos_token }}
{%- set ns = namespace(last=-1, system='') -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.last -%}
{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif -%}
{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
{{ '[TOOL_RESULTS] ' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls -%}
{{ ({'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson) }}
{{- ']' if loop.last else ', ' }}
{%- endfor -%}
{{ eos_token }}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""
# The reasoning is part of the content and leaves it in earlier turns; `enable_thinking: false` marks the question.
HUNYUAN_V1 = """{%- for m in messages -%}
{%- set text = m.content -%}
{%- if m.role == 'system' -%}{{ '<|startoftext|>' + text + '<|extra_4|>' }}
{%- elif m.role == 'user' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'system' %}{{ '<|startoftext|>' }}{% endif -%}
{%- if enable_thinking is defined and not enable_thinking and not text.startswith('/no_think') -%}
{%- set text = '/no_think' + text -%}
{%- endif -%}
{{ text + '<|extra_0|>' }}
{%- elif m.role == 'assistant' -%}
{%- if '<answer>' in text and not loop.last -%}
{%- set text = text.split('<answer>')[-1].split('</answer>')[0].strip('\n') -%}
{%- endif -%}
{{ text + '<|eos|>' }}
{%- endif -%}
{%- endfor -%}"""
# Reasoning under its own key, tool calls as tagged keys and values; the effort is a line of the system turn.
HY3 = """{{ '<|startoftext|>' }}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- if tools %}{{ '\n<tools>' + (tools | tojson) + '</tools>' }}{% endif -%}
{{ '\nreasoning_effort: ' + (reasoning_effort | default('no_think')) + '<|extra_4|>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|extra_5|>' + m.content + '<|extra_0|>' }}
{%- elif m.role == 'tool' -%}{{ '<|extra_6|><tool_response>' + m.content + '</tool_response><|extra_0|>' }}
{%- elif m.role == 'assistant' -%}
{{ '<|extra_7|>' }}
{%- if m.reasoning_content and loop.index0 > ns.last -%}{{ '<think>' + m.reasoning_content + '</think>' }}
{%- else -%}{{ '<think></think>' }}{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() -%}
{{ '<arg_key>' + key + '</arg_key><arg_value>' + (value if value is string else value | tojson) + '</arg_value>' }}
{%- endfor -%}
{{ '</tool_call>' }}
{%- endfor -%}
{{ '<|eos|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|extra_7|>' + ('<think></think>' if reasoning_effort == 'no_think' else '') }}
{%- endif -%}"""


class Shape(NamedTuple):
    """A template with its special tokens.

    tokens: special tokens beside bos and eos.
    tags: added tokens that are not special.
    """

    template: str
    eos: str
    bos: str | None = None
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_HUNYUAN_TOKENS = tuple(f"<|extra_{number}|>" for number in range(8))
_LLAMA = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "tokens": ("<|start_header_id|>", "<|end_header_id|>")}
_DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
SHAPES = {
    "chatml": Shape(CHATML, "<|im_end|>", tokens=_CHATML_TOKENS),
    "qwen2_5": Shape(shipped("qwen2_5"), "<|im_end|>", tokens=_CHATML_TOKENS),
    "qwen3": Shape(shipped("qwen3"), "<|im_end|>", tokens=(*_CHATML_TOKENS, "<think>", "</think>", "</tool_call>")),
    "llama3": Shape(shipped("llama3"), **_LLAMA),
    "llama3_2": Shape(shipped("llama3_2"), **_LLAMA),
    "mistral": Shape(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")),
    "gemma": Shape(shipped("gemma"), "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma3": Shape(shipped("gemma3"), "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Shape(shipped("phi3"), "<|endoftext|>", "<s>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "glm4moe": Shape(
        shipped("glm4moe"),
        "<|endoftext|>",
        tokens=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "</tool_call>"),
    ),
    "gptoss": Shape(
        shipped("gptoss"),
        "<|return|>",
        "<|startoftext|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
    ),
    "deepseek_r1_distill": Shape(
        shipped("deepseek_r1_distill"), "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _DEEPSEEK_TOKENS
    ),
    "deepseekv3": Shape(shipped("deepseekv3"), "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _DEEPSEEK_TOKENS),
    "hunyuan_v1": Shape(HUNYUAN_V1, "<|eos|>", "<|startoftext|>", _HUNYUAN_TOKENS),
    "hy3": Shape(HY3, "<|eos|>", "<|startoftext|>", (*_HUNYUAN_TOKENS, "<think>", "</think>", "</tool_call>")),
}


_COHERE_TOKENS = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "USER", "CHATBOT", "SYSTEM"))
_GEMMA4_TOKENS = (
    *("<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
    *("<tool_response|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|image|>", "<|audio|>", "<|video|>"),
)
_LFM_TOKENS = (*_CHATML_TOKENS, *(f"<|tool_{name}|>" for name in ("list_start", "list_end", "call_start", "call_end")))
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_QWEN3 = {"eos": "<|im_end|>", "tokens": (*_CHATML_TOKENS, "<|endoftext|>"), "tags": _TAGS}
MORE_SHAPES = {
    "cohere": Shape(shipped("cohere"), "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", _COHERE_TOKENS),
    "cohere2": Shape(
        shipped("cohere2"),
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        (*_COHERE_TOKENS, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "gemma4": Shape(shipped("gemma4"), "<eos>", "<bos>", _GEMMA4_TOKENS),
    **{
        name: Shape(shipped(name), "<eos>", "<bos>", _GEMMA4_TOKENS) for name in ("gemma4_v2", "gemma4_v3", "gemma4_v4")
    },
    "gemma4_v5": Shape(shipped("gemma4_v5"), "<eos>", "<bos>", _GEMMA4_TOKENS),
    "lfm2": Shape(shipped("lfm2"), "<|im_end|>", "<|startoftext|>", _LFM_TOKENS),
    "lfm2_v2": Shape(shipped("lfm2_v2"), "<|im_end|>", "<|startoftext|>", _LFM_TOKENS),
    "lfm2_2_5": Shape(shipped("lfm2_2_5"), "<|im_end|>", "<|startoftext|>", _LFM_TOKENS, _TAGS[:2]),
    "lfm2_2_5_v2": Shape(shipped("lfm2_2_5_v2"), "<|im_end|>", "<|startoftext|>", _LFM_TOKENS, _TAGS[:2]),
    "muse_glimmer": Shape(
        shipped("muse_glimmer"), "<|eot|>", "<|begin_of_text|>", ("<|start|>", "<|message|>", "<|eom|>")
    ),
    "llama3_1": Shape(
        shipped("llama3_1"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
    ),
    "phi3_5": Shape(shipped("phi3_5"), "<|endoftext|>", "<s>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    **{name: Shape(shipped(name), **_QWEN3) for name in ("qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink")},
    **{name: Shape(shipped(name), **_QWEN3) for name in ("qwen3_6", "qwen3_8")},
    **{name: Shape(shipped(name), **_QWEN3) for name in ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")},
    "nemotron_3_5_lightning": Shape(shipped("nemotron_3_5_lightning"), **_QWEN3),
}
"""Further templates that TRL ships."""


def tokenizer_for(shape: Shape, base: Any = None) -> Any:
    """A tokenizer with the shape's special tokens; by default, one of bytes: one token per ASCII character.

    base: a tokenizer that gets the tokens instead.
    """
    tokenizer = train_tokenizer(["a"], 259) if base is None else base
    others = [AddedToken(token, special=True) for token in shape.tokens]
    tokenizer.add_special_tokens({"eos_token": shape.eos, "extra_special_tokens": others})
    if shape.bos is not None:
        tokenizer.add_special_tokens({"bos_token": shape.bos})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in shape.tags])
    tokenizer.chat_template = shape.template
    tokenizer.name_or_path = "model"
    return tokenizer
