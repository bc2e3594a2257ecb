"""Training rows of conversations with the chat templates of many families, against texts written by hand."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest

from align.config.parts import Data, FileSource
from align.data import chat, prepare
from align.data.shapes import DropRow, to_messages
from align.data.templates import ChatTemplate
from align.data.tokenizer import train_tokenizer
from tests.chat_templates import SHAPES, tokenizer_for

from .conftest import turn

TALK = [turn("user", "a"), turn("assistant", "bc"), turn("user", "d"), turn("assistant", "e")]
CALL = {"type": "function", "id": "abcdef012", "function": {"name": "add", "arguments": {"x": 1, "y": "z"}}}
TOOL_TALK = [
    turn("user", "a"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "abcdef012", "content": "res"},
    turn("assistant", "bc"),
    turn("user", "d"),
    turn("assistant", "e"),
]


def reasoned(talk: list[dict]) -> list[dict]:
    """The conversation with a reasoning r1, r2, ... in each assistant turn."""
    numbers = iter(range(1, 10))
    return [{**m, "reasoning_content": f"r{next(numbers)}"} if m["role"] == "assistant" else m for m in talk]


IN_CONTENT = [
    turn("user", "a"),
    turn("assistant", "<think>\nr1\n</think>\n<answer>\nbc\n</answer>"),
    turn("user", "d"),
    turn("assistant", "<think>\nr2\n</think>\n<answer>\ne\n</answer>"),
]
R1_TALK = [
    turn("user", "a"),
    turn("assistant", "<think>\nr1\n</think>\nbc"),
    turn("user", "d"),
    turn("assistant", "<think>\nr2\n</think>\ne"),
]
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "z"}}\n</tool_call><|im_end|>'
HY3_CALL = "<tool_call>add<arg_key>x</arg_key><arg_value>1</arg_value><arg_key>y</arg_key><arg_value>z</arg_value>"
GLM_CALL = (
    "<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>y</arg_key>\n<arg_value>z</arg_value>"
)
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
MORE = "<|end|><|start|>assistant"
OSS_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"x": 1, "y": "z"}<|call|>'

# For each template and conversation: the rows, and in each row what the assistant generates.
EXPECTED: list[tuple[str, list[dict], list[list[str]]]] = [
    ("chatml", TALK, [["bc<|im_end|>", "e<|im_end|>"]]),
    ("qwen2_5", TALK, [["bc<|im_end|>", "e<|im_end|>"]]),
    ("qwen2_5", TOOL_TALK, [[QWEN_CALL, "bc<|im_end|>", "e<|im_end|>"]]),
    ("qwen3", TALK, [["<think>\n\n</think>\n\nbc<|im_end|>"], ["<think>\n\n</think>\n\ne<|im_end|>"]]),
    (
        "qwen3",
        reasoned(TOOL_TALK),
        [
            ["<think>\nr1\n</think>\n\n" + QWEN_CALL, "<think>\nr2\n</think>\n\nbc<|im_end|>"],
            ["<think>\nr3\n</think>\n\ne<|im_end|>"],
        ],
    ),
    ("llama3", TALK, [["bc<|eot_id|>", "e<|eot_id|>"]]),
    (
        "llama3_2",
        TOOL_TALK,
        [['{"name": "add", "parameters": {"x": 1, "y": "z"}}<|eot_id|>', "bc<|eot_id|>", "e<|eot_id|>"]],
    ),
    ("mistral", TALK, [[" bc</s>", " e</s>"]]),
    # The system message moves to the last user turn.
    ("mistral", [turn("system", "s"), *TALK], [[" bc</s>"], [" e</s>"]]),
    (
        "mistral",
        TOOL_TALK,
        [
            [
                '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1, "y": "z"}, "id": "abcdef012"}]</s>',
                " bc</s>",
                " e</s>",
            ]
        ],
    ),
    ("gemma", TALK, [["bc<end_of_turn>", "e<end_of_turn>"]]),
    ("gemma3", [turn("system", "s"), *TALK], [["bc<end_of_turn>", "e<end_of_turn>"]]),
    ("phi3", TALK, [["bc<|end|>", "e<|end|>"]]),
    ("glm4moe", TALK, [["\n<think></think>\nbc<|user|>", "\n<think></think>\ne<|user|>"]]),
    (
        "glm4moe",
        reasoned(TOOL_TALK),
        [
            [f"\n<think>r1</think>\n{GLM_CALL}\n</tool_call><|observation|>", "\n<think>r2</think>\nbc<|user|>"],
            ["\n<think>r3</think>\ne<|user|>"],
        ],
    ),
    ("gptoss", TALK, [[f"{FINAL}bc<|return|>"], [f"{FINAL}e<|return|>"]]),
    # The analysis before the call leaves the conversation once an answer follows, but it was there when that answer
    # was generated.
    (
        "gptoss",
        reasoned(TOOL_TALK),
        [
            [f"{ANALYSIS}r1{MORE}{OSS_CALL}", f"{ANALYSIS}r2{MORE}{FINAL}bc<|return|>"],
            [f"{ANALYSIS}r3{MORE}{FINAL}e<|return|>"],
        ],
    ),
    ("deepseek_r1_distill", R1_TALK, [[f"r{n}\n</think>\n{x}<｜end▁of▁sentence｜>" for n, x in ((1, "bc"), (2, "e"))]]),
    ("hunyuan_v1", TALK, [["bc<|eos|>", "e<|eos|>"]]),
    ("hunyuan_v1", IN_CONTENT, [[IN_CONTENT[1]["content"] + "<|eos|>"], [IN_CONTENT[3]["content"] + "<|eos|>"]]),
    ("hy3", reasoned(TALK), [["<think>r1</think>bc<|eos|>"], ["<think>r2</think>e<|eos|>"]]),
    (
        "hy3",
        reasoned(TOOL_TALK),
        [
            [f"<think>r1</think>{HY3_CALL}</tool_call><|eos|>", "<think>r2</think>bc<|eos|>"],
            ["<think>r3</think>e<|eos|>"],
        ],
    ),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    made = {name: tokenizer_for(shape) for name, shape in SHAPES.items()}
    for made_one in made.values():
        chat.prepare_chat_template(made_one)
    return made


def segments(mask: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones."""
    runs = [list(run) for marked, run in groupby(range(len(mask)), key=lambda t: mask[t]) if marked]
    return [(run[0], run[-1] + 1) for run in runs]


def names(case: Any) -> str:
    return case if isinstance(case, str) else ""


@pytest.mark.parametrize(("name", "talk", "expected"), EXPECTED, ids=names)
def test_the_loss_is_on_what_the_assistant_generates_after_the_prompt_of_its_generation(
    tokenizers, name, talk, expected
):
    tokenizer = tokenizers[name]
    messages = to_messages(talk, "user")
    rows = chat.ConversationEncoder(tokenizer).rows(messages)
    found = [[tokenizer.decode(ids[start:end]) for start, end in segments(mask)] for ids, mask in rows]
    assert found == expected
    contexts = [ids[:start] for ids, mask in rows for start, _ in segments(mask)]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert contexts == [chat.encode_prompt(tokenizer, messages[:number]) for number in turns]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "deepseekv3"])
def test_each_template_can_be_trained_on(tokenizers, name):
    chat.check_template(tokenizers[name])


def test_every_template_is_in_the_table(tokenizers):
    assert {name for name, *_ in EXPECTED} == set(SHAPES) - {"deepseekv3"}


def test_only_two_templates_are_replaced():
    replaced = {name for name, shape in SHAPES.items() if chat.prepare_chat_template(tokenizer_for(shape))}
    assert replaced == {"chatml", "deepseek_r1_distill"}


def test_a_template_that_removes_the_reasoning_after_its_header_is_refused(tokenizers):
    assert "generation prompt is the beginning" in str(chat.template_problem(tokenizers["deepseekv3"]))


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", ["<|im_end|>"]),
        ("qwen3", ["<|im_end|>"]),
        ("llama3_2", ["<|eot_id|>"]),
        ("gemma3", ["<eos>", "<end_of_turn>"]),
        ("phi3", ["<|endoftext|>", "<|end|>"]),
        ("glm4moe", ["<|endoftext|>", "<|user|>", "<|observation|>"]),
        ("gptoss", ["<|return|>", "<|call|>"]),
        ("mistral", ["</s>"]),
        ("deepseekv3", ["<｜end▁of▁sentence｜>"]),
        ("hy3", ["<|eos|>"]),
    ],
)
def test_stop_tokens(tokenizers, name, ends):
    tokenizer = tokenizers[name]
    assert [tokenizer.decode([token]) for token in chat.stop_token_ids(tokenizer)] == ends
    assert tokenizer.decode([chat.end_of_turn_id(tokenizer)]) == (
        ends[1] if len(ends) > 1 and name != "gptoss" else ends[0]
    )


def test_a_pad_token_equal_to_eos_leaves_the_end_of_turn_in_the_loss():
    tokenizer = tokenizer_for(SHAPES["qwen2_5"])
    tokenizer.pad_token = tokenizer.eos_token
    ((ids, mask),) = chat.ConversationEncoder(tokenizer).rows(TALK)
    assert sum(m and i == tokenizer.eos_token_id for i, m in zip(ids, mask)) == 2
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("name", "talk", "reason"),
    [
        ("llama3", TOOL_TALK, "does not render tool calls"),
        ("phi3", [turn("user", "a"), turn("tool", "b"), turn("assistant", "c")], "does not render tool results"),
        ("qwen2_5", reasoned(TALK), "does not render reasoning_content"),
        ("gemma", [turn("system", "s"), *TALK], "System role not supported"),
        ("gemma", [turn("user", "a"), turn("user", "b"), turn("assistant", "c")], "must alternate"),
        ("deepseek_r1_distill", TALK, "renders a prompt differently"),
    ],
    ids=names,
)
def test_rows_that_cannot_be_rendered_faithfully_are_dropped(tokenizers, name, talk, reason):
    with pytest.raises(DropRow, match=reason):
        chat.ConversationEncoder(tokenizers[name]).rows(to_messages(talk, "user"))


@pytest.mark.parametrize(
    ("arguments", "same"),
    [('{"x": 1, "y": "z"}', True), ('{"x":1,"y":"z"}', True), ({"x": 1, "y": "z", "w": None}, False), ("{}", False)],
)
def test_arguments_of_tool_calls_may_be_objects_or_json_text(tokenizers, arguments, same):
    for name in ("qwen3", "llama3_2", "mistral", "hy3", "deepseekv3"):
        talks = []
        for value in (arguments, {"x": 1, "y": "z"}):
            call = {**CALL, "function": {"name": "add", "arguments": value}}
            talk = [TOOL_TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
            talks.append(chat.encode_messages(tokenizers[name], to_messages(talk, "user")))
        assert (talks[0] == talks[1]) == same


@pytest.mark.parametrize("calls", [["add"], [{"function": {"arguments": "{}"}}], [{"name": "add", "arguments": "{x"}]])
def test_damaged_tool_calls(calls):
    with pytest.raises(DropRow, match="tool call"):
        to_messages([turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": calls}], "user")


def test_template_variables_reach_the_template(tokenizers):
    qwen3, hy3 = (chat.ConversationEncoder(tokenizers[name]) for name in ("qwen3", "hy3"))
    ((ids, mask),) = qwen3.rows(TALK[:2], {"enable_thinking": False})
    ((start, end),) = segments(mask)
    assert tokenizers["qwen3"].decode(ids[start:end]) == "bc<|im_end|>"
    assert ids[:start] == qwen3.prompt(TALK[:1], {"enable_thinking": False})
    text = tokenizers["hy3"].decode(hy3.prompt(TALK[:1], {"reasoning_effort": "high"}))
    assert "reasoning_effort: high" in text
    assert text.endswith("<|extra_7|>")
    assert tokenizers["hy3"].decode(hy3.prompt(TALK[:1], {"reasoning_effort": "no_think"})).endswith("</think>")
    with pytest.raises(DropRow, match="does not read enable_thinkng"):
        qwen3.rows(TALK, {"enable_thinkng": False})


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "qwen3", "glm4moe", "gptoss", "mistral"])
def test_a_turn_of_weight_0_is_context_only(tokenizers, name):
    tokenizer = tokenizers[name]
    encoder = chat.ConversationEncoder(tokenizer)
    for weights in ((1, 0), (0, 1), (False, True), (0.0, 1.0), (0, 0)):
        talk = [dict(message) for message in TALK]
        talk[1]["train"], talk[3]["train"] = weights
        texts = [tokenizer.decode(ids[a:b]) for ids, mask in encoder.rows(talk) for a, b in segments(mask)]
        every = [tokenizer.decode(ids[a:b]) for ids, mask in encoder.rows(TALK) for a, b in segments(mask)]
        assert texts == [text for text, weight in zip(every, weights) if weight]
    with pytest.raises(DropRow, match="neither 0 nor 1"):
        encoder.rows([{**message, "train": 0.5} for message in TALK])


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "mistral", "phi3"])
def test_only_the_assistants_turns_of_an_answer_are_in_its_mask(tokenizers, name):
    tokenizer = tokenizers[name]
    answer = chat.ConversationEncoder(tokenizer).answer(TALK[:1], TALK[1:])
    texts = [tokenizer.decode(answer.ids[start:end]) for start, end in segments(answer.mask)]
    alone = [chat.ConversationEncoder(tokenizer).answer(TALK[:n], TALK[n : n + 1]).ids for n in (1, 3)]
    assert texts == [tokenizer.decode(ids) for ids in alone]
    assert answer.prompt == chat.encode_prompt(tokenizer, "a")
    assert len(answer.mask) == len(answer.ids)
    assert answer.mask[-1] == 1
    with pytest.raises(DropRow, match="end with an assistant turn"):
        chat.ConversationEncoder(tokenizer).answer(TALK[:1], TALK[1:3])


def test_an_answer_whose_start_merges_with_its_prompt_is_tokenised_apart():
    tokenizer = train_tokenizer(["a\n\n b"] * 9, 280)
    merged = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert merged in tokenizer("a\n\n b")["input_ids"]
    talk = [turn("user", "a"), turn("assistant", "\n b"), turn("user", "c"), turn("assistant", "d")]
    rows = chat.ConversationEncoder(tokenizer).rows(talk)
    assert [tokenizer.decode([i for i, kept in zip(*row) if kept]) for row in rows] == ["\n b<|im_end|>", "d<|im_end|>"]
    assert [merged in ids for ids, _ in rows] == [False, True]
    for (ids, mask), number in zip(rows, (1, 3)):
        assert ids[: mask.index(1)] == chat.encode_prompt(tokenizer, talk[:number])
    answer = chat.ConversationEncoder(tokenizer).answer(talk[:1], talk[1:2])
    assert (answer.prompt, tokenizer.decode(answer.ids)) == (chat.encode_prompt(tokenizer, "a"), "\n b<|im_end|>")


def test_many_conversations_in_one_call(tokenizers):
    for name in ("chatml", "qwen3", "gptoss"):
        encoder = chat.ConversationEncoder(tokenizers[name])
        talks = [TALK, [turn("user", "a<|im_end|><|end|>"), turn("assistant", "b")], TALK[:1], TALK[:2]]
        variables = [{}, None, {}, {"no_such": 1}]
        found = encoder.rows_of([chat.Conversation(*both) for both in zip(talks, variables)])
        assert found[:3] == [encoder.rows(talk) for talk in talks[:3]]
        assert str(found[3]) == "the chat template does not read no_such"
        assert encoder.escaped == 2
        assert encoder.prompts_of([chat.Conversation(talk) for talk in talks]) == [
            chat.encode_prompt(tokenizers[name], talk) for talk in talks
        ]
        assert encoder.answers_of([(TALK[:1], TALK[1:2], None)]) == [encoder.answer(TALK[:1], TALK[1:2])]
        whole = [chat.encode_messages(tokenizers[name], talk) for talk in talks]
        assert encoder.whole_of([chat.Conversation(talk) for talk in talks]) == whole


# --- whole data sets --------------------------------------------------------------------------------------


def source(path: str) -> list[Any]:
    return [FileSource(path=path)]


def test_a_conversation_becomes_several_rows_in_one_split(tokenizers, jsonl):
    talks = [[turn("user", f"q{n}"), *TALK[1:]] for n in range(12)]
    data = Data(train=source(jsonl([{"messages": talk} for talk in talks])), max_length=400, held_out_fraction=0.4)
    done = prepare.prepare_sft(data, tokenizers["qwen3"], assistant_only_loss=True, seed=1)
    assert done.held_out is not None
    assert (done.report.rows_read, done.report.split) == (12, 12)
    assert len(done.train) + len(done.held_out) == done.report.rows_train + done.report.rows_held_out == 24
    assert "12 conversations trained as several rows" in done.report.summary()
    sides = []
    for rows in (done.train, done.held_out):
        texts = [tokenizers["qwen3"].decode(row["input_ids"]) for row in rows]
        sides.append({text.split("user\n")[1].split("<")[0] for text in texts})
        assert len(texts) == 2 * len(sides[-1])
    assert not sides[0] & sides[1]
    kept = prepare.prepare_sft(data, tokenizers["qwen2_5"], assistant_only_loss=True, seed=1)
    assert (kept.report.split, kept.report.rows_train + kept.report.rows_held_out) == (0, 12)


def test_columns_for_the_template_and_arguments_of_any_type(tokenizers, jsonl):
    rows = []
    # Arrow cannot mix these in one column.
    for value, types in ((1, "int"), ("one", ["int", "string"]), ([1, 2], {"any": 1}), (None, "null")):
        tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"x": types}}}}]
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": value}}}
        talk = [turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        rows.append({"messages": talk, "tools": tools, "chat_template_kwargs": {"enable_thinking": value == 1}})
    data = Data(train=source(jsonl(rows)), max_length=2000)
    done = prepare.prepare_sft(data, tokenizers["qwen3"], assistant_only_loss=True, seed=1)
    assert done.report.dropped == {}
    texts = sorted(tokenizers["qwen3"].decode(row["input_ids"]) for row in done.train)
    for value in ('{"x": 1}', '{"x": "one"}', '{"x": [1, 2]}', '{"x": null}'):
        assert any(f'"arguments": {value}}}' in text for text in texts)
    assert all('<tools>\n{"type": "function", "function": {"name": "add"' in text for text in texts)
    trained = [[i for i in row["labels"] if i != -100] for row in done.train]
    assert sum(tokenizers["qwen3"].decode(ids).startswith("<think>") for ids in trained) == 1


def test_objects_for_the_template_keep_exactly_their_keys(tokenizers, jsonl):
    """Arrow gives all objects of a column the same keys, so a key with null could not be told from a missing one."""
    rows = []
    for parameters in ({"a": None}, {"b": 1}):
        tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
        rows.append({"messages": TALK[:2], "tools": tools})
    data = Data(train=source(jsonl(rows)), max_length=2000)
    done = prepare.prepare_sft(data, tokenizers["qwen3"], assistant_only_loss=True, seed=1)
    texts = [tokenizers["qwen3"].decode(row["input_ids"]) for row in done.train]
    found = sorted(text.partition('"parameters": ')[2].partition("}}")[0] for text in texts)
    assert found == ['{"a": null', '{"b": 1']


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"chat_template_kwargs": '{"enable'}, "chat_template_kwargs is not valid JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs must not set tokenize"),
        ({"chat_template_kwargs": {"no_such": 1}}, "the chat template does not read no_such"),
        ({"tools": {"name": "add"}}, "tools is not a list of objects"),
    ],
)
def test_bad_columns_are_counted(tokenizers, jsonl, columns, reason):
    good = {"messages": TALK, **dict.fromkeys(columns)}
    data = Data(train=source(jsonl([{"messages": TALK, **columns}, good])), max_length=400)
    done = prepare.prepare_sft(data, tokenizers["qwen3"], assistant_only_loss=True, seed=1)
    assert done.report.dropped == {reason: 1}


def test_pairs_end_with_the_token_that_ends_a_sample(tokenizers, jsonl):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    endings = {}
    for name in ("phi3", "gptoss", "glm4moe", "qwen3", "mistral"):
        tokenizer = tokenizers[name]
        data = Data(train=source(jsonl(rows)), max_length=1000)
        (row,) = prepare.prepare_dpo_pairs(data, tokenizer, seed=1).train
        assert row["prompt_ids"] == chat.encode_prompt(tokenizer, "a")
        endings[name] = tokenizer.decode(row["chosen_ids"])
        (scored,) = prepare.prepare_reward_pairs(data, tokenizer, seed=1).train
        assert scored["chosen_ids"] == row["prompt_ids"] + row["chosen_ids"]
        assert row["chosen_ids"][-1] == chat.end_of_turn_id(tokenizer)
    assert endings == {
        "phi3": "b<|end|>",
        "gptoss": "<|channel|>final<|message|>b<|return|>",
        "glm4moe": "\n<think></think>\nb<|user|>",
        "qwen3": "<think>\n\n</think>\n\nb<|im_end|>",
        "mistral": " b</s>",
    }


def test_prompts_for_sampling_are_the_prompts_of_training(tokenizers, jsonl):
    kwargs = json.dumps({"enable_thinking": False})
    path = jsonl([{"messages": [*TALK[:3], turn("assistant", "e")], "chat_template_kwargs": kwargs}])
    for name in ("qwen3", "hunyuan_v1"):
        tokenizer = tokenizers[name]
        data = Data(train=source(path), max_length=400)
        ((prompt,), _) = prepare.prepare_prompts(source(path), tokenizer, max_prompt_length=400, seed=1)
        rows = prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=1).train
        last = max(rows, key=lambda row: len(row["input_ids"]))
        start = segments([label != -100 for label in last["labels"]])[-1][0]
        assert list(prompt.ids) == last["input_ids"][:start]
        assert prompt.variables == {"enable_thinking": False}


def test_a_template_whose_turns_end_without_a_special_token_has_no_end(tokenizers):
    tokenizer = tokenizer_for(SHAPES["chatml"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    assert ChatTemplate(tokenizer).ends == (None, None, False)
    assert "learn to stop" in str(chat.template_problem(tokenizer))
