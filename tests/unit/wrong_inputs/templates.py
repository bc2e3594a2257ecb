"""Chat templates that training cannot use."""

from __future__ import annotations

import json

from align.data.chat import DEFAULT_TEMPLATE, check_template

from .here import Here, wrong

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@wrong("template-without-markers", "A template that does not mark the assistant's tokens")
def _(here: Here) -> None:
    check_template(here.with_template(CHATML.replace("m.content", "m.content | upper")))


@wrong("template-without-end-of-turn", "A template that does not mark the end-of-turn token")
def _(here: Here) -> None:
    inside = "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    assert inside in DEFAULT_TEMPLATE
    outside = "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    check_template(here.with_template(DEFAULT_TEMPLATE.replace(inside, outside)))


@wrong("template-rewrites-turns", "A template that changes earlier turns")
def _(here: Here) -> None:
    last_only = "(message['content'] if loop.last else '-') +"
    check_template(here.with_template(DEFAULT_TEMPLATE.replace("message['content'] +", last_only)))


@wrong("no-template", "A tokenizer without a template")
def _(here: Here) -> str:
    settings = here.folder / "model" / "tokenizer_config.json"
    (here.folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "template" not in k}))
    tokenizer = here.folder / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|begin|>"))
    settings.write_text(settings.read_text().replace("<|im_start|>", "<|begin|>"))
    return here.run()
