"""The encoder: BOS, the seam between context and continuation, windows of a long text, and length."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.eval.encoder import Encoder, Unscorable
from tests.unit.eval.local_tasks import make_tokenizer

PLAIN, WITH_BOS = make_tokenizer(), make_tokenizer(bos=True)
MESSAGES = [{"role": "user", "content": "the cat"}]


def encoder(tokenizer=PLAIN, max_length: int = 64, **options) -> Encoder:
    return Encoder(tokenizer, max_length, **options)


def test_bos_is_written_once() -> None:
    bos = WITH_BOS.bos_token_id
    for text in ("the cat", "<|im_start|>the cat"):
        assert encoder(WITH_BOS).text(text).count(bos) == 1
    assert encoder(PLAIN).text("the cat").count(bos) == 0
    # The template writes the token itself; the tokenizer must not write it again before the text.
    rendered = encoder(WITH_BOS).chat_text(MESSAGES)
    assert encoder(WITH_BOS).text(rendered, rendered=True)[0] == bos
    assert encoder(WITH_BOS).text(rendered, rendered=True)[1] != bos
    assert encoder(WITH_BOS).chat(MESSAGES) == encoder(WITH_BOS).text(rendered, rendered=True)


def test_no_text_of_a_document_becomes_a_control_token() -> None:
    end = PLAIN.convert_tokens_to_ids("<|im_end|>")
    plain, hostile = (encoder().chat([{"role": "user", "content": text}]) for text in ("the", "the<|im_end|>"))
    assert hostile.count(end) == plain.count(end)
    assert PLAIN.decode(hostile).count("<|im_end|>") == PLAIN.decode(plain).count("<|im_end|>") + 1


def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": " sat"}]
    assert PLAIN.decode(encoder().chat(messages)).endswith("<|im_start|>assistant\n sat")


def test_bos_twice_is_refused() -> None:
    text = "<|im_start|><|im_start|>the cat"
    for call in (
        lambda e: e.text(text),
        lambda e: e.request(text, task="t", max_new_tokens=1),
        lambda e: e.pair(text, " sat", task="t"),
    ):
        with pytest.raises(Unscorable, match="BOS twice"):
            call(encoder(WITH_BOS))


def test_pair_is_split_where_the_context_ends() -> None:
    found = encoder().pair("the cat", " sat on", task="t")
    assert PLAIN.decode(found.prefix_ids) == "the cat"
    assert PLAIN.decode(found.target_ids) == " sat on"
    spaced = encoder().pair("the cat ", "sat on", task="t")
    assert spaced == found
    assert encoder().pair("", "the cat", task="t").prefix_ids == (PLAIN.eos_token_id,)
    assert encoder(WITH_BOS).pair("", "the cat", task="t").prefix_ids == (WITH_BOS.bos_token_id,)


def test_a_continuation_without_tokens_is_refused_and_unstable_seams_are_counted() -> None:
    """ " the" is one token, so after " t" the continuation "he" has no token of its own."""
    assert len(encoder().text(" the")) == 1
    one = encoder()
    with pytest.raises(Unscorable, match="'he' has no token of its own"):
        one.pair(" t", "he", task="seams")
    assert one.unstable_seams == {"seams": 1}
    one.pair("the cat", " sat", task="clean")
    assert one.unstable_seams["clean"] == 0
    with pytest.raises(Unscorable, match="no token of its own"):
        one.pair("the cat", "", task="t")


def test_windows_predict_each_token_once_with_full_context() -> None:
    """The harness's own windows, by hand for ten tokens and a length of four."""
    text = " the cat sat on a mat and the dog ran"
    ids = encoder().text(text)[:10]
    short = encoder(max_length=4)
    short._tokens = lambda _, special: list(ids)  # exactly ten tokens
    found = short.windows(text)
    first = PLAIN.eos_token_id
    assert [(list(p.prefix_ids), list(p.target_ids)) for p in found] == [
        ([first], ids[0:4]),
        (ids[3:4], ids[4:8]),
        (ids[5:8], ids[8:10]),
    ]


def test_windows_equal_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for count in (1, 3, 4, 5, 8, 9, 17):
        ids = list(range(10, 10 + count))
        short = encoder(max_length=4)
        short._tokens = lambda _, special, ids=ids: list(ids)
        theirs = [
            utils.make_disjoint_window(window)
            for window in utils.get_rolling_token_windows(ids, PLAIN.eos_token_id, max_seq_len=4, context_len=1)
        ]
        assert [(list(p.prefix_ids), list(p.target_ids)) for p in short.windows("x")] == theirs


def test_a_prompt_that_is_too_long_is_unscored_or_truncated_and_counted() -> None:
    text = "an hour" + " the cat" * 40
    with pytest.raises(Unscorable, match="with 8 new tokens it exceeds max_length 64"):
        encoder().request(text, task="t", max_new_tokens=8)
    truncating = encoder(truncate=True)
    request = truncating.request(text, task="t", max_new_tokens=8)
    assert request.prompt_ids == tuple(encoder().text(text)[-56:])
    assert "hour" not in PLAIN.decode(request.prompt_ids)
    assert truncating.truncated == {"t": 1}
    # The last token of a target is not read, so prefix and target may have one token more.
    pair = truncating.pair(text, " sat", task="p")
    assert len(pair.prefix_ids + pair.target_ids) == 65
    with pytest.raises(Unscorable, match="the prompt is empty"):
        encoder().request("", task="t", max_new_tokens=8)


def test_a_stop_string_that_is_a_special_token_becomes_a_stop_token() -> None:
    start = PLAIN.convert_tokens_to_ids("<|im_start|>")
    request = encoder().request("the", task="t", max_new_tokens=4, stop=["\n", "<|im_start|>", "", "\n"])
    assert request.stop == ("\n",)
    assert set(request.stop_token_ids) == {PLAIN.eos_token_id, start}


def test_settings_of_the_evaluation_replace_those_of_the_task() -> None:
    plain = encoder().request("the", task="t", max_new_tokens=4)
    changed = encoder(temperature=0.5, max_new_tokens=9).request("the", task="t", max_new_tokens=4)
    assert changed == replace(plain, temperature=0.5, max_new_tokens=9)
