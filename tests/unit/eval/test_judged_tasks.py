"""Judged tasks of `align eval`, with a model that answers without weights and a judge on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.errors import UserError
from align.eval import Options, evaluate, evaluation
from align.eval.judges.length import equal_length_rate
from align.eval.judges.questions import texts
from align.eval.judges.task import answer_text
from align.eval.results import Results
from align.models.hunyuan import HunYuanConfig, HunYuanForSequenceClassification
from align.reward import json_http
from tests.unit.eval.judge_server import server
from tests.unit.eval.local_tasks import SIZES, StandIn, make_tokenizer, save_checkpoint

LAST = re.compile(r"### Assistant\n(.*?)\n</(?:conversation|assistant_.)>", re.DOTALL)
LENGTH = re.compile(r"<assistant_(?:a|b)>.*?</assistant_.>", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    save_checkpoint(folder / "a")
    data = folder / "data"
    _write(
        data / "HuggingFaceH4/mt_bench_prompts/raw.jsonl",
        [
            {"prompt_id": i, "prompt": [f"The cat {i}?", "And the dog?"], "reference": [], "category": "ab"[i % 2]}
            for i in range(8)
        ],
    )
    _write(
        data / "lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/question.jsonl",
        [{"question_id": f"q{i}", "category": "x", "turns": [{"content": f"The cat {i}?"}]} for i in range(12)],
    )
    _write(
        data / "lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
        [{"question_id": f"q{i}", "choices": [{"turns": [{"content": f"baseline {i}"}]}]} for i in reversed(range(12))],
    )
    alpaca = [{"instruction": f"The {w}?", "output": "baseline", "dataset": "d"} for w in ("cat", "dog", "sea")]
    (data / "tatsu-lab/alpaca_eval").mkdir(parents=True)
    (data / "tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json").write_text(json.dumps(alpaca))
    _write(
        data / "THUDM/AlignBench/data/data_v1.1_release.jsonl",
        [{"question_id": i, "category": "a", "question": f"cat {i}?", "reference": f"right {i}"} for i in range(3)],
    )
    return folder


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    opened: list[StandIn] = []

    def open_model(checkpoint: Path, tokenizer: Any, engine: Any) -> StandIn:
        opened.append(StandIn(make_tokenizer(), engine.max_length))
        return opened[-1]

    monkeypatch.setattr(evaluation, "open_model", open_model)
    monkeypatch.setattr(json_http, "FIRST_PAUSE_S", 0.01)
    return opened


def run(folder: Path, out: Path, tasks: list[str], judges: list[str], **settings: Any) -> Results:
    flags = {name: settings.pop(name) for name in ("resume", "rescore") if name in settings}
    options = Options(data=folder / "data", dtype="float32", max_new_tokens=8, judges=tuple(judges), **settings)
    return evaluate([folder / "a"], tasks, out=out, options=options, **flags)


def metrics(results: Results, task: str) -> dict[str, Any]:
    return results.content["models"]["a"]["tasks"][task]["metrics"]


def grade_by_question(text: str, request: dict[str, Any]) -> str:
    """4 for the first turn of an even question, 6 for an odd one; 2 more in the second turn."""
    number = int(re.findall(r"The cat (\d+)", text)[0])
    return f"So.\nGrade: {4 + 2 * (number % 2) + 2 * ('And the dog?' in text)}"


def test_mt_bench_grades_both_turns(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    with server(grade_by_question) as (url, requests):
        results = run(folder, tmp_path / "o", ["mt_bench"], [url])
        found = metrics(results, "mt_bench")
        assert found["grade by stub"]["mean"] == 6.0
        assert found["grade by stub, turn 1"]["mean"] == 5.0
        assert found["grade by stub, turn 2"]["mean"] == 7.0
        assert found["grade by stub (a)"]["mean"] == 5.0  # even questions
        assert found["grade by stub (b)"]["mean"] == 7.0
        assert found["grade by stub"]["n"] == 8
        assert len(requests) == 16
        # The judge sees the model's own first answer before the second question, and so did the model.
        (row,) = [row for row in results.verdicts("a", "mt_bench") if row["document"] == "3"]
        first = row["shown"]["answer, turn 1"]
        asked = [r["messages"][-1]["content"] for r in requests if "The cat 3?" in r["messages"][-1]["content"]]
        assert sorted(first in text for text in asked) == [True, True]
        prompts = [make_tokenizer().decode(list(request.prompt_ids)) for request in models[-1].answered]
        assert sum(first in text and "And the dog?" in text for text in prompts) == 1
        assert row["shown"]["stub says"] == "So.\nGrade: 6\n\nSo.\nGrade: 8"
        again = run(folder, tmp_path / "o", ["mt_bench"], [url], resume=True)
        assert (len(requests), len(models)) == (16, 1)
        assert metrics(again, "mt_bench") == found
    rescored = run(folder, tmp_path / "o", ["mt_bench"], [url], judge_model="stub", rescore=True)  # no server
    assert metrics(rescored, "mt_bench") == found


def test_samples_have_their_own_second_turn(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    with server(grade_by_question) as (url, requests):
        results = run(folder, tmp_path / "o", ["mt_bench"], [url], samples=3, temperature=1.0)
    assert len(models[-1].answered) == 8 * 2 * 3
    assert len(requests) == 48
    rows = results.verdicts("a", "mt_bench")
    assert len(rows) == 24
    prompts = [make_tokenizer().decode(list(request.prompt_ids)) for request in models[-1].answered]
    second = [text for text in prompts if "And the dog?" in text]
    assert all(any(row["shown"]["answer, turn 1"] in text for text in second) for row in rows)
    assert metrics(results, "mt_bench")["grade by stub"]["mean"] == 6.0


def test_another_judge_needs_no_new_answers(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    with server(grade_by_question) as (url, _):
        run(folder, tmp_path / "o", ["mt_bench"], [url])
    with server(lambda text, request: "Grade: 9", ["x/other"]) as (url, _):
        results = run(folder, tmp_path / "o", ["mt_bench"], [url], resume=True)
    assert metrics(results, "mt_bench")["grade by other"]["mean"] == 9.0
    assert "grade by stub" not in metrics(results, "mt_bench")
    assert len(models) == 1


def test_arena_hard_and_alpaca_eval_compare_with_the_baseline(folder: Path, tmp_path: Path) -> None:
    """The judge prefers the baseline for the questions 0 and 1, and otherwise the model's answer."""

    def decide(text: str, request: dict[str, Any]) -> str:
        baseline_first = "baseline" in LAST.findall(text)[0]
        prefers_baseline = "The cat 0?" in text or "The cat 1?" in text
        return f"Verdict: {'A' if baseline_first == prefers_baseline else 'B'}"

    with server(decide) as (url, requests):
        results = run(folder, tmp_path / "o", ["arena_hard", "alpaca_eval"], [url])
    assert metrics(results, "arena_hard")["win rate by stub"]["mean"] == pytest.approx(10 / 12)
    assert metrics(results, "alpaca_eval")["win rate by stub"]["mean"] == 1.0
    assert len(requests) == 2 * (12 + 3)
    asked = [request["messages"][-1]["content"] for request in requests]
    for i in range(12):  # answers are found by their id, not by their place
        assert sum(f"The cat {i}?" in text and f"baseline {i}\n" in text for text in asked) == 2
    tasks = results.content["models"]["a"]["tasks"]
    assert "against gpt-4-0314" in tasks["arena_hard"]["version"]
    assert not [note for note in results.content["notes"] if "POSITION BIAS" in note]


def test_a_reference_answer_is_shown_to_the_judge(folder: Path, tmp_path: Path) -> None:
    with server(lambda text, request: "Grade: 3") as (url, requests):
        run(folder, tmp_path / "o", ["alignbench"], [url])
    assert all("<reference>\nright" in request["messages"][-1]["content"] for request in requests)


def test_a_judge_that_prefers_position_a_is_named_in_the_report(folder: Path, tmp_path: Path) -> None:
    with server(lambda text, request: "Verdict: A") as (url, _):
        results = run(folder, tmp_path / "o", ["arena_hard"], [url])
    assert metrics(results, "arena_hard")["win rate by stub"]["mean"] == 0.5
    (note,) = [note for note in results.content["notes"] if "POSITION BIAS" in note]
    assert note.startswith("a, arena_hard: stub: POSITION BIAS: the judge prefers the answer shown first")
    assert "POSITION BIAS" in (tmp_path / "o" / "report.html").read_text()


def test_failures_of_the_judge_are_unscored(folder: Path, tmp_path: Path) -> None:
    """The question 3 gets no verdict, and calls for the question 5 fail."""

    def decide(text: str, request: dict[str, Any]) -> str | int:
        return 400 if "The cat 5?" in text else "I cannot say." if "The cat 3?" in text else "Grade: 8"

    with server(decide) as (url, _):
        results = run(folder, tmp_path / "o", ["mt_bench"], [url])
    found = metrics(results, "mt_bench")["grade by stub"]
    assert (found["mean"], found["n"], found["unscored"]) == (8.0, 6, 2)
    reasons = {row["document"]: row["reason"] for row in results.verdicts("a", "mt_bench") if row["reason"]}
    assert reasons["3"] == "grade by stub: no verdict ('I cannot say.')"
    assert "status 400" in reasons["5"]
    notes = "\n".join(results.content["notes"])
    assert "stub: unscored: 2 failed calls, 2 verdicts that cannot be read" in notes


def test_the_budget_holds_for_the_whole_evaluation(folder: Path, tmp_path: Path) -> None:
    with server(lambda text, request: "Grade: 8") as (url, requests):
        judge = {"url": url, "model": "stub", "budget": {"calls": 10}, "workers": 1, "votes": 2, "temperature": 1.0}
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judge))
        results = run(folder, tmp_path / "o", ["mt_bench", "alignbench"], [str(tmp_path / "judge.yaml")])
    assert len(requests) == 10
    assert metrics(results, "mt_bench")["grade by stub"]["n"] == 2  # two turns of two votes each, and half of the third
    assert metrics(results, "alignbench")["grade by stub"]["n"] == 0
    assert any("stopped at budget.calls 10" in note for note in results.content["notes"])
    (facts,) = results.content["judges"]
    assert facts["spent"]["calls"] == 10


def test_two_judges_and_their_agreement(folder: Path, tmp_path: Path) -> None:
    with (
        server(grade_by_question) as (url, _),
        server(lambda text, request: "Grade: 5", ["other"]) as (second, _),
        server(lambda text, request: "Verdict: tie") as (third, _),
        server(lambda text, request: "Verdict: tie", ["other"]) as (fourth, _),
    ):
        results = run(folder, tmp_path / "o", ["mt_bench"], [url, second])
        compared = run(folder, tmp_path / "p", ["arena_hard"], [third, fourth])
    found = metrics(results, "mt_bench")
    assert (found["grade by stub"]["mean"], found["grade by other"]["mean"]) == (6.0, 5.0)
    # Grades 4, 6, 6, 8 against 5: three of four are within 1; 6 in the mean against 5.
    (note,) = [note for note in results.content["notes"] if "differ by at most 1" in note]
    assert "grades of stub and other differ by at most 1 for 75" in note
    assert "of 16 answers; stub minus other is 1.00" in note
    assert any("stub and other agree on 100" in note for note in compared.content["notes"])


def test_without_a_judge_a_suite_leaves_judged_tasks_out_and_says_so(folder: Path, tmp_path: Path) -> None:
    suite = {"title": "mine", "tasks": [{"task": "mt_bench"}, {"task": "cmath"}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    from align.eval.resolve import resolve

    (tmp_path / "weitianwen/cmath").mkdir(parents=True)
    found = resolve([f"suite:{tmp_path / 's.yaml'}"], data=tmp_path)
    assert [task.name for task in found.tasks] == ["cmath"]
    assert found.notes == ["mt_bench: left out, because no judge is given; pass --judge"]
    with pytest.raises(UserError, match="mt_bench: its answers are judged, and no judge is given"):
        resolve(["mt_bench"], data=tmp_path)


def test_missing_data_is_named_with_its_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with server(lambda text, request: "") as (url, _), pytest.raises(UserError) as error:
        evaluate([folder / "a"], ["mt_bench", "alignbench"], options=Options(data=tmp_path / "data", judges=(url,)))
    place = tmp_path / "data/HuggingFaceH4/mt_bench_prompts"
    assert f"hf download --repo-type dataset HuggingFaceH4/mt_bench_prompts --local-dir {place}" in str(error.value)
    assert f"git clone https://github.com/THUDM/AlignBench {tmp_path / 'data/THUDM/AlignBench'}" in str(error.value)


def test_texts_of_published_formats() -> None:
    assert texts("a", "user") == ("a",)
    assert texts(["a", "b"], "user") == ("a", "b")
    assert texts([{"content": "a"}, {"content": "b"}], "user") == ("a", "b")
    assert texts([{"index": 0, "turns": [{"content": "a"}, {"content": "b"}]}], "assistant") == ("a", "b")
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": {"answer": "b"}}]
    assert texts(conversation, "user") == ("a",)
    assert texts(conversation, "assistant") == ("b",)
    assert texts(None, "user") == ()


def test_reasoning_is_not_judged() -> None:
    assert answer_text("<think>\nhm\n</think>\n\nFour.") == "Four."
    assert answer_text("hm\n</think>\nFour.") == "Four."
    assert answer_text("Four.") == "Four."
    assert answer_text("<think>\nnever ends") == ""


def test_win_rate_at_equal_length() -> None:
    """Independent of length it is the win rate; if only length decides, it is one half."""
    fair = equal_length_rate([1, 1, 1, 0] * 25, [(10, 10)] * 100)
    assert fair is not None
    assert fair.mean == pytest.approx(0.75)
    # The interval of a share on the logit scale: log 3 plus and minus 1.96 / sqrt(100 * 0.75 * 0.25).
    assert (fair.low, fair.high) == pytest.approx((0.656, 0.825), abs=1e-3)
    # Three of four wins when longer, one of four when shorter: nothing is left at equal length. The win rate is 0.625.
    long, short = [(200, 100)] * 60, [(100, 200)] * 20
    verbose = equal_length_rate([1.0] * 45 + [0.0] * 15 + [1.0] * 5 + [0.0] * 15, long + short)
    assert verbose is not None
    assert verbose.mean == pytest.approx(0.5, abs=1e-3)
    only_length = equal_length_rate([1.0] * 60 + [0.0] * 20, long + short)
    assert only_length is not None
    assert only_length.low < 0.3
    assert only_length.high > 0.7
    assert equal_length_rate([1.0, 1.0], [(1, 2), (2, 1)]) is None


def test_a_reward_model_judges(folder: Path, tmp_path: Path) -> None:
    """Its scores are those of transformers' forward pass on the rendered conversation."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    sizes = SIZES | {"num_labels": 1, "max_position_embeddings": 256}
    model = HunYuanForSequenceClassification(HunYuanConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    results = run(folder, tmp_path / "o", ["arena_hard", "alignbench"], [str(tmp_path / "rm")])

    @torch.no_grad()
    def score(question: str, answer: str) -> float:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        return float(model(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits.item())

    graded = results.verdicts("a", "alignbench")
    for row in graded:
        expected = score(row["shown"]["question"], row["shown"]["answer"])
        assert row["values"]["score by rm"] == pytest.approx(expected, abs=1e-4)
    compared = results.verdicts("a", "arena_hard")
    wins = [
        score(s["question"], s["answer"]) > score(s["question"], s["gpt-4-0314"])
        for s in (r["shown"] for r in compared)
    ]
    assert [row["values"]["win rate by rm"] for row in compared] == [float(win) for win in wins]
    assert 0 < sum(wins) < len(wins)
