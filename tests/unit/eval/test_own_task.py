"""Tasks in YAML: prompts by hand, scores of planned answers, and errors with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config.own_task import read_own_task
from align.errors import UserError
from align.eval import own_task
from align.eval.answering import Sampling, plan
from align.eval.encoder import Encoder
from align.eval.own_task import BUILT_IN, YamlTask
from align.eval.records import Record, answer
from align.eval.resolve import resolve
from align.eval.task import Scores
from align.rollout.requests import Generation, Pair, Request, Scored
from tests.chat_templates import SHAPES, tokenizer_for
from tests.unit.eval.local_tasks import make_tokenizer

ROWS = [{"q": f"What is {n} plus {n}?", "a": str(2 * n), "options": ["0", str(2 * n), "1"]} for n in range(1, 7)]
SUMS = """name: sums
data: sums.jsonl
prompt: "Question: {{ q }}\\nAnswer:"
verifier: {kind: math, column: a}
stop: ["\\n"]
max_new_tokens: 8
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "sums.jsonl", ROWS)
    return tmp_path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task(folder: Path, text: str, **settings: Any) -> YamlTask:
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    return YamlTask(folder / "task.yaml", **settings)


def prompts(task: YamlTask, *, chat: bool = False) -> list[str]:
    """Text of each request; of a choice, with `|` before it."""
    tokenizer = tokenizer_for(SHAPES["chatml"], make_tokenizer()) if chat else make_tokenizer()
    encoder = Encoder(tokenizer, 4096)
    found = []
    for item in task.requests(task.documents(), encoder):
        if isinstance(item.request, Request):
            found.append(tokenizer.decode(item.request.prompt_ids))
        elif isinstance(item.request, Pair):
            pair = item.request
            found.append(f"{tokenizer.decode(pair.prefix_ids)}|{tokenizer.decode(pair.target_ids)}")
    return found


def scored(task: YamlTask, reply: Callable[[str, int], Any], samples: int = 1) -> Scores:
    """Scores of planned answers. reply: f(prompt, sample) -> text; of a choice, f(its text, number) -> probability."""
    tokenizer = make_tokenizer()
    records: list[Record] = []
    for one in plan(task, task.documents(), Encoder(tokenizer, 4096), Sampling(samples), "checkpoint"):
        if isinstance(one.request, Request):
            text = reply(tokenizer.decode(one.request.prompt_ids), one.record.place.sample)
            ids = tuple(tokenizer(text)["input_ids"])
            records.append(answer(one.record, one.request, Generation(ids, text, True)))
        elif isinstance(one.request, Pair):
            value = reply(tokenizer.decode(one.request.target_ids), one.record.place.number)
            records.append(answer(one.record, one.request, Scored(value, (value,), False)))
    return task.score(records)


def test_a_task_of_six_lines(folder: Path) -> None:
    found = task(folder, SUMS)
    assert prompts(found)[:2] == ["Question: What is 1 plus 1?\nAnswer:", "Question: What is 2 plus 2?\nAnswer:"]
    replies = {"1 plus": "2", "2 plus": " 4 apples", "3 plus": "7", "4 plus": "I do not know"}
    scores = scored(found, lambda text, _: next((said for key, said in replies.items() if key in text), "It is 10."))
    assert [v.values["math"] for v in scores.verdicts] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert [v.unanswered for v in scores.verdicts] == [False, False, False, True, False, False]
    assert scores.verdicts[0].shown == {
        "question": "Question: What is 1 plus 1?\nAnswer:",
        "answer": "2",
        "target": "2",
    }
    (request,) = [item.request for item in found.requests(["0"], Encoder(make_tokenizer(), 4096))]
    assert (request.stop, request.max_new_tokens, request.temperature) == (("\n",), 8, 0.0)


def test_choices_by_log_probability_and_per_character(folder: Path) -> None:
    text = """name: choose
data: sums.jsonl
prompt: "{{ q }}"
choices: "{{ options }}"
answer: "1"
"""
    found = task(folder, text)
    assert prompts(found)[:3] == [f"What is 1 plus 1?| {option}" for option in ("0", "2", "1")]
    # -1.0 for each right choice and -0.9 for 0; the last documents' right choices have two characters.
    scores = scored(found, lambda target, number: {0: -0.9, 1: -1.0, 2: -5.0}[number])
    assert [v.values for v in scores.verdicts] == [{"acc": 0.0, "acc_norm": float(i >= 4)} for i in range(6)]


@pytest.mark.parametrize("answer", ["1", "'B'", "a", "options[1]", "{{ 3 - 2 }}", "1.0"])
def test_the_right_choice_is_a_number_a_letter_or_a_text(folder: Path, answer: str) -> None:
    text = (
        f'name: choose\ndata: sums.jsonl\nprompt: "{{{{ q }}}}"\nchoices: options\nanswer: "{answer}"\nmetric: right\n'
    )
    scores = scored(task(folder, text), lambda target, number: -1.0 if number == 1 else -2.0)
    assert [verdict.values["right"] for verdict in scores.verdicts] == [1.0] * 6


def test_examples_are_the_first_or_drawn_and_are_not_evaluated(folder: Path) -> None:
    shots = SUMS + 'shots: {count: 2, answer: "{{ a }}"}\n'
    found = task(folder, shots)
    assert len(found.documents()) == 4
    assert prompts(found)[0] == (
        "Question: What is 1 plus 1?\nAnswer: 2\n\nQuestion: What is 2 plus 2?\nAnswer: 4\n\n"
        "Question: What is 3 plus 3?\nAnswer:"
    )
    drawn = [prompts(task(folder, shots.replace("count: 2", f"count: 2, seed: {seed}"))) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(texts) for texts in drawn}) > 1
    for texts in drawn:  # a question is never among the examples
        assert all(text.count(text.split("\n\n")[-1].split("\n")[0]) == 1 for text in texts)
    write_rows(folder / "examples.jsonl", [{"q": "One?", "a": "1"}])
    other = task(folder, SUMS + 'shots: {count: 1, answer: "{{ a }}", data: {path: examples.jsonl}}\n')
    assert len(other.documents()) == 6
    assert prompts(other)[5].startswith("Question: One?\nAnswer: 1\n\nQuestion: What is 6")
    assert len(prompts(task(folder, shots, shots=0))) == 6
    assert task(folder, shots, shots=0).version != found.version


def test_a_chat_has_turns_and_an_open_answer(folder: Path) -> None:
    text = SUMS + 'shots: {count: 1, answer: "{{ a }}"}\nsystem: Be brief.\nchat_prompt: "{{ q }}"\nopening: "It is"\n'
    (first, *_) = prompts(task(folder, text, chat=True), chat=True)
    assert first == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 plus 1?<|im_end|>\n"
        "<|im_start|>assistant\nIt is2<|im_end|>\n<|im_start|>user\nWhat is 2 plus 2?<|im_end|>\n"
        "<|im_start|>assistant\nIt is"
    )


def test_pass_at_k_is_unbiased_and_clustered(folder: Path) -> None:
    write_rows(folder / "code.jsonl", [{"text": f"f{n}", "test_list": ["assert f() == 1"]} for n in range(2)])
    text = """name: code
data: code.jsonl
prompt: "{{ text }}"
verifier: {kind: code, column: test_list, unsafe: true}
pass_at: [1, 2]
metric: right
"""
    good, bad = "def f(): return 1", "def f(): return 2"

    def reply(prompt: str, sample: int) -> str:
        return good if (sample < 1 if prompt == "f0" else sample < 3) else bad

    scores = scored(task(folder, text), reply, samples=4)
    assert [v.values["right"] for v in sorted(scores.verdicts, key=lambda v: (v.document, v.sample))] == [
        1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0
    ]  # fmt: skip
    assert scores.corpus["pass@1"].value == (1 / 4 + 3 / 4) / 2
    assert scores.corpus["pass@2"].value == pytest.approx((1 - 3 / 6 + 1 - 0) / 2)  # C(3,2)/C(4,2) and C(1,2) = 0
    with pytest.raises(UserError, match="pass_at 2 needs 2 samples"):
        scored(task(folder, text), reply)


def test_what_cannot_be_scored_has_a_reason(folder: Path) -> None:
    write_rows(folder / "sums.jsonl", [*ROWS[:1], {"q": "What?", "a": None}])
    (folder / "mine.py").write_text("def f(prompt, completion, row): return {'2': 1.0}[completion]\n")
    found = scored(task(folder, SUMS), lambda text, _: "2").verdicts
    assert [(v.values["math"], v.reason) for v in found] == [
        (1.0, ""),
        (None, "the row has no value in the column 'a'"),
    ]
    text = SUMS.replace("kind: math, column: a", f'kind: function, path: "{folder}/mine.py:f", batched: false')
    write_rows(folder / "sums.jsonl", ROWS[:2])
    found = scored(task(folder, text), lambda text, _: "2" if "1 plus" in text else "3").verdicts
    assert found[0].values == {"function": 1.0}
    assert found[1].values == {"function": None}
    assert "KeyError" in found[1].reason


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("stop:", "stops:", 5, "stops: the key is unknown"),
        ("max_new_tokens: 8", "max_new_tokens: 0", 6, "max_new_tokens: Input should be greater than or equal to 1"),
        ("kind: math, column: a", "kind: math, colum: a", 4, "verifier.colum: the key is unknown"),
        ("kind: math, column: a", "kind: maths", 4, "verifier: Input tag 'maths'"),
        ("kind: math, column: a", "kind: remote, url: 'http://a'", 1, "a verifier cannot be of kind 'remote'"),
        ("verifier: {kind: math, column: a}\n", "", 1, "a task has either choices or a verifier"),
        ("data: sums.jsonl\n", "", 1, "data: the key is missing"),
        ("name: sums", "name: Sums!", 1, "name: String should match"),
    ],
)
def test_wrong_tasks_are_refused_with_their_line(folder: Path, old: str, new: str, line: int, said: str) -> None:
    (folder / "wrong.yaml").write_text(SUMS.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_own_task(folder / "wrong.yaml")
    assert str(caught.value).startswith(f"{folder}/wrong.yaml, line {line}: {said}")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{{ q }}", "{{ question }}", "'question' is undefined; the row has q, a, options."),
        ("{{ q }}", "{{ q", "Correct it."),
        ("max_new_tokens: 8", 'shots: {count: 6, answer: "{{ a }}"}', "6 rows are too few for 6 examples"),
        ("data: sums.jsonl", "data: DATA/x/y", "--data is not set"),
        ("data: sums.jsonl", "data: sum.jsonl", "does not exist"),
    ],
)
def test_wrong_templates_and_data_are_refused(folder: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        prompts(task(folder, SUMS.replace(old, new)))
    assert said in str(caught.value)


def hub(folder: Path) -> Path:
    """Rows in the columns of the built-in tasks' public data sets, two in each split."""
    code = [
        {"task_id": f"HumanEval/{n}", "prompt": f'def f{n}(x):\n    """Add {n}."""\n', "entry_point": f"f{n}",
         "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n"} for n in range(2)
    ]  # fmt: skip
    mbpp = [
        {"task_id": n, "text": f"Write a function f{n} that adds {n}.", "code": f"def f{n}(x):\r\n  return x + {n}",
         "test_list": [f"assert f{n}(1) == {n + 1}", f"assert f{n}(5) == {n + 5}"], "test_setup_code": ""}
        for n in range(4)
    ]  # fmt: skip
    c3 = [
        {"context": ["男：你好。", "女：再见。"], "question": "谁说再见？", "choice": ["男", "女"], "answer": "女"}
    ] * 2
    cmath = [{"question": f"{n}加{n}等于几？", "golden": str(2 * n)} for n in range(4)]
    ifeval = [{"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}] * 2
    for path, rows in (
        ("openai/openai_humaneval/test", code),
        ("weitianwen/cmath/test", cmath),
        ("weitianwen/cmath/validation", cmath),
        ("google/IFEval/train", ifeval),
    ):
        write_rows(folder / f"{path}.jsonl", rows)
    for repository, name, splits in (
        ("google-research-datasets/mbpp", "full", {"test": mbpp[:2], "prompt": mbpp}),
        ("clue/clue", "c3", {"validation": c3}),
    ):
        files = "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in splits)
        card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
        for split, rows in splits.items():
            write_rows(folder / repository / name / f"{split}.jsonl", rows)
        (folder / repository / "README.md").write_text(card)
    return folder


def test_the_built_in_tasks_run(tmp_path: Path) -> None:
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    judged = ["alignbench", "alpaca_eval", "arena_hard", "mt_bench"]  # their tests are in test_judged_tasks.py
    assert names == sorted(["c3", "cmath", "humaneval", "ifeval", "mbpp", *judged])
    names = [name for name in names if name not in judged]
    with pytest.raises(UserError) as caught:
        resolve(names, data=tmp_path)
    for folder in ("clue/clue", "weitianwen/cmath", "openai/openai_humaneval", "google/IFEval"):
        assert str(caught.value).count(f"hf download --repo-type dataset {folder} ") == 1
    tasks = {found.name: found for found in resolve(names, data=hub(tmp_path)).tasks}

    def value(name: str, reply: Callable[[str, int], Any]) -> list[float | None]:
        found = tasks[name]
        assert isinstance(found, YamlTask)
        return [next(iter(v.values.values())) for v in scored(found, reply).verdicts]

    assert value("c3", lambda target, number: -1.0 if target == "女" else -2.0) == [1.0, 1.0]
    assert value("cmath", lambda text, _: "答案是4。") == [0.0, 0.0, 1.0, 0.0]
    assert value("humaneval", lambda text, _: "    return x + 1\n") == [0.0, 1.0]
    assert value("ifeval", lambda text, _: "None, here.") == [0.0, 0.0]

    def program(text: str, _: int) -> str:
        assert text.endswith("```python\n")
        assert text.count("```") == 7  # three examples are closed, and the answer is open
        return "def f1(x):\n    return x + 1\n"

    assert value("mbpp", program) == [0.0, 1.0]
    assert prompts(tasks["mbpp"])[0].startswith(  # type: ignore[arg-type]
        "# Write a function f0 that adds 0.\n# The function must pass these tests:\n# assert f0(1) == 1\n"
        "# assert f0(5) == 5\n```python\ndef f0(x):\n  return x + 0\n```\n\n# Write"
    )


def test_programs_need_a_sandbox_or_consent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"p": "def f():"}\n')
    file = tmp_path / "t.yaml"
    file.write_text('name: t\ndata: rows.jsonl\nprompt: "{{ p }}"\nverifier: {kind: code}\n')
    (task,) = resolve([str(file)]).tasks
    assert isinstance(task, YamlTask)
    assert not task.runs_unsafe_code
    monkeypatch.setattr(own_task, "missing_wall", lambda: "no Landlock")
    with pytest.raises(UserError, match=r"t: this machine cannot confine .* no Landlock\. .* --unsafe-code"):
        resolve([str(file)])
    found = resolve([str(file)], unsafe_code=True)
    (task,) = found.tasks
    assert isinstance(task, YamlTask)
    assert task.runs_unsafe_code
    assert found.notes == ["UNSAFE: t runs the model's programs with this user's rights, unconfined"]
