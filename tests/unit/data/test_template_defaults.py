"""Default values of a chat template's variables: rendering and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from align.data.chat import encode_prompt, prepare_chat_template
from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from tests.chat_templates import SHAPES, Shape, tokenizer_for

USER = {"role": "user", "content": "a"}
NO_THINKING = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
THINKING = NO_THINKING.removesuffix("<think>\n\n</think>\n\n")


def prompt_of(tokenizer: Any, **variables: Any) -> str:
    return str(tokenizer.decode(encode_prompt(tokenizer, [USER], variables)))


def test_a_default_holds_unless_a_row_sets_the_variable(tmp_path: Any) -> None:
    tokenizer = tokenizer_for(SHAPES["qwen3"])
    assert prompt_of(tokenizer) == THINKING
    set_template_defaults(tokenizer, {"enable_thinking": False}, "here")
    assert prompt_of(tokenizer) == NO_THINKING
    assert prompt_of(tokenizer, enable_thinking=True) == THINKING
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert not prepare_chat_template(loaded)
    assert prompt_of(loaded) == NO_THINKING


def test_later_defaults_replace_earlier_ones() -> None:
    tokenizer = tokenizer_for(SHAPES["hy3"])
    for effort in ("low", "high"):
        set_template_defaults(tokenizer, {"reasoning_effort": effort}, "here")
        assert f"\nreasoning_effort: {effort}<|extra_4|>" in prompt_of(tokenizer)


@pytest.mark.parametrize("value", [None, True, 1.5, 'a "b"\n{{ c }} %}\u00e9', ["x", {"y": False, "z": None}]])
def test_values_of_any_type_reach_the_template_exactly(value: Any) -> None:
    tokenizer = tokenizer_for(Shape("{{ v | tojson }}|{{ v == other }}", "<e>"))
    set_template_defaults(tokenizer, {"v": value}, "here")
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, other=value)
    expected = tokenizer.apply_chat_template([USER], tokenize=False, v=value, other=value)
    assert rendered == expected
    assert rendered.endswith("|True")


@pytest.mark.parametrize(
    ("name", "problem"), [("enable_thinkin", "does not read 'enable_thinkin'"), ("messages", "an argument of the")]
)
def test_a_variable_that_the_template_does_not_read_is_refused(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{problem}"):
        set_template_defaults(tokenizer_for(SHAPES["qwen3"]), {name: 1}, "here")


def test_the_recipes_model_keeps_its_variables(tmp_path: Any) -> None:
    from align.config.parts import PretrainedModel
    from align.recipes.base import _change_template

    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer_for(SHAPES["qwen3"]).save_pretrained(source)
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    values = {"enable_thinking": False}
    _change_template(target, PretrainedModel(kind="pretrained", path=str(source), chat_template_kwargs=values))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert prompt_of(AutoTokenizer.from_pretrained(target)) == NO_THINKING
