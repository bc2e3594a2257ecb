"""Chat templates: masks counted by hand, identity with published templates, errors."""

from __future__ import annotations

import copy

import pytest

from align.data import chat
from align.data.shapes import DropRow
from align.data.tokenizer import train_tokenizer
from align.errors import UserError

# The template in the tokenizer of SmolLM2-135M-Instruct.
PUBLISHED_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_mask_counted_by_hand(tokenizer):
    ((ids, mask),) = chat.ConversationEncoder(tokenizer).rows(TALK)
    # <|im_start|> u s e r \n a <|im_end|> \n = 9; <|im_start|> a s s i s t a n t \n = 11; answer, its end; \n
    assert mask == [0] * 20 + [1, 1, 1] + [0] + [0] * 20 + [1, 1] + [0]
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbc<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\ne<|im_end|>\n"
    )
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "bc<|im_end|>e<|im_end|>"


def test_prompt_is_a_prefix_and_strings_are_user_turns(tokenizer):
    prompt = chat.encode_prompt(tokenizer, TALK[:1])
    assert tokenizer.decode(prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert chat.encode_messages(tokenizer, TALK)[: len(prompt)] == prompt
    assert chat.encode_prompt(tokenizer, "a") == prompt


@pytest.mark.parametrize(
    ("published", "ours"), [(PUBLISHED_SMOLLM2, chat.SMOLLM2_TEMPLATE), (PLAIN_CHATML, chat.DEFAULT_TEMPLATE)]
)
def test_published_chatml_is_replaced_by_an_identical_one(tokenizer, published, ours):
    old, new = with_template(tokenizer, published), with_template(tokenizer, published)
    assert chat.prepare_chat_template(new)
    assert new.chat_template == ours
    odd = [[{"role": "system", "content": 'it\'s \\n "odd"\n'}, *TALK], TALK, TALK[:1], TALK[:3]]
    for messages in odd:
        for generation in (False, True):
            options = {"tokenize": False, "add_generation_prompt": generation}
            assert old.apply_chat_template(messages, **options) == new.apply_chat_template(messages, **options)
    chat.check_template(new)


def test_default_system_with_quotes_is_carried_over(tokenizer):
    published = PUBLISHED_SMOLLM2.replace("You are a helpful AI assistant named SmolLM", "It\\'s \\\\ me\\nhere")
    new = with_template(tokenizer, published)
    before = new.apply_chat_template(TALK, tokenize=False)
    assert "It's \\ me\nhere, trained" in before
    assert chat.prepare_chat_template(new)
    assert new.apply_chat_template(TALK, tokenize=False) == before


def test_the_default_system_turn_can_be_replaced_or_left_out(tokenizer):
    user = TALK[:1] if TALK[0]["role"] == "user" else TALK[1:2]
    new = with_template(tokenizer, PUBLISHED_SMOLLM2)
    assert "named SmolLM" in new.apply_chat_template(user, tokenize=False)
    chat.set_system_prompt(new, "Say it's short.")
    assert new.apply_chat_template(user, tokenize=False).startswith("<|im_start|>system\nSay it's short.<|im_end|>\n")
    chat.check_template(new)
    chat.set_system_prompt(new, "")
    assert new.apply_chat_template(user, tokenize=False).startswith("<|im_start|>user")
    other = with_template(tokenizer, "{{ messages[0].content }}")
    with pytest.raises(UserError, match="not ChatML"):
        chat.set_system_prompt(other, "")


@pytest.mark.parametrize(
    "template",
    [
        PLAIN_CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),  # differs only if content has outer spaces
        PLAIN_CHATML.replace("{% if add", "{# tools #}{% if add"),
        chat.DEFAULT_TEMPLATE,
    ],
)
def test_a_template_that_differs_or_needs_nothing_is_kept(tokenizer, template):
    other = with_template(tokenizer, template)
    assert not chat.prepare_chat_template(other)
    assert other.chat_template == template


def test_a_tokenizer_without_template_gets_one_if_it_knows_the_tokens(tokenizer):
    bare = with_template(tokenizer, None)
    assert chat.stop_token_ids(bare) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with pytest.raises(UserError, match="no chat template"):
        chat.encode_prompt(bare, "a")
    assert chat.prepare_chat_template(bare)
    assert bare.chat_template == chat.DEFAULT_TEMPLATE


def test_refusals(tokenizer):
    chat.check_template(tokenizer)
    marked = chat.DEFAULT_TEMPLATE
    never = marked.replace("{%- if message['role'] == 'assistant' -%}", "{%- if false -%}")
    with pytest.raises(UserError, match="no assistant tokens"):
        chat.check_template(with_template(tokenizer, never))
    outside = marked.replace(
        "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    assert outside != marked
    with pytest.raises(UserError, match="end-of-turn token"):
        chat.check_template(with_template(tokenizer, outside))
    # The header of the generation prompt differs from the one in training.
    thinking = marked.replace("{%- if add_generation_prompt -%}{{- '", "{%- if add_generation_prompt -%}{{- '<think>")
    with pytest.raises(UserError, match="beginning of an assistant turn"):
        chat.check_template(with_template(tokenizer, thinking))
    strict = marked.replace("@", "") + "{%- if messages|length > 3 -%}{{ raise_exception('too long') }}{%- endif -%}"
    with pytest.raises(DropRow, match="too long"):
        chat.encode_messages(with_template(tokenizer, strict), TALK)


def test_markers_are_kept_where_a_template_changes_earlier_turns(tokenizer):
    # It removes the first letter of an earlier turn, and marks all but the exclamation mark.
    text = "(message['content'] if loop.last else message['content'][1:])"
    marked = chat.DEFAULT_TEMPLATE.replace(
        "{%- generation -%}{{- message['content'] +", f"!{{%- generation -%}}{{{{- {text} +"
    )
    rewriting = with_template(tokenizer, marked)
    rows = chat.ConversationEncoder(rewriting).rows(TALK)
    assert [tokenizer.decode([i for i, m in zip(*row) if m]) for row in rows] == ["bc<|im_end|>", "e<|im_end|>"]
    assert tokenizer.decode(rows[1][0]).count("!c<|im_end|>") == 1


def test_stop_tokens_are_eos_and_end_of_turn(tokenizer):
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    assert chat.stop_token_ids(tokenizer) == [end]
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|pad|>"  # as in models whose end of text is not their end of turn
    assert chat.stop_token_ids(other) == [pad, end]


def test_trained_tokenizer_is_deterministic_and_lossless(tmp_path):
    texts = [
        "the cat sat on the mat\n\twith  spaces",
        "naïve café 你好 🙂",
        "def f(x):\n    return x ** 2",
    ] * 20
    one, two = train_tokenizer(texts, 320), train_tokenizer(texts, 320)
    assert one.get_vocab() == two.get_vocab()
    assert 259 < len(one) <= 320
    assert (one.pad_token_id, one.convert_tokens_to_ids("<|im_start|>"), one.eos_token_id) == (0, 1, 2)
    for text in [*texts[:3], "unseen: ÿ\x00 don't , stop ."]:
        assert one.decode(one(text)["input_ids"]) == text
    one.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert chat.ConversationEncoder(loaded).rows(TALK) == chat.ConversationEncoder(one).rows(TALK)
    assert loaded.decode(chat.encode_messages(one, TALK), skip_special_tokens=True).startswith("user\na\n")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([" "], 300)
