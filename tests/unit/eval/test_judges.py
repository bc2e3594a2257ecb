"""Judges against a server on loopback that answers as planned: biased, silent, broken, expensive."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.judges import Judge
from align.errors import UserError
from align.eval.judges.bias import judge_agreement, length_bias, position_bias, vote_agreement
from align.eval.judges.calls import JudgeClient, Reply
from align.eval.judges.grading import Pair, compare, grade, majority
from align.eval.judges.prompts import Question, read_choice, read_grade
from align.eval.judges.report import agreement_line, bias_lines, comparing_lines, grading_lines
from align.eval.judges.scores import compare_by_scores, grade_by_scores
from align.reward import json_http
from tests.unit.eval.judge_server import server

QUESTIONS = [Question(f"q{i}", (f"Question {i}?", "And then?"), category="ab"[i % 2]) for i in range(20)]
GOOD = {q.id: ("a good answer", "still good") for q in QUESTIONS}
BAD = {q.id: ("a bad and long answer", "bad") for q in QUESTIONS}
PARTS = re.compile(r"<assistant_(?:a|b)>\n(.*?)\n</assistant_", re.DOTALL)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_http, "FIRST_PAUSE_S", 0.01)


def judge(url: str, **settings: Any) -> Judge:
    return Judge.model_validate({"url": url, "model": "stub", "retries": 1} | settings)


def ask(judge: Judge) -> Callable[..., Reply]:
    client = JudgeClient(judge)
    return lambda messages, vote: client.ask(messages, seed=vote)


def prefers_good(text: str, request: dict[str, Any]) -> str:
    a, b = [("good" in part.split("### Assistant")[-1]) for part in PARTS.findall(text)] or [False, False]
    return f"Reasons.\nVerdict: {'A' if a > b else 'B' if b > a else 'tie'}"


def test_an_honest_judge_finds_the_better_model(tmp_path: Path) -> None:
    with server(prefers_good) as (url, requests):
        found = compare(QUESTIONS, GOOD, BAD, judge(url), ask(judge(url)), tmp_path / "calls.jsonl")
        again = compare(QUESTIONS, GOOD, BAD, judge(url), ask(judge(url)), tmp_path / "calls.jsonl")
    assert (found.wins, found.ties, found.losses) == (40, 0, 0)
    assert len(requests) == 80  # 20 questions, 2 turns, 2 orders; the second run asks nothing
    assert again.pairs == found.pairs
    assert found.spent.calls == 80
    assert found.spent.tokens == sum(int(0.4 * len(r["messages"][-1]["content"])) + 5 for r in requests)
    bias = position_bias(found.pairs)
    assert bias.first is not None
    assert bias.inconsistent is not None
    assert (bias.first.mean, bias.inconsistent.mean, bias.preferred) == (0.5, 0.0, None)
    longer = length_bias(found.pairs, GOOD, BAD)
    assert longer is not None
    assert longer.mean == 0.5  # the good answer is shorter in the first turn and longer in the second
    first_turns = [pair for pair in found.pairs if pair.turn == 0]
    assert length_bias(first_turns, GOOD, BAD).mean == 0.0  # type: ignore[union-attr]
    lines = comparing_lines("good", "bad", found, GOOD, BAD)
    assert lines[0].startswith("good against bad: win rate 1.00 [0.8")
    assert lines[0].endswith("(n 40, 0 unscored): 40 wins, 0 ties, 0 losses")
    assert not any("POSITION BIAS" in line for line in lines)


def test_a_judge_that_prefers_the_first_answer_is_named(tmp_path: Path) -> None:
    with server(lambda text, request: "Verdict: A") as (url, _):
        found = compare(QUESTIONS, GOOD, BAD, judge(url), ask(judge(url)), tmp_path / "calls.jsonl")
    assert (found.wins, found.ties, found.losses) == (0, 40, 0)
    lines = comparing_lines("good", "bad", found, GOOD, BAD)
    assert any(
        line.startswith(
            "  POSITION BIAS: the judge prefers the answer shown first; the answer shown first is preferred"
        )
        for line in lines
    )
    assert position_bias(found.pairs).inconsistent.mean == 1.0  # type: ignore[union-attr]


def test_what_cannot_be_judged_is_neither_zero_nor_a_loss(tmp_path: Path) -> None:
    def decide(text: str, request: dict[str, Any]) -> str | int:
        if "Question 3?" in text:
            return 500
        if "Question 4?" in text:
            return "I like both."
        return prefers_good(text, request)

    fewer = {key: value for key, value in GOOD.items() if key != "q5"} | {"q6": GOOD["q6"][:1]}
    with server(decide) as (url, _):
        found = compare(QUESTIONS, fewer, BAD, judge(url), ask(judge(url)), tmp_path / "calls.jsonl")
    assert (found.wins, found.ties, found.losses) == (33, 0, 0)
    problems = found.problems
    assert (problems.failed, problems.unparsable, problems.not_asked, problems.no_answer) == (4, 4, 0, 3)
    summary = found.summary()
    assert (summary.mean, summary.n, summary.unscored) == (1.0, 33, 7)
    said = "\n".join(comparing_lines("good", "bad", found, fewer, BAD))
    assert "unscored: 4 failed calls, 4 verdicts that cannot be read, 3 answers missing" in said
    assert "q3: no response (status 500: planned) in 2 tries" in said.replace("{'message': 'planned'}", "planned")
    with server(prefers_good) as (url, requests):  # failed calls are made again, unreadable ones are not
        repaired = compare(QUESTIONS, fewer, BAD, judge(url), ask(judge(url)), tmp_path / "calls.jsonl")
        assert len(requests) == 4
        half = grade(QUESTIONS[:2], {"q0": ("one",)}, judge(url), ask(judge(url)), tmp_path / "grades.jsonl")
    assert repaired.wins == 35
    assert (half.problems.unparsable, half.problems.no_answer) == (1, 3)  # a verdict is not a grade
    assert half.summary().mean is None


@pytest.mark.parametrize("workers", [1, 8])
def test_a_budget_stops_in_order_and_is_resumed(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "calls.jsonl"
    with server(lambda text, request: "Fine.\nGrade: 7") as (url, requests):
        limited = judge(url, workers=workers, budget={"calls": 13})
        found = grade(QUESTIONS, GOOD, limited, ask(limited), path)
        assert len(requests) == 13
        scored = [g.value for g in found.grades]
        assert scored == [7.0] * 13 + [None] * 27  # the first ones
        assert found.stopped == "budget.calls 13"
        assert found.problems.not_asked == 27
        assert "stopped at budget.calls 13" in grading_lines("good", found)[-1]
        free = judge(url, workers=workers)
        found = grade(QUESTIONS, GOOD, free, ask(free), path)
    assert len(requests) == 40
    assert found.stopped == ""
    assert found.spent.calls == 40


def test_budgets_of_tokens_and_money_are_kept(tmp_path: Path) -> None:
    with server(lambda text, request: "Grade: 7") as (url, requests):
        for name, budget in (("tokens", {"tokens": 900}), ("money", {"money": 0.0009})):
            requests.clear()
            limited = judge(url, max_tokens=20, workers=4, prices={"prompt": 1.0, "completion": 1.0}, budget=budget)
            found = grade(QUESTIONS, GOOD, limited, ask(limited), tmp_path / name)
            assert found.stopped.startswith(f"budget.{name}")
            assert 300 < found.spent.tokens <= 900  # the estimate of the last call is larger than what it uses
            assert found.spent.money(limited.prices) == pytest.approx(found.spent.tokens / 1e6)


def test_votes_are_counted_and_their_agreement_is_known(tmp_path: Path) -> None:
    def decide(text: str, request: dict[str, Any]) -> str:
        return f"Grade: {[6, 8, 8][request['seed']]}" if "Question 1?" in text else "Grade: 5"

    with server(decide) as (url, requests):
        voting = judge(url, votes=3, temperature=0.7)
        found = grade(QUESTIONS[:2], GOOD, voting, ask(voting), tmp_path / "calls.jsonl")
    assert len(requests) == 12
    assert {request["temperature"] for request in requests} == {0.7}
    assert [g.value for g in found.grades] == [5.0, 5.0, 22 / 3, 22 / 3]
    same = vote_agreement(found.grades)
    assert same is not None
    assert same.mean == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4)
    assert found.summary(category="b").mean == 22 / 3
    assert majority(["first", None, "first", "tie"]) == "first"
    assert majority(["first", "second"]) == "tie"
    assert majority([None]) is None


def test_agreement_of_two_judges_by_hand() -> None:
    def pairs(results: list[str]) -> list[Pair]:
        votes = {"w": ("first", "second"), "l": ("second", "first"), "t": ("tie", "tie"), "-": (None, "first")}
        return [Pair(QUESTIONS[i], 0, (votes[r][0],), (votes[r][1],)) for i, r in enumerate(results)]  # type: ignore

    found = judge_agreement(pairs(list("wwlltw-w")), pairs(list("wwllwltw")))
    assert found.same is not None
    assert (found.n, found.left_out) == (7, 1)
    assert found.same.mean == 5 / 7
    chance = (4 * 4 + 2 * 3 + 1 * 0) / 49  # wins, losses, ties of the two judges
    assert found.kappa == pytest.approx((5 / 7 - chance) / (1 - chance))
    assert "agree on 71 [" in agreement_line("x", "y", found)
    assert judge_agreement(pairs(["w"]), pairs(["-"])).same is None


def test_a_reward_model_is_a_judge() -> None:
    seen = []

    def score(conversations: list[Any], answers: list[str]) -> list[float | None]:
        seen.extend(conversations)
        return [float("nan") if "bad and" in text else float(len(text)) for text in answers]

    found = compare_by_scores(QUESTIONS[:3], GOOD, BAD, score)
    assert [pair.result for pair in found.pairs] == [
        None,
        1.0,
    ] * 3  # no finite score; "still good" is longer than "bad"
    assert found.problems.failed == 3
    assert seen[1] == [
        {"role": "user", "content": "Question 0?"},
        {"role": "assistant", "content": "a good answer"},
        {"role": "user", "content": "And then?"},
    ]
    grades = grade_by_scores(QUESTIONS[:1], GOOD, score).grades
    assert [g.value for g in grades] == [13.0, 10.0]
    assert bias_lines(position_bias(found.pairs))[0].startswith("the answer shown first is preferred in 50")


@pytest.mark.parametrize(
    ("text", "grade", "choice"),
    [
        ("It is fine.\nGrade: 7", 7.0, None),
        ("**Grade:** 8/10", 8.0, None),
        ("Grade: 3\nOn reflection:\nGrade: 4.5", 4.5, None),
        ("Grade: 11", None, None),
        ("Grade: -3", None, None),
        ("I give it a 9.", None, None),
        ("<think>Grade: 2</think>Grade: 9", 9.0, None),
        ("So.\nVerdict: A", None, "first"),
        ("**Verdict: [[B]]**", None, "second"),
        ("Verdict: Tie.", None, "tie"),
        ("Verdict: A or B", None, None),
        ("The verdict: A is better", None, None),
        ("", None, None),
    ],
)
def test_verdicts_are_read_or_missing(text: str, grade: float | None, choice: str | None) -> None:
    assert read_grade(text) == grade
    assert read_choice(text) == choice


def test_calls_that_cannot_succeed_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda text, request: 401) as (url, _), pytest.raises(UserError, match="status 401"):
        grade(QUESTIONS, GOOD, judge(url), ask(judge(url)), tmp_path / "a")
    with server(lambda text, request: 500) as (url, _), pytest.raises(UserError, match="the first 5 calls failed"):
        grade(QUESTIONS, GOOD, judge(url, workers=1), ask(judge(url)), tmp_path / "b")
    with pytest.raises(UserError, match="'NO_SUCH_KEY' is not set"):
        JudgeClient(judge("http://127.0.0.1:1/v1", key="NO_SUCH_KEY"))
    monkeypatch.setenv("A_KEY", "s3cret")
    with server(lambda text, request: "Grade: 7") as (url, requests):
        keyed = judge(url, key="A_KEY")
        grade(QUESTIONS[:1], GOOD, keyed, ask(keyed), tmp_path / "c")
    assert requests[0]["key"] == "Bearer s3cret"
    assert requests[0]["path"] == "/v1/chat/completions"
    assert "s3cret" not in (tmp_path / "c").read_text()


def test_a_killed_run_leaves_usable_calls(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with server(lambda text, request: "Grade: 7") as (url, requests):
        grade(QUESTIONS[:2], GOOD, judge(url), ask(judge(url)), path)
        path.write_bytes(path.read_bytes()[:-10])
        found = grade(QUESTIONS[:2], GOOD, judge(url), ask(judge(url)), path)
        grade(QUESTIONS[:2], GOOD, judge(url), ask(judge(url)), path)
    assert len(requests) == 5
    assert [g.value for g in found.grades] == [7.0] * 4
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1: this is not a call"):
        grade(QUESTIONS[:2], GOOD, judge(url), ask(judge(url)), path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "is not a valid server URL"),
        ({"votes": 3}, "3 votes at temperature 0 are all equal"),
        ({"budget": {"money": 1.0}}, "budget.money needs prices"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        judge(**({"url": "http://127.0.0.1:8000/v1"} | settings))


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "judges.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)

    def decide(text: str, request: dict[str, Any]) -> str:
        if "<conversation>" in text:
            return f"Grade: {9 if '13.' in text else 7}"
        return f"Verdict: {'A' if 'prime' in text.split('</assistant_a>')[0].split('<assistant_a>')[1][30:] else 'B'}"

    with server(decide) as (url, _):
        exec(program.replace("http://127.0.0.1:8000/v1", url), {})
    said = capsys.readouterr().out
    assert "ours: mean grade 8.00" in said
    assert "ours against theirs: win rate 1.00" in said
