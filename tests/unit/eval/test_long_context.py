"""Long-context tests: exact lengths, needles at their depths, RULER's scores, and a model that forgets the middle."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.long_context import LongContext
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.eval.long_context.fit import fit
from align.eval.long_context.generate import LongSample, samples
from align.eval.long_context.grid import Cell, grid, weak_places
from align.eval.long_context.heat_map import HIGH, LOW, heat_map
from align.eval.long_context.score import any_found, share_found

TASKS = ["single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"]
SENTENCES = [
    "The train left at noon.", "Nobody saw the keeper of the garden again!", "Was it the wind?", "She ran.",
    "Rain fell on the copper roof.", "A letter came in the spring, and it had no stamp.", "They waited for the boat.",
]  # fmt: skip
CHINESE = "他们在河边等了很久。天气很冷，可是没有人回家。老人讲了一个故事！孩子们都听得入神。"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A haystack in each language, in which every sentence has its number."""
    folder = tmp_path_factory.mktemp("haystacks")
    draw = random.Random(0)
    (folder / "en.txt").write_text(" ".join(draw.choice(SENTENCES) for _ in range(2500)), encoding="utf-8")
    (folder / "zh.jsonl").write_text(json.dumps({"text": CHINESE * 600}) + "\n\n", encoding="utf-8")
    return {"en": str(folder / "en.txt"), "zh": str(folder / "zh.jsonl")}


@pytest.fixture(scope="module", params=["bytes", "merges"])
def count(request: pytest.FixtureRequest) -> Any:
    """Tokens of a prompt in a tokenizer with one token per byte, or with merges; four more for a chat template."""
    corpus = SENTENCES * 20 + [CHINESE] * 5
    tokenizer = train_tokenizer(corpus, 259 if request.param == "bytes" else 1200)
    return lambda text: len(tokenizer(text)["input_ids"]) + 4


def generated(texts: dict[str, str], count: Any, **settings: Any) -> list[LongSample]:
    section = {"haystacks": texts, "lengths": [2048], "samples": 2, "max_new_tokens": 64} | settings
    return list(samples(LongContext.model_validate(section), count))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_length(texts: dict[str, str], count: Any, task: str) -> None:
    found = generated(texts, count, tasks=[task], lengths=[1500, 3001], depths=[0, 37, 100])
    assert {(s.length, s.tokens) for s in found} == {(1500, 1500 - 64), (3001, 3001 - 64)}
    assert all(count(s.prompt) == s.tokens for s in found)
    assert len({s.prompt for s in found}) == len(found)


def test_the_grid_is_the_same_again_and_another_for_another_seed(texts: dict[str, str], count: Any) -> None:
    first, again, second = (
        generated(texts, count, tasks=TASKS, seed=seed, lengths=[1500], depths=[50], samples=1) for seed in (0, 0, 1)
    )
    assert again == first
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    assert all(a.id == b.id for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("language", "ends"), [("en", ".!?"), ("zh", "。！？")])
def test_the_needle_is_at_its_depth_after_a_sentence(
    texts: dict[str, str], count: Any, language: str, ends: str
) -> None:
    depths = [0, 25, 50, 75, 100]
    found = generated(texts, count, tasks=["single", "multi_key"], depths=depths, languages=[language], samples=1)
    for sample in found:
        text = sample.prompt.split("\n\n", 1)[1].rpartition("\n\n")[0]
        assert text.count(sample.expected[0]) == 1
        before = text[: text.index("Remember" if language == "en" and sample.task == "single" else sample.expected[0])]
        at = len(before) / len(text)
        assert at == pytest.approx(sample.depth / 100, abs=0.1)  # type: ignore[operator] # a short text and other notes
        if sample.task == "single" and language == "en" and 0 < sample.depth < 100:  # type: ignore[operator]
            assert before.strip()[-1] in ends
    asked = [re.findall(r"of ([a-z-]+) in|上文中(.*?)的密码", s.prompt)[-1] for s in found]
    assert all(any(asked) for asked in asked)


def test_every_needle_of_a_key_is_hidden_and_asked_for(texts: dict[str, str], count: Any) -> None:
    for sample in generated(texts, count, tasks=["multi_value", "multi_query", "multi_key"], needles=5):
        notes = re.findall(r"the code of ([a-z-]+) is (\d{7})\.", sample.prompt)
        assert len(notes) == 5
        question = sample.prompt.rpartition("\n\n")[2]
        asked = [(key, value) for key, value in notes if key in question]
        assert {value for _, value in asked} == set(sample.expected)
        assert len(asked) == (1 if sample.task == "multi_key" else 5)


def test_variables_follow_from_the_assignments(texts: dict[str, str], count: Any) -> None:
    for sample in generated(texts, count, tasks=["variable_tracking"], hops=3, samples=5):
        values: dict[str, str] = {}
        for name, number, other in re.findall(
            r"Variable ([A-Z]+) is (?:equal to variable ([A-Z]+)|(\d+))", sample.prompt
        ):
            values[name] = values[number] if number else other  # a chain is in order in the text
        asked = re.findall(r"have the value (\d+)", sample.prompt)[0]
        assert {name for name, value in values.items() if value == asked} == set(sample.expected)
        assert (len(values), len(sample.expected)) == (8, 4)


def test_the_common_and_frequent_words_are_those_expected(texts: dict[str, str], count: Any) -> None:
    for sample in generated(texts, count, tasks=["common_words", "frequent_words"], lengths=[2048, 9000], samples=3):
        body = sample.prompt.split("\n\n")[1]
        words = Counter(word for word in re.findall(r"[a-z]{6}", body))
        top = words.most_common(len(sample.expected) + 1)
        assert {word for word, _ in top[:-1]} == set(sample.expected)
        assert top[-1][1] < top[-2][1]


def test_scores_are_rulers() -> None:
    assert share_found("The codes are 12\tand AB.", ["12", "ab", "34", "56"]) == 0.5
    assert any_found("x 34", ["12", "34"]) == 1.0
    assert any_found("", ["12"]) == 0.0
    draw = random.Random(0)
    for _ in range(300):  # the definition of string_match_all, on texts and lists of random pieces
        pieces = ["ab", "Ab c", "12", "345", "\x07", "\n", " "]
        answer = "".join(draw.choices(pieces, k=draw.randint(0, 6)))
        expected = draw.sample(["AB", "b C", "12", "45", "x"], draw.randint(1, 4))
        cleaned = "".join("\n" if ord(c) < 32 else c for c in answer.strip()).strip().lower()
        assert share_found(answer, expected) == sum(item.lower() in cleaned for item in expected) / len(expected)


def forgetful(sample: LongSample) -> str:
    """A model that finds a needle unless it is 40 to 60 % deep."""
    text = sample.prompt.split("\n\n", 1)[1].rpartition("\n\n")[0]
    key = re.findall(r"of ([a-z-]+) in the text", sample.prompt)[0]
    note = re.search(rf"code of {key} is (\d+)", text)
    assert note is not None
    return "I do not know." if 0.4 <= note.start() / len(text) <= 0.6 else f"It is {note[1]}."


def test_a_model_that_forgets_the_middle_is_seen(texts: dict[str, str], count: Any) -> None:
    found = generated(texts, count, tasks=["multi_key"], depths=[0, 20, 50, 80, 100], samples=6, lengths=[2048, 4096])
    cells = grid((sample, share_found(forgetful(sample), sample.expected)) for sample in found)
    assert [(c.length, c.depth, c.summary.mean) for c in cells] == [
        (length, depth, float(depth != 50)) for length in (2048, 4096) for depth in (0, 20, 50, 80, 100)
    ]
    assert weak_places(cells) == ["multi_key (en) is weak at depth 50 % (0.00); the best depth has 1.00"]
    fine = grid((sample, 1.0) for sample in found)
    assert weak_places(fine) == []


def test_unscored_samples_are_not_zero() -> None:
    sample = LongSample("a", "single", 512, 50.0, "en", "", "", ("1",), 400)
    (cell,) = grid([(sample, None), (sample, 1.0), (sample, 1.0)])
    assert (cell.summary.mean, cell.summary.n, cell.summary.unscored) == (1.0, 2, 1)


def test_the_heat_map_is_valid_and_readable() -> None:
    def cell(length: int, depth: float | None, *scores: float | None) -> Cell:
        return Cell("single", "en", length, depth, (1, 1), scores)

    cells = [cell(1024, 0, 1, 1), cell(1024, 50, 0, 0), cell(4096, 0, 0.5, None), cell(4096, 50, None)]
    text = heat_map(cells, 'single <en> & "more"')
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    said = [title.text or "" for title in root.iter(f"{space}title")]
    assert said[0] == 'single <en> & "more"'
    assert said[1].startswith("1,024 tokens, depth 0 %: 1.00, 95 % interval 0.34 to 1.00, n 2")
    assert said[4] == "4,096 tokens, depth 50 %: no score, 1 unscored"
    numbers = [node.text for node in root.iter(f"{space}text")]
    assert numbers == ["tokens", "1,024", "4,096", "0 %", "50 %", "1.00", "0.00", "0.50*"]
    assert "prefers-color-scheme:dark" in text

    def luminance(color: tuple[int, ...]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(101):  # the number is legible on every colour: WCAG's contrast of 4.5
        color = tuple(round(low + (high - low) * step / 100) for low, high in zip(LOW, HIGH, strict=True))
        svg = heat_map([cell(1024, 0, step / 100)], "x")
        assert f"#{color[0]:02x}{color[1]:02x}{color[2]:02x}" in svg
        ink = 0.0 if 'class="dark"' in svg else 1.0
        light, dark = sorted([luminance(color), ink], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_default_haystack_is_the_documentation_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{name} returns a list of the names. " * 40} for name in ("dir", "vars")]
    monkeypatch.setattr("align.eval.long_context.texts.python_docs_rows", lambda *args: rows)
    (sample,) = generated({}, len, tasks=["single"], depths=[50], samples=1)
    assert sample.tokens == 2048 - 64
    assert "dir returns a list of the names." in sample.prompt


def test_fit_finds_the_longest_prompt() -> None:
    prompt, tokens = fit(lambda size, filler: "x" * 3 * size + filler, len, 100, largest=1000)
    assert (len(prompt), tokens) == (100, 100)  # 33 pieces of 3, or fewer, and a filler
    prompt, tokens = fit(lambda size, filler: "x" * size, len, 100, largest=20)
    assert tokens == 20
    with pytest.raises(ValueError, match="has 7 tokens"):
        fit(lambda size, filler: "x" * 7, len, 5, largest=10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": [512], "max_new_tokens": 512}, "leaves no tokens for a prompt"),
        ({"languages": ["zh"]}, "haystacks has no text for it"),
        ({"depths": [101]}, "less than or equal to 100"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LongContext.model_validate(settings)


def test_wrong_files_are_refused(tmp_path: Path, count: Any) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    for name, said in (
        ("missing.txt", "cannot be read"),
        ("empty.txt", "is empty"),
        ("rows.jsonl", "line 2: it is not"),
    ):
        with pytest.raises(UserError, match=said):
            generated({"en": str(tmp_path / name)}, count)
    (tmp_path / "short.txt").write_text("Too few words.")
    with pytest.raises(UserError, match=r"fills \d+ tokens of length 2048\. Set haystacks"):
        generated({"en": str(tmp_path / "short.txt")}, count)
    with pytest.raises(UserError, match="length 300 is too short"):
        generated({}, count, tasks=["common_words"], lengths=[300])


def test_the_example_of_the_page_runs(texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "long_context.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    rows = [{"text": Path(texts["en"]).read_text(encoding="utf-8")}]
    monkeypatch.setattr("align.eval.long_context.texts.python_docs_rows", lambda *args: rows)
    names: dict[str, Any] = {"count": len, "answer": lambda prompt: "no code"}
    exec(program, names)
    assert [cell.summary.mean for cell in names["cells"]] == [0.0] * 6
    assert names["svg"].startswith("<svg")
