"""Tasks of `align eval` in an evaluate stage: the same numbers as the command's, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.eval import Options, evaluate
from align.eval.results import Results
from align.pipeline import run
from tests.integration import runs
from tests.unit.eval.test_evaluate import quiet, recipe

TASKS = {
    "letters": 'data: {path: rows.jsonl}\nprompt: "{{ prompt }}"\nchoices: [a, b, c]\nanswer: "{{ letter }}"\n',
    "words": "data: {path: rows.jsonl}\nprompt: '{{ prompt }}'\nverifier: {kind: regex, pattern: '[aeiou]'}\n"
    "max_new_tokens: 6\n",
}
MODELS = ["base", "other"]


def stage(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = [{"prompt": f"Say {n}.", "letter": n % 3} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    tasks = [str(folder / f"{name}.yaml") for name in TASKS]
    options = {"limit": 9, "batch_size": 2}
    return {"prompts": [], "models": ["base", f"{folder}/other/base"], "tasks": tasks, "options": options} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, a second model in other/, and a finished run in single/."""
    folder = tmp_path_factory.mktemp("tasks")
    other = recipe(folder, prompts=[], tasks=[{"name": "gsm8k"}]).model_copy(update={"seed": 7})
    run(other, folder / "other", only="base", say=quiet)
    run(recipe(folder, **stage(folder)), folder / "single", say=quiet)
    return folder


def of(run_dir: Path) -> Results:
    return Results.read(run_dir / "evaluate" / "tasks")


def test_the_stage_and_the_command_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    models = dict(zip(of(folder / "single").models, [folder / "single" / "base", folder / "other" / "base"]))
    assert len(models) == 2
    settings = Options(backend="hf", dtype="float32", limit=9)
    tasks = [str(folder / f"{name}.yaml") for name in TASKS]
    command = evaluate(models, tasks, out=tmp_path, options=settings)
    for model in models:
        ours = of(folder / "single").all_verdicts(model)
        assert ours == command.all_verdicts(model)
        assert len(ours) == 18
    assert list(of(folder / "single").rows()) == list(command.rows())


def test_the_report_compares_the_models_on_the_tasks(folder: Path) -> None:
    """The run's report has the means of the tasks, and a difference paired by document."""
    report = json.loads((folder / "single" / "report.json").read_text())
    (evaluation,) = report["evaluations"]
    keys = [metric["key"] for metric in evaluation["metrics"]]
    assert keys == ["task/letters/acc", "task/letters/acc_norm", "task/words/regex"]
    base, other = of(folder / "single").models
    for metric in evaluation["metrics"]:
        _, task, label = metric["key"].split("/")
        for name, model in (("base", base), (f"{folder}/other/base", other)):
            values = of(folder / "single").content["models"][model]["tasks"][task]["metrics"][label]
            assert metric["models"][name]["mean"] == values["mean"]
            assert metric["models"][name]["n"] == 9
        (difference,) = metric["differences"]
        assert difference["n"] == 9
        means = [metric["models"][difference[key]]["mean"] for key in ("model", "against")]
        assert difference["mean"] == pytest.approx(means[0] - means[1])
    manifest = json.loads((folder / "single" / "evaluate" / "manifest.json").read_text())
    assert manifest["metrics"]["base/letters/acc"] == evaluation["metrics"][0]["models"]["base"]["mean"]


def test_a_changed_task_is_a_changed_input(folder: Path) -> None:
    settings = recipe(folder, **stage(folder))
    assert run(settings, folder / "single", say=quiet) is None
    for name in ("words.yaml", "rows.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n")
        with pytest.raises(UserError, match=f"{name} has changed since this stage was run"):
            run(settings, folder / "single", say=quiet)
        (folder / name).write_text(text)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(folder: Path, tmp_path: Path) -> None:
    """ZeRO-3 with half of the experts on each rank. The ranks share the batches; the last batch is repeated."""
    recipe(folder, **stage(folder))
    runs.run(folder / "recipe.yaml", tmp_path / "two", "--nproc", "2", "parallel.expert_parallel_size=2", forks=True)
    assert list(of(tmp_path / "two").rows()) == list(of(folder / "single").rows())
    for model in of(tmp_path / "two").models:
        found, expected = (
            [json.loads(line) for line in (path / "evaluate" / "tasks" / model / "records.jsonl").open()]
            for path in (tmp_path / "two", folder / "single")
        )
        text = {(record["task"], *record["place"]): record["text"] for record in found}
        assert text == {(record["task"], *record["place"]): record["text"] for record in expected}
        assert len(found) == len(expected)  # nothing is answered twice
