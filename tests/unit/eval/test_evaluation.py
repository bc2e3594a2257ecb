"""`evaluate`: resume, rescoring, order, samples and comparison, with a model that answers without weights."""

from __future__ import annotations

import json
import random
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.errors import UserError
from align.eval import Options, evaluate, evaluation
from align.eval.answering import choose
from align.eval.pairing import compare_folders
from align.eval.report.formatting import number as shown_number
from align.eval.results import Results
from tests.unit.eval.local_tasks import StandIn, make_tokenizer, save_checkpoint, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(folder / "a")
    save_checkpoint(folder / "b", seed=1)
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Stand-ins that `evaluate` has opened, the last one last."""
    opened: list[StandIn] = []

    def open_model(checkpoint: Path, tokenizer: Any, engine: Any) -> StandIn:
        opened.append(StandIn(make_tokenizer(), engine.max_length))
        return opened[-1]

    monkeypatch.setattr(evaluation, "open_model", open_model)
    return opened


def run(folder: Path, out: Path, tasks: list[str] | None = None, **settings: Any) -> Results:
    flags = {name: settings.pop(name) for name in ("resume", "rescore") if name in settings}
    files = tasks or [str(file) for file in sorted((folder / "tasks").glob("*.yaml"))]
    checkpoints = settings.pop("checkpoints", [folder / "a"])
    return evaluate(checkpoints, files, out=out, options=Options(dtype="float32", **settings), **flags)


def files(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in ("results.json", "results.md", "a/scores.jsonl")}


def test_an_interrupted_evaluation_resumes_to_the_same_report(
    folder: Path, tmp_path: Path, models: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after each of several numbers of answers; nothing is answered twice."""
    run(folder, tmp_path / "whole")
    expected, requests = files(tmp_path / "whole"), models[-1].answered
    assert len(requests) > 100
    monkeypatch.setattr("align.eval.answering.RECORDS_AT_A_TIME", 1)
    answered = []
    for stop in (0, 1, 40, 60):
        stand_in = StandIn(make_tokenizer(), stop_after=stop)
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "open_model", lambda *_, m=stand_in: m)
            with pytest.raises(KeyboardInterrupt):
                run(folder, tmp_path / "parts", resume=True)
        answered += stand_in.answered
    with open(tmp_path / "parts" / "a" / "records.jsonl", "ab") as records:
        records.write(b'{"task": "al_choice", "vers')  # what a killed process leaves
    run(folder, tmp_path / "parts", resume=True)
    answered += models[-1].answered
    assert files(tmp_path / "parts") == expected
    assert Counter(answered) == Counter(requests)
    opened, recorded = len(models), (tmp_path / "parts" / "a" / "records.jsonl").read_bytes()
    run(folder, tmp_path / "parts", resume=True)
    assert len(models) == opened  # a complete evaluation needs no model
    assert (tmp_path / "parts" / "a" / "records.jsonl").read_bytes() == recorded
    assert files(tmp_path / "parts") == expected


def test_rescoring_needs_no_model_and_gives_the_same_scores(
    folder: Path, tmp_path: Path, models: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(evaluation, "open_model", None)
    monkeypatch.setattr("align.train.checkpoint.load_tokenizer", None)
    scores = tmp_path / "a" / "scores.jsonl"
    scores.unlink()
    run(folder, tmp_path, rescore=True)
    assert files(tmp_path)["a/scores.jsonl"] == before["a/scores.jsonl"]
    content = json.loads(before["results.json"])["models"]["a"]["tasks"]
    again = json.loads(files(tmp_path)["results.json"])["models"]["a"]["tasks"]
    assert {task: found["metrics"] for task, found in content.items()} == {
        task: found["metrics"] for task, found in again.items()
    }


def test_rescoring_leaves_out_documents_without_all_their_records(
    folder: Path, tmp_path: Path, models: list[StandIn]
) -> None:
    """A document with three of its four choices would get a wrong score."""
    task = [str(folder / "tasks" / "al_choice.yaml")]
    run(folder, tmp_path, task)
    path = tmp_path / "a" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    dropped = json.loads(lines[5])["place"][0]
    path.write_text("".join(lines[:5] + lines[6:]))
    results = run(folder, tmp_path, task, rescore=True)
    found = results.content["models"]["a"]["tasks"]["al_choice"]
    assert (found["missing"], found["metrics"]["acc"]["n"]) == (1, 15)
    assert dropped not in {row["document"] for row in results.verdicts("a", "al_choice")}
    assert any("1 of 16 documents lack records" in note for note in results.content["notes"])


def test_scores_do_not_depend_on_the_order_of_the_tasks_or_on_their_number(
    folder: Path, tmp_path: Path, models: list[StandIn]
) -> None:
    run(folder, tmp_path / "whole", samples=1, temperature=0.7)
    whole = {(r["task"], r["document"]): r for r in rows(tmp_path / "whole")}
    names = [str(file) for file in (folder / "tasks").glob("*.yaml")]
    random.Random(1).shuffle(names)
    for number, chosen in enumerate((names[::-1], names[:2], names[3:4])):
        run(folder, tmp_path / str(number), chosen, temperature=0.7, limit=[None, 5, 9][number])
        found = rows(tmp_path / str(number))
        assert found
        assert all(whole[r["task"], r["document"]] == r for r in found)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "a" / "scores.jsonl").read_text().splitlines()]


def test_a_larger_limit_adds_documents(tmp_path: Path) -> None:
    documents = [str(i) for i in range(100)]
    smaller, larger = choose(documents, 10, "t", 0), choose(documents, 30, "t", 0)
    assert set(smaller) < set(larger)
    assert len(larger) == 30
    assert smaller == sorted(smaller, key=int)
    assert smaller != documents[:10]
    assert choose(documents, 10, "t", 1) != smaller
    assert choose(documents, 200, "t", 0) == choose(documents, None, "t", 0) == documents


def test_samples_are_clusters_and_greedy_samples_are_refused(
    folder: Path, tmp_path: Path, models: list[StandIn]
) -> None:
    task = [str(folder / "tasks" / "al_generate.yaml")]
    with pytest.raises(UserError, match="decodes greedily"):
        run(folder, tmp_path / "greedy", task, samples=2)
    results = run(folder, tmp_path / "k", task, samples=3, temperature=1.0)
    found = results.content["models"]["a"]["tasks"]["al_generate"]
    assert found["metrics"]["exact_match (first)"]["n"] == 48
    assert found["completions"] == 48
    assert {r.seed for r in models[-1].answered} == {r.seed for r in set(models[-1].answered)}
    assert len({(r.prompt_ids, r.seed) for r in models[-1].answered}) == 48
    assert "cluster" in found["metrics"]["exact_match (letter)"]["method"]


def test_results_of_another_checkpoint_are_not_reused(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    """The answers of one model must never be served as another's."""
    task = [str(folder / "tasks" / "al_letters.yaml")]
    run(folder, tmp_path, task, checkpoints={"x": folder / "a"})
    count = len(models[-1].answered)
    run(folder, tmp_path, task, checkpoints={"x": folder / "b"}, resume=True)
    assert len(models) == 2
    assert len(models[-1].answered) == count


def test_earlier_settings_need_no_model(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    """After other settings, the answers to the first ones are found again, and are the ones that are scored."""
    task = [str(folder / "tasks" / "al_generate.yaml")]
    run(folder, tmp_path, task)
    first = rows(tmp_path)
    run(folder, tmp_path, task, temperature=1.0, resume=True)
    assert len(models) == 2
    assert rows(tmp_path) != first
    run(folder, tmp_path, task, resume=True)
    assert len(models) == 2
    assert rows(tmp_path) == first


def test_comparison_is_paired_by_document(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    """Means and counts by hand from the scores; McNemar's exact test from the discordant pairs."""
    from scipy.stats import binomtest

    task = [str(folder / "tasks" / "al_choice.yaml")]
    run(folder, tmp_path / "one", task)
    run(folder, tmp_path / "two", task, limit=12)
    path = tmp_path / "two" / "a" / "scores.jsonl"
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    for row in changed[:7]:
        row["values"]["acc"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    found = next(d for d in compare_folders(tmp_path / "one", tmp_path / "two").differences if d.metric == "acc")
    first = {r["document"]: r["values"]["acc"] for r in rows(tmp_path / "one")}
    second = {r["document"]: r["values"]["acc"] for r in changed}
    better = sum(second[d] > first[d] for d in second)
    worse = sum(second[d] < first[d] for d in second)
    assert (found.n, found.only_first, found.only_second) == (12, 4, 0)
    assert found.mean == pytest.approx((better - worse) / 12)
    assert found.changed == better + worse > 0
    assert found.p_value == pytest.approx(min(1.0, 2 * binomtest(better, better + worse).pvalue))
    assert found.low < found.mean < found.high


def test_what_is_not_compared_is_named(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    for name, tasks in (("one", ("al_target", "al_choice")), ("two", ("al_target", "al_letters"))):
        run(folder, tmp_path / name, [str(folder / "tasks" / f"{task}.yaml") for task in tasks])
    found = compare_folders(tmp_path / "one", tmp_path / "two")
    assert [d.metric for d in found.differences] == ["acc"]
    said = "\n".join(found.notes)
    assert "al_target, perplexity: not a mean over documents" in said
    assert "al_choice, acc: only one/a has it" in said
    assert "al_letters, acc: only two/a has it" in said
    path = tmp_path / "two" / "results.json"
    path.write_text(path.read_text().replace('"version": "1.0, 0 shots"', '"version": "2.0, 0 shots"'))
    with pytest.raises(UserError, match="share no scored document"):
        compare_folders(tmp_path / "one", tmp_path / "two")


def test_a_document_that_cannot_be_encoded_is_unscored_with_its_reason(
    folder: Path, tmp_path: Path, models: list[StandIn]
) -> None:
    results = run(folder, tmp_path, [str(folder / "tasks" / "al_shots.yaml")], max_length=60)
    found = results.content["models"]["a"]["tasks"]["al_shots"]
    assert found["unscored"] > 0
    assert found["metrics"]["exact_match (first)"]["n"] == 16 - found["unscored"]
    assert any("it exceeds max_length 60" in reason for reason in found["reasons"])
    assert "unscored: the prompt has" in (tmp_path / "results.md").read_text()


def test_variables_of_the_chat_template_reach_the_prompts(
    folder: Path, tmp_path: Path, models: list[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command: another value gives other prompts, so recorded answers are not reused."""
    checkpoint = tmp_path / "c"
    shutil.copytree(folder / "a", checkpoint)
    file = checkpoint / "chat_template.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: "
        "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{% endif %}"
    )
    command = ["eval", str(checkpoint), "--tasks", str(folder / "tasks" / "al_generate.yaml"), "--chat"]
    command += ["--dtype", "float32", "--out", str(tmp_path / "o")]
    main(command)
    main([*command, "--resume", "--chat-template-kwargs", '{"enable_thinking": false}'])
    capsys.readouterr()
    ends = [{make_tokenizer().decode(request.prompt_ids)[-2:] for request in model.answered} for model in models]
    assert ends == [{": "}, {"no"}]
    settings = json.loads((tmp_path / "o" / "results.json").read_text())["settings"]
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_command_writes_logs_for_inspect(
    folder: Path, tmp_path: Path, models: list[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    out, task = tmp_path / "o", str(folder / "tasks" / "al_generate.yaml")
    main(["eval", str(folder / "a"), "--tasks", task, "--out", str(out), "--limit", "3", "--write", "inspect"])
    log = out / "a" / "al_generate.eval"
    assert str(log) in capsys.readouterr().out
    with zipfile.ZipFile(log) as archive:
        samples = [json.loads(archive.read(name)) for name in archive.namelist() if name.startswith("samples/")]
    shown = {row["document"]: row["shown"]["answer"] for row in rows(out)}
    assert {sample["id"]: sample["output"]["completion"] for sample in samples} == shown
    assert len(shown) == 3


def test_the_task_of_the_documentation_runs(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Counting" in block]
    (tmp_path / "counting.py").write_text(code)
    results = run(folder, tmp_path / "out", [str(tmp_path / "counting.py")])
    found = results.content["models"]["a"]["tasks"]["counting"]
    assert (found["documents"], found["metrics"]["right"]["n"]) == (20, 20)
    prompts = {make_tokenizer().decode(request.prompt_ids) for request in models[-1].answered}
    assert "5, 6, 7," in prompts


def test_the_page_has_the_numbers_and_needs_no_network(folder: Path, tmp_path: Path, models: list[StandIn]) -> None:
    results = run(folder, tmp_path, checkpoints=[folder / "a", folder / "b"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for task, metric, values in results.rows():
        assert task in page
        assert metric in page
        for model in values.values():
            assert shown_number(model["mean"]) in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=.?(https?:|//)|<link", page)
    block = re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    samples = json.loads(block[1])["samples"]
    assert len(samples) == len({(row["task"], row["document"]) for m in "ab" for row in results.all_verdicts(m)})
