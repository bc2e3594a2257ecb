"""Faults of answers, personal data and languages, on texts with and without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from align.data.filters import quality
from align.data.filters.language import language_of, with_members
from align.data.filters.personal import personal_data
from align.errors import UserError

LONG = "The first sentence is complete. The second one is complete too. Here is a third. " * 3

FAULTY: list[tuple[Callable[[str], bool], str]] = [
    (quality.garbled, "caf\ufffd"),
    (quality.garbled, "cafÃ© crème"),
    (quality.garbled, "itâ€™s"),
    (quality.garbled, "a\x00b"),
    (quality.truncated, LONG + "And this one stops in the middle of the"),
    (quality.truncated, LONG + "\n```python\nprint(1)"),
    (
        quality.truncated,
        "第一句话说完了。 第二句话也说完了。 " * 12
        + "这一句话很长很长但是没有说完，因为模型的输出在这里被突然截断了并且没有任何标点符号，所以不是完整的句子",
    ),
    (quality.broken_markdown, "```python\nprint(1)\n"),
    (quality.broken_markdown, "````\n```\n"),
    (quality.broken_markdown, "| a | b |\n|---|---|\n| 1 |\n"),
    (quality.broken_markdown, "| a | b | c |\n|---|---|\n| 1 | 2 |\n"),
    (quality.broken_json, "```json\n{'a': 1}\n```"),
    (quality.broken_json, '{"a": 1,}'),
    (quality.refuses, "I'm sorry, but I can't help with that."),
    (quality.refuses, "I'm sorry to hear that you feel this way, but I'm unable to help."),
    (quality.refuses, "I'm sorry, but your request cannot be answered."),
    (quality.broken_markdown, "- ```py\n  x = 1\n- next"),
    (quality.broken_markdown, "10. run\n    ```sh\n    ls"),
    (quality.refuses, "I’m afraid I cannot do this."),
    (quality.refuses, "As an AI language model, I do not have feelings."),
    (quality.refuses, "Unfortunately, I am not able to provide that."),
    (quality.refuses, "I cannot assist with that request."),
    (quality.refuses, "很抱歉，我无法回答这个问题。"),
    (quality.refuses, "作为一个人工智能语言模型，我不能提供这些信息。"),
]
SOUND: list[tuple[Callable[[str], bool], str]] = [
    (quality.garbled, "Café, naïve – “quoted” … 你好 Ãngström\tend\n"),
    (quality.truncated, LONG),
    (quality.truncated, LONG + "\n- an item without a full stop that is longer than forty characters"),
    (quality.truncated, LONG + "\n```python\nprint(1)\n```"),
    (quality.truncated, "short and without an end"),
    (quality.broken_markdown, "```python\nprint('```')\n```\nand `inline ``` code`\n"),
    (quality.broken_markdown, "````\n```\n````\n"),
    (quality.broken_markdown, "| a | b |\n|:--|--:|\n| 1 | x \\| y |\n\nAfter | it"),
    (quality.broken_markdown, "a | b\n--|--\n1 | 2\n"),
    (quality.broken_json, '```json\n{"a": [1, 2]}\n```'),
    (quality.broken_json, "{x | x > 2}"),
    (quality.refuses, "You can't divide by zero, sorry."),
    (quality.refuses, "I'm sorry to hear that you can't sleep. Avoid coffee in the evening."),
    (quality.refuses, "I can't help but smile at this."),
    (quality.broken_markdown, "- ```py\n  x = 1\n  ```\n- next"),
    (quality.broken_markdown, "10. ```sh\n    ls\n    ```"),
    (quality.refuses, "Sorry to hear that! Here is what you can do."),
    (quality.refuses, "I am able to help."),
    (quality.refuses, "抱歉让您久等了，答案是四。"),
]


@pytest.mark.parametrize(("fault", "answer"), FAULTY)
def test_a_fault_is_found(fault: Callable[[str], bool], answer: str) -> None:
    assert fault(answer)


@pytest.mark.parametrize(("fault", "answer"), SOUND)
def test_a_sound_answer_is_kept(fault: Callable[[str], bool], answer: str) -> None:
    assert not fault(answer)


def test_the_repeated_share_by_hand() -> None:
    # Ten words twice: 16 5-grams, of which the last 6 begin a run that occurred before.
    ten = "one two three four five six seven eight nine ten"
    assert quality.repeated_share(f"{ten} {ten}") == pytest.approx(6 / 16)
    assert quality.repeated_share(ten) == 0.0
    assert quality.repeated_share("") == 0.0
    # Twenty characters twice: 31 10-grams, of which 11 are repeated.
    twenty = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少"
    assert quality.repeated_share(twenty * 2) == pytest.approx(11 / 31)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "Write to jane.doe@uni-bonn.de today"),
        ("phone", "Call +49 228 731 234 now"),
        ("phone", "(202) 456-1111"),
        ("phone", "电话：13800138000。"),
        ("credit_card", "4111 1111 1111 1111"),
        ("iban", "GB82 WEST 1234 5698 7654 32"),
        ("us_ssn", "859-56-0028"),
        ("cn_resident_id", "11010519491231002X"),
        ("ip_address", "at 8.8.4.4:80"),
    ],
)
def test_personal_data_is_found(kind: str, text: str) -> None:
    assert personal_data(text, [kind]) == kind  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "name@example.com"),
        ("phone", "555-0100 and (202) 555-0143; 1234567890 items"),
        ("credit_card", "4111 1111 1111 1112"),
        ("credit_card", "0000 0000 0000 0000"),
        ("iban", "GB82 WEST 1234 5698 7654 33"),
        ("us_ssn", "000-56-0028 and 2020-11-2934"),
        ("cn_resident_id", "110105194912310021"),
        ("ip_address", "192.168.0.1 and 127.0.0.1 and version 1.2.3.4.5"),
    ],
)
def test_other_numbers_are_not_personal(kind: str, text: str) -> None:
    assert personal_data(text, [kind]) is None  # type: ignore[list-item]


def test_languages() -> None:
    assert language_of("The quick brown fox jumps over the lazy dog near the river bank.") == "en"
    assert language_of("Der schnelle braune Fuchs springt über den faulen Hund am Fluss.") == "de"
    assert language_of("敏捷的棕色狐狸跳过了河岸边那只懒惰的狗，然后它们一起回家了。") in with_members(["zh"])
    assert language_of("77.0°F") is None
    assert with_members(["en"]) == {"en"}
    with pytest.raises(UserError, match="keep: py3langid does not identify the language 'qq'"):
        with_members(["en", "qq"])
