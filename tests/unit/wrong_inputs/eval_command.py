"""`align eval` and `align compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from align.config.load import load_recipe
from align.eval import own_task

from .here import Here, wrong

TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
}


def evaluate(here: Here, *arguments: str, task: str = "mine.yaml", **changes: Any) -> str:
    here.write("questions.jsonl", json.dumps({"question": "What is 2?", "answer": "2"}) + "\n")
    if not (here.folder / "mine.yaml").exists():
        here.write("mine.yaml", yaml.safe_dump(TASK | changes))
    return here.align("eval", "m=model", "--tasks", task, *arguments)


def scored(here: Here, folder: str, model: str, task: str = "t") -> None:
    row = {"task": task, "document": "0", "sample": 0, "values": {"acc": 1.0}, "reason": "", "shown": {}}
    (here.folder / folder / model).mkdir(parents=True)
    here.write(f"{folder}/{model}/scores.jsonl", json.dumps(row) + "\n")


@wrong("eval-unknown-task", "A task that the harness does not have")
def _(here: Here) -> str:
    return evaluate(here, task="gsm9k,no_such_task")


@wrong("eval-unknown-suite", "A suite that does not exist")
def _(here: Here) -> str:
    return evaluate(here, task="suite:hunyan")


@wrong("eval-suite-key", "A suite with an unknown key")
def _(here: Here) -> str:
    here.write("own.yaml", yaml.safe_dump({"title": "mine", "tasks": [{"task": "gsm8k", "shot": 4}]}))
    return evaluate(here, task="suite:own.yaml")


@wrong("eval-task-file-missing", "A task file that does not exist")
def _(here: Here) -> str:
    return evaluate(here, task="other.yaml")


@wrong("eval-task-file-yaml", "A task file that is not valid YAML")
def _(here: Here) -> str:
    here.write("mine.yaml", "task: mine\ndoc_to_text: [1,\n")
    return evaluate(here)


@wrong("eval-task-file-python", "A Python task file that defines no task")
def _(here: Here) -> str:
    here.write("mine.py", "task = 1\n")
    return evaluate(here, task="mine.py")


@wrong("eval-task-file-python-broken", "A Python task file that fails")
def _(here: Here) -> str:
    here.write("mine.py", "import nothing_like_this\n")
    return evaluate(here, task="mine.py")


@wrong("eval-task-file-python-missing", "A Python task file that does not exist")
def _(here: Here) -> str:
    return evaluate(here, task="other.py")


@wrong("eval-task-twice", "A task that is listed twice")
def _(here: Here) -> str:
    return evaluate(here, task="mine.yaml,mine.yaml")


@wrong("eval-no-task", "An empty list of tasks")
def _(here: Here) -> str:
    return evaluate(here, task=" , ")


@wrong("eval-data-missing", "Data sets that are not in --data")
def _(here: Here) -> str:
    """All folders are named, not only the first."""
    (here.folder / "data").mkdir()
    here.write("other.yaml", yaml.safe_dump(TASK | {"task": "other", "dataset_path": "org/other"}))
    return evaluate(here, "--data", "data", task="mine.yaml,other.yaml", dataset_path="org/mine")


@wrong("eval-no-data-folder", "A folder of --data that does not exist")
def _(here: Here) -> str:
    return evaluate(here, "--data", "nowhere")


@wrong("eval-data-unreadable", "A data set that cannot be read", r"(?<=from 'json' \().+(?=\))")
def _(here: Here) -> str:
    return evaluate(here, dataset_kwargs={"data_files": {"test": "absent.jsonl"}})


@wrong("eval-generation-setting", "A generation setting that is not supported")
def _(here: Here) -> str:
    return evaluate(here, generation_kwargs={"until": ["."], "repetition_penalty": 1.2})


@wrong("eval-more-shots-than-examples", "More fixed examples than the task has")
def _(here: Here) -> str:
    here.write("own.yaml", yaml.safe_dump({"title": "mine", "tasks": [{"task": "mine.yaml", "shots": 4}]}))
    return evaluate(here, task="suite:own.yaml", fewshot_split="test")


@wrong("eval-greedy-samples", "Several samples of greedy decoding")
def _(here: Here) -> str:
    return evaluate(here, "--samples", "4")


@wrong("eval-limit", "A limit of no documents")
def _(here: Here) -> str:
    return evaluate(here, "--limit", "0")


@wrong("eval-temperature", "A temperature below 0")
def _(here: Here) -> str:
    return evaluate(here, "--temperature", "-1")


@wrong("eval-template-variables-without-chat", "Template variables for tasks that do not use the chat template")
def _(here: Here) -> str:
    return evaluate(here, "--chat-template-kwargs", '{"enable_thinking": false}')


@wrong("eval-template-variable-unknown", "A template variable that the chat template does not read")
def _(here: Here) -> str:
    return evaluate(here, "--chat", "--chat-template-kwargs", '{"enable_thinking": false}')


@wrong("eval-max-length", "A length above the model's positions")
def _(here: Here) -> str:
    return evaluate(here, "--max-length", "4096")


@wrong("eval-out-has-records", "A folder that has records, without --resume")
def _(here: Here) -> str:
    (here.folder / "evaluation/m").mkdir(parents=True)
    here.write("evaluation/m/records.jsonl", "")
    return evaluate(here)


@wrong("eval-rescore-nothing", "Rescoring a folder without records")
def _(here: Here) -> str:
    return evaluate(here, "--rescore")


@wrong("eval-damaged-records", "Records that cannot be read", r"(?<=align \().+(?=\))")
def _(here: Here) -> str:
    (here.folder / "evaluation/m").mkdir(parents=True)
    here.write("evaluation/m/records.jsonl", '{"task": "mine"}\n')
    return evaluate(here, "--resume")


@wrong("eval-checkpoint-twice", "A checkpoint that is listed twice")
def _(here: Here) -> str:
    return here.align("eval", "model", "model", "--tasks", "mine.yaml")


@wrong("eval-some-named", "Some checkpoints with a name")
def _(here: Here) -> str:
    return here.align("eval", "model", "b=model", "--tasks", "mine.yaml")


@wrong("eval-equal-names", "Two checkpoints with the same name")
def _(here: Here) -> str:
    return here.align("eval", "a=model", "a=other", "--tasks", "mine.yaml")


@wrong("eval-no-such-checkpoint", "A checkpoint that does not exist")
def _(here: Here) -> str:
    return here.align("eval", "absent", "--tasks", "mine.yaml")


@wrong("eval-group-of-nothing", "A group that lists a task that does not exist")
def _(here: Here) -> str:
    here.write("mine.yaml", yaml.safe_dump({"group": "mine", "task": ["absent"]}))
    return evaluate(here)


@wrong("eval-not-a-harness-task", "A YAML file that is not a task")
def _(here: Here) -> str:
    here.write("mine.yaml", yaml.safe_dump({"title": "mine"}))
    return evaluate(here)


@wrong("eval-without-harness", "A harness task without lm-evaluation-harness")
def _(here: Here) -> str:
    here.monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    return evaluate(here)


@wrong("compare-no-results", "Comparing a folder without results")
def _(here: Here) -> str:
    scored(here, "a", "m")
    Path("b").mkdir()
    return here.align("compare", "a", "b")


@wrong("compare-one", "Comparing one model")
def _(here: Here) -> str:
    scored(here, "a", "m")
    return here.align("compare", "a")


@wrong("compare-same-name", "Comparing two results under one name")
def _(here: Here) -> str:
    scored(here, "a", "m")
    scored(here, "b", "m")
    return here.align("compare", "x=a", "x=b")


@wrong("compare-other-tasks", "Comparing evaluations without a common task")
def _(here: Here) -> str:
    scored(here, "a", "m")
    scored(here, "b", "m", task="u")
    return here.align("compare", "a", "b")


@wrong("compare-unnamed-pairs", "Comparing preference pairs that an earlier version has scored")
def _(here: Here) -> str:
    for model in ("a", "b"):
        here.write("out/pairs.json", "{}")
        here.write(f"out/{model}/pairs.jsonl", '{"chosen": 1.0, "rejected": 0.0}\n')
    return here.align("compare", "out")


@wrong("compare-damaged-results", "Comparing an evaluation with damaged results")
def _(here: Here) -> str:
    for model in ("a", "b"):
        scored(here, "out", model)
    here.write("out/results.json", "[]")
    return here.align("compare", "out")


@wrong("eval-tasks-or-pairs", "`align eval` without tasks and without pairs")
def _(here: Here) -> str:
    return here.align("eval", "model")


def pairs(here: Here, *arguments: str, rejected: str = "c") -> str:
    """Evaluate reward models on one pair."""
    here.write("mine.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": rejected}) + "\n")
    return here.align("eval", "model", "--pairs", "mine.jsonl", *arguments)


@wrong("eval-pairs-none", "`align eval --pairs` with a file without usable pairs")
def _(here: Here) -> str:
    return pairs(here, rejected="b")


@wrong("eval-pairs-subset", "`align eval --subset` with a column that no pair has")
def _(here: Here) -> str:
    return pairs(here, "--subset", "kind")


@wrong("eval-pairs-language-model", "`align eval --pairs` with a model without a scalar head")
def _(here: Here) -> str:
    return pairs(here)


@wrong("eval-contamination-nothing", "`align eval --contamination` with a folder that does not exist")
def _(here: Here) -> str:
    return evaluate(here, "--contamination", "nothing")


@wrong("eval-contamination-no-data", "`align eval --contamination` with a run without training data")
def _(here: Here) -> str:
    rows = [{"kind": "file", "path": "rows.jsonl"}]
    here.recipe(stages={"compare": {"kind": "evaluate", "models": ["base"], "prompts": rows}})
    here.write("run/recipe.json", load_recipe("recipe.yaml").model_dump_json())
    return evaluate(here, "--contamination", "run")


@wrong("eval-no-sandbox", "A task with programs, on a machine that cannot confine them")
def _(here: Here) -> str:
    here.monkeypatch.setattr(own_task, "missing_wall", lambda: "darwin has neither Landlock nor seccomp")
    here.write("code.yaml", 'name: t\ndata: rows.jsonl\nprompt: "{{ p }}"\nverifier: {kind: code}\n')
    return evaluate(here, task="code.yaml")


@wrong("eval-adapter-no-name", "`align eval --adapter` without a name")
def _(here: Here) -> str:
    return evaluate(here, "--adapter", "model")


@wrong("eval-adapter-twice", "`align eval --adapter` twice with the same name")
def _(here: Here) -> str:
    return evaluate(here, "--adapter", "a=one", "--adapter", "a=two")


@wrong("eval-adapter-name-of-base", "`align eval --adapter` with the name of the checkpoint")
def _(here: Here) -> str:
    return evaluate(here, "--adapter", "m=adapter")


@wrong("eval-adapter-several-bases", "`align eval --adapter` with several checkpoints")
def _(here: Here) -> str:
    return here.align("eval", "a=model", "b=model", "--adapter", "c=adapter", "--tasks", "mine.yaml")


@wrong("eval-adapter-pairs", "`align eval --adapter` with preference pairs")
def _(here: Here) -> str:
    return pairs(here, "--adapter", "a=adapter")


@wrong("eval-adapter-not-one", "`align eval --adapter` with a folder that is not an adapter")
def _(here: Here) -> str:
    return evaluate(here, "--adapter", "a=model")
