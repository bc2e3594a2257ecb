"""Tasks of lm-evaluation-harness: names, data on this machine, examples, groups, and the harness's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import UserError
from align.eval import Options, evaluate, evaluation
from align.eval.encoder import Encoder
from align.eval.harness_index import Group, HarnessIndex
from align.eval.own_task import built_in_file
from align.eval.pairing import compare_folders
from align.eval.resolve import SUITES, read_suite, resolve
from align.eval.results import Metric, TaskResult, group_metrics
from align.eval.task import Scores, Verdict
from align.rollout.requests import Request
from tests.unit.eval.local_tasks import StandIn, make_tokenizer, save_checkpoint, write_tasks

LEAVES = {"mmlu": 57, "bbh_cot_fewshot": 27, "cmmlu": 67, "ceval-valid": 52, "minerva_math": 7, "mmlu_pro": 14}
"""Subtasks of the harness's groups, as in their papers."""
SIZES = {"hunyuan-base": 19, "hunyuan-instruct": 15, "quick": 5}


@pytest.mark.parametrize("suite", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_every_task_of_a_suite_exists(suite: str) -> None:
    listed = [entry.task for entry in read_suite(suite).tasks]
    assert len(listed) == SIZES[suite]
    names = [name for name in listed if built_in_file(name) is None]
    index = HarnessIndex(names)
    for name in names:
        assert index.has(name), name
        leaves = index.leaves(name)
        assert len(leaves) == LEAVES.get(name, len(leaves))
        assert all(leaf.dataset for leaf in leaves)


def test_every_missing_data_set_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a")
    monkeypatch.setattr(evaluation, "open_model", None)
    (tmp_path / "data" / "cais" / "mmlu").mkdir(parents=True)
    with pytest.raises(UserError, match="18 data sets are missing") as error:
        evaluate([tmp_path / "a"], ["suite:hunyuan-base"], out=tmp_path / "o", options=Options(data=tmp_path / "data"))
    for name in ("Rowan/hellaswag", "openai/gsm8k", "allenai/ai2_arc", "EleutherAI/hendrycks_math"):
        folder = tmp_path / "data" / name
        assert f"`hf download --repo-type dataset {name} --local-dir {folder}`" in str(error.value)
    assert "cais/mmlu --local-dir" not in str(error.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets as on the hub, with made-up rows."""
    folder = tmp_path_factory.mktemp("data")
    gsm8k = folder / "openai" / "gsm8k"
    gsm8k.mkdir(parents=True)
    configurations = {"configs": [{"config_name": "main", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (gsm8k / "README.md").write_text(f"---\n{yaml.safe_dump(configurations)}---\n")
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(20)]
    (gsm8k / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_is_read_from_the_folder_and_shots_are_as_wanted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"title": "t", "tasks": [{"task": "gsm8k_cot", "shots": 4}]}))
    for name, shots in (("gsm8k_cot", 8), (f"suite:{tmp_path / 's.yaml'}", 4)):
        (task,) = resolve([name], data=data).tasks
        assert len(task.documents()) == 20
        tokenizer = make_tokenizer()
        (first, second) = task.requests(["0", "7"], Encoder(tokenizer, 10**6))
        assert isinstance(first.request, Request)
        assert isinstance(second.request, Request)
        text = tokenizer.decode(first.request.prompt_ids)
        assert text.count("Q:") == shots + 1
        assert "What is 0 + 0?" in text
        assert "What is 7 + 7?" in tokenizer.decode(second.request.prompt_ids)
        assert first.request.temperature == 0
        assert "Q:" in first.request.stop
        assert f"{shots} shots" in task.version


def test_a_chat_has_the_examples_as_turns(data: Path) -> None:
    (task,) = resolve(["gsm8k_cot"], data=data, chat=True).tasks
    tokenizer = make_tokenizer()
    (item,) = task.requests(["3"], Encoder(tokenizer, 10**6))
    assert isinstance(item.request, Request)
    text = tokenizer.decode(item.request.prompt_ids)
    assert text.count("<|im_start|>user") == 9
    assert text.count("<|im_start|>assistant") == 9
    assert text.endswith("<|im_start|>assistant\n")
    assert "chat" in task.version


def test_drawn_examples_do_not_depend_on_the_chosen_documents(tmp_path: Path) -> None:
    """The harness draws examples in the order of the documents, from one generator."""
    write_tasks(tmp_path)
    (task,) = resolve([str(tmp_path / "al_shots.yaml")]).tasks
    encoder = Encoder(make_tokenizer(), 10**6)
    everything = {item.document: item.request for item in task.requests(task.documents(), encoder)}
    some = {item.document: item.request for item in task.requests(["11", "4", "9"], encoder)}
    assert some == {document: everything[document] for document in ("4", "9", "11")}
    # The first document has the examples that the harness draws for it.
    task.task.set_fewshot_seed(1234)
    theirs = task.task.fewshot_context(task.task.eval_docs[0], num_fewshot=2)
    assert tuple(encoder.text(theirs)) == everything["0"].prompt_ids


def test_a_groups_metrics_equal_the_harness() -> None:
    """Pooled over documents, and as the mean of means, against the harness's own aggregation."""
    from lm_eval.api.metrics import aggregate_subtask_metrics

    values = {"a": [1.0, 0.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0, 1.0]}
    scores = {n: Scores([Verdict(str(i), 0, {"acc": v}) for i, v in enumerate(found)]) for n, found in values.items()}
    means = [sum(found) / len(found) for found in values.values()]
    sizes = [len(found) for found in values.values()]

    def result(found: list[float]) -> TaskResult:
        metric = Metric(sum(found) / len(found), 0.0, 1.0, 0.1, len(found), 0, "wilson", 1)
        return TaskResult("1", len(found), len(found), 1, 0, 0, {}, 0, 0, 0, 0, 0, {"acc": metric})

    tasks = {name: result(found) for name, found in values.items()}
    for weighted in (True, False):
        group = Group("g", ["a", "b"], [{"metric": "acc", "weight_by_size": weighted}])
        found = group_metrics(group, scores, tasks, seed=0)["acc"]
        assert found.mean == pytest.approx(aggregate_subtask_metrics(means, sizes, weighted))
        assert found.n == 8
    assert found.standard_error == pytest.approx(0.1 * 2**0.5 / 2)


def test_a_group_has_a_row_and_inherits_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "a")
    write_tasks(tmp_path / "tasks")
    group: dict[str, Any] = {
        "group": "al_both",
        "task": ["al_choice", {"group": "inner", "task": ["al_letters"], "aggregate_metric_list": [{"metric": "acc"}]}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    (tmp_path / "tasks" / "al_both.yaml").write_text(yaml.safe_dump(group))
    monkeypatch.setattr(evaluation, "open_model", lambda *_: StandIn(make_tokenizer()))
    results = evaluate([tmp_path / "a"], [str(tmp_path / "tasks" / "al_both.yaml")], out=tmp_path / "o")
    tasks = results.content["models"]["a"]["tasks"]
    assert list(tasks) == ["al_both", "al_choice", "al_letters"]
    both = tasks["al_both"]["metrics"]["acc"]
    assert both["n"] == 32
    assert both["mean"] == pytest.approx(
        (tasks["al_choice"]["metrics"]["acc"]["mean"] + tasks["al_letters"]["metrics"]["acc"]["mean"]) / 2
    )
    assert "al_both" in results.table()
    (found,) = [d for d in compare_folders(tmp_path / "o", tmp_path / "o").differences if d.task == "al_both"]
    assert (found.n, found.mean, found.changed) == (32, 0.0, 0)
    assert found.first == pytest.approx(both["mean"])


def test_a_filter_without_a_match_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness scores it as wrong; the results say how often no answer was found."""
    save_checkpoint(tmp_path / "a")
    write_tasks(tmp_path / "tasks")
    file = tmp_path / "tasks" / "al_generate.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["filter_list"] = [
        {"name": "n", "filter": [{"function": "regex", "regex_pattern": "(zzz)"}, {"function": "take_first"}]}
    ]
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(evaluation, "open_model", lambda *_: StandIn(make_tokenizer()))
    results = evaluate([tmp_path / "a"], [str(file)], out=tmp_path / "o")
    found = results.content["models"]["a"]["tasks"]["al_generate"]
    assert (found["unanswered"], found["metrics"]["exact_match (n)"]["mean"]) == (16, 0.0)
