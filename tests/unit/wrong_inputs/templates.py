"""Chat templates that training cannot use."""

from __future__ import annotations

import json

from align.data.chat import DEFAULT_TEMPLATE, check_template

from .here import Here, wrong


@wrong("template-without-markers", "A template whose markers enclose no assistant tokens")
def _(here: Here) -> None:
    never = DEFAULT_TEMPLATE.replace("{%- if message['role'] == 'assistant' -%}", "{%- if false -%}")
    assert never != DEFAULT_TEMPLATE
    check_template(here.with_template(never))


@wrong("template-without-end", "A template without end-of-turn token")
def _(here: Here) -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    check_template(here.with_template(lines + "{% if add_generation_prompt %}assistant: {% endif %}"))


@wrong("template-without-end-of-turn", "A template that does not mark the end-of-turn token")
def _(here: Here) -> None:
    inside = "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    assert inside in DEFAULT_TEMPLATE
    outside = "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    check_template(here.with_template(DEFAULT_TEMPLATE.replace(inside, outside)))


@wrong("template-other-header", "A template whose generation prompt is not the beginning of an assistant turn")
def _(here: Here) -> None:
    prompt = "{%- if add_generation_prompt -%}{{- '"
    assert prompt in DEFAULT_TEMPLATE
    check_template(here.with_template(DEFAULT_TEMPLATE.replace(prompt, prompt + "<think>")))


@wrong("template-refuses", "A template that refuses a conversation of two turns")
def _(here: Here) -> None:
    check_template(here.with_template(DEFAULT_TEMPLATE + "{{ raise_exception('one turn only') if messages[2:] }}"))


@wrong("template-ignores-tools", "Tool calls with a template that does not render them")
def _(here: Here) -> str:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    here.write("rows.jsonl", json.dumps({"messages": talk}) + "\n")
    return here.run()


@wrong("template-variable-unknown", "A template variable that the chat template does not read")
def _(here: Here) -> str:
    values = {"enable_thinking": False}
    return here.check(model={"kind": "pretrained", "path": "model", "chat_template_kwargs": values})


@wrong("template-variable-reserved", "An argument of the renderer as template variable")
def _(here: Here) -> str:
    values = {"add_generation_prompt": True}
    return here.check(model={"kind": "pretrained", "path": "model", "chat_template_kwargs": values})


@wrong("template-variable-in-evaluation", "A template variable of an evaluation that the chat template does not read")
def _(here: Here) -> str:
    rows = [{"kind": "file", "path": "rows.jsonl"}]
    rollout = {"engine": "huggingface", "max_new_tokens": 4, "max_model_length": 32}
    stage = {"kind": "evaluate", "models": ["base"], "prompts": rows, "rollout": rollout}
    return here.run(stages={"evaluate": stage | {"chat_template_kwargs": {"reasoning_effort": "high"}}})


@wrong("no-template", "A tokenizer without a template")
def _(here: Here) -> str:
    settings = here.folder / "model" / "tokenizer_config.json"
    (here.folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "template" not in k}))
    tokenizer = here.folder / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|begin|>"))
    settings.write_text(settings.read_text().replace("<|im_start|>", "<|begin|>"))
    return here.run()
