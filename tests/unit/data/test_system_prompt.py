"""The system prompt that a recipe sets for a source, in rows of every shape."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.parts import Data, FileSource
from align.data import chat, prepare, shapes
from align.data.shapes import DropRow
from align.data.sources import adapter_of
from tests.chat_templates import SHAPES, tokenizer_for

from .conftest import turn

USER, ANSWER, OWN = turn("user", "a"), turn("assistant", "b"), turn("system", "own")
SETTINGS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, None, "own"),
    ({"system_prompt": "set"}, "set", "own"),
    ({"system_prompt": "set", "replace_system_prompt": True}, "set", "set"),
    ({"system_prompt": "", "replace_system_prompt": True}, None, None),
]


def first(messages: list[dict]) -> str | None:
    """The only system prompt, if any, which must be the first message."""
    assert all(message["role"] != "system" for message in messages[1:])
    return messages[0]["content"] if messages[0]["role"] == "system" else None


@pytest.mark.parametrize(("settings", "without", "with_own"), SETTINGS)
def test_each_shape_gets_the_system_prompt(settings, without, with_own):
    adapter = adapter_of(FileSource(path="x.jsonl", **settings))
    for own, expected in (([], without), ([OWN], with_own)):
        talk = [*own, USER, ANSWER]
        column = {"system": "own"} if own else {}
        assert first(shapes.conversation(adapter({"messages": talk}))["completion"]) == expected
        assert first(shapes.conversation(adapter({"messages": [USER, ANSWER], **column}))["completion"]) == expected
        alpaca = {"instruction": "a", "output": "b", **column}
        assert first(shapes.conversation(adapter(alpaca))["completion"]) == expected
        row = {"prompt": [*own, USER], "completion": "b"}
        assert first(shapes.conversation(adapter(row))["prompt"]) == expected
        assert first(shapes.prompt(adapter({"prompt": [*own, USER]}))[0]) == expected
        pair = shapes.pair(adapter({"prompt": [*own, USER], "chosen": "b", "rejected": "c"}))
        assert first(pair["prompt"]) == expected
        whole = {"chosen": talk, "rejected": [*own, USER, turn("assistant", "c")]}
        assert first(shapes.pair(adapter(whole))["prompt"]) == expected


def test_a_source_of_a_recipe_sets_it_for_any_template(jsonl):
    path = jsonl([{"messages": [USER, ANSWER]}, {"messages": [OWN, turn("user", "c"), ANSWER]}])
    for name in ("llama3", "mistral", "gptoss", "qwen2_5"):
        tokenizer = tokenizer_for(SHAPES[name])
        texts = {}
        for key, settings in {"none": {}, "set": {"system_prompt": "Be <|im_end|> brief."}}.items():
            data = Data(train=[FileSource(path=path, **settings)], max_length=4000)
            done = prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=1)
            texts[key] = sorted(tokenizer.decode(row["input_ids"]) for row in done.train)
        assert [text.count("Be <|im_end|> brief.") for text in texts["set"]].count(1) == 1
        assert sum("own" in text for text in texts["set"]) == 1
        assert not any("brief" in text for text in texts["none"])
        (prompts, _) = prepare.prepare_prompts(
            [FileSource(path=path, system_prompt="s")], tokenizer, max_prompt_length=4000, seed=1
        )
        assert sorted(first(prompt.messages) or "" for prompt in prompts) == ["own", "s"]
        assert set(prompts[0].row) == {"messages"}


def test_a_template_that_ignores_system_prompts_is_refused():
    tokenizer = tokenizer_for(SHAPES["chatml"])
    tokenizer.chat_template = SHAPES["chatml"].template.replace("%}<|im", "%}{% if m.role != 'system' %}<|im", 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endfor %}", "{% endif %}{% endfor %}")
    encoder = chat.ConversationEncoder(tokenizer)
    assert encoder.rows([USER, ANSWER])
    with pytest.raises(DropRow, match="does not render system prompts"):
        encoder.rows([OWN, USER, ANSWER])
