"""Evaluate stages and their tasks."""

from __future__ import annotations

from typing import Any

from .here import IN_PARENTHESES, Here, sample_stage, wrong
from .rewards import ppo_stage

ROWS = [{"kind": "file", "path": "rows.jsonl"}]


def check(here: Here, **evaluate: Any) -> str:
    return here.check(stages={"evaluate": {"kind": "evaluate", "models": ["base"], **evaluate}})


def check_metrics(here: Here, *metrics: dict[str, Any]) -> str:
    return check(here, tasks=[{"name": "sums", "prompts": ROWS, "metrics": list(metrics)}])


@wrong("evaluate-nothing", "An evaluate stage without prompts and tasks")
def _(here: Here) -> str:
    return check(here)


@wrong("evaluate-reference-without-prompts", "An evaluate stage with a reference but without prompts")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}], reference="base")


@wrong("evaluate-reference-greedy", "A reference for the KL with greedy decoding")
def _(here: Here) -> str:
    return check(here, prompts=ROWS, reference="base", rollout={"temperature": 0.0})


@wrong("evaluate-task-unknown", "A task in an evaluate stage that lm-evaluation-harness does not have")
def _(here: Here) -> str:
    return check(here, tasks=["gsm9k_cot"])


@wrong("evaluate-task-file", "A task's file that does not exist, in an evaluate stage")
def _(here: Here) -> str:
    return check(here, tasks=["sums.yaml"])


@wrong("evaluate-task-data", "A task in an evaluate stage without its data")
def _(here: Here) -> str:
    (here.folder / "hub").mkdir()
    return check(here, tasks=["gsm8k_cot"], options={"data": "hub"})


@wrong("evaluate-task-folder", "A folder of data sets that does not exist, in an evaluate stage")
def _(here: Here) -> str:
    return check(here, tasks=["gsm8k_cot"], options={"data": "hub"})


@wrong("evaluate-task-remote", "A task that needs log-probabilities with rollout servers")
def _(here: Here) -> str:
    return check(here, tasks=["gsm8k_cot"], rollout={"engine": "remote", "start_servers": 1})


@wrong("evaluate-options", "Options of tasks without such tasks")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}], options={"limit": 10})


def check_during(here: Here, **evaluate: Any) -> str:
    """The sentence about `evaluate` of an SFT stage."""
    return here.check(evaluate={"every": 10, "tasks": ["gsm8k_cot"], **evaluate})


@wrong("during-task-unknown", "A task of an evaluation during training that lm-evaluation-harness does not have")
def _(here: Here) -> str:
    return check_during(here, tasks=["gsm9k_cot"])


@wrong("during-data", "A folder of data sets that does not exist, of an evaluation during training")
def _(here: Here) -> str:
    return check_during(here, data="hub")


@wrong("during-metric", "A metric of an evaluation during training that nothing uses")
def _(here: Here) -> str:
    return check_during(here, metric="gsm8k_cot/exact_match")


@wrong("during-metric-unknown", "A metric of an evaluation during training that its tasks do not have")
def _(here: Here) -> str:
    here.write("q.jsonl", '{"q": "Say one."}\n')
    here.write("words.yaml", "name: words\ndata: q.jsonl\nprompt: '{{ q }}'\nverifier: {kind: length, max_tokens: 4}\n")
    settings = {"every": 1, "tasks": ["words.yaml"], "max_new_tokens": 4, "keep": "best", "metric": "words/accuracy"}
    return here.run(evaluate=settings)


@wrong("during-ppo-length", "A longer context for an evaluation than PPO's rollout engine has")
def _(here: Here) -> str:
    ppo = ppo_stage({"kind": "length", "max_tokens": 8})
    return here.check(stages={"ppo": {**ppo, "evaluate": {"every": 10, "tasks": ["gsm8k_cot"], "max_length": 1024}}})


@wrong("during-reward-model", "An evaluation on tasks during the training of a reward model")
def _(here: Here) -> str:
    return here.check(kind="reward_model", evaluate={"every": 10, "tasks": ["gsm8k_cot"]})


@wrong("during-ema", "The best weights of a PPO stage that saves EMA weights")
def _(here: Here) -> str:
    evaluate = {"every": 10, "tasks": ["gsm8k_cot"], "keep": "best"}
    ppo = {**ppo_stage({"kind": "length", "max_tokens": 8}), "evaluate": evaluate, "ema_decay": 0.9}
    return here.check(stages={"ppo": ppo})


@wrong("task-unknown", "A task without prompts that is not built in")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm9k"}])


@wrong("task-name", "A task's name with capital letters")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "GSM8K"}])


@wrong("task-without-metrics", "A task without metrics that is not built in")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "sums", "prompts": ROWS}])


@wrong("tasks-of-one-name", "Two tasks under one name")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}, {"name": "gsm8k"}])


@wrong("task-leaves-no-prompt", "A task whose completions fill the whole context")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}], rollout={"max_model_length": 256})


@wrong("metric-with-weight", "A metric with a setting of rewards")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "math", "weight": 2.0})


@wrong("metric-reward-model", "A reward model as a metric of a task")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "model", "init_from": "models/reward"})


@wrong("metrics-of-one-name", "Two metrics of a task under one name")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "exact"}, {"kind": "exact", "ignore_case": True})


@wrong("metric-file-missing", "A metric's function in a file that does not exist")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "function", "path": "mine.py:score"})


@wrong("greedy-ppo", "PPO with greedy decoding")
def _(here: Here) -> str:
    stage = ppo_stage({"kind": "exact"}) | {"rollout": {"temperature": 0.0}}
    return here.check(stages={"ppo": stage})


@wrong("greedy-pairs", "Preference pairs with greedy decoding")
def _(here: Here) -> str:
    return here.check(stages={"pairs": sample_stage(temperature=0.0)})


def run(here: Here, *metrics: dict[str, Any]) -> str:
    task = {"name": "sums", "prompts": ROWS, "metrics": list(metrics)}
    rollout = {"engine": "huggingface", "max_new_tokens": 4, "max_model_length": 64}
    return here.run(stages={"evaluate": {"kind": "evaluate", "models": ["base"], "tasks": [task], "rollout": rollout}})


@wrong("metric-column-empty", "A metric on a column that no row has")
def _(here: Here) -> str:
    return run(here, {"kind": "math"})


@wrong("metric-function-fails", "A metric function that fails on every completion")
def _(here: Here) -> str:
    here.write("mine.py", "def score(prompt, completion, row):\n    return float(row['weight'])\n")
    return run(here, {"kind": "function", "path": "mine.py:score", "batched": False})


@wrong("report-damaged", "A report on a run with a damaged file", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    (here.folder / "run").mkdir()
    here.write("run/recipe.json", "{")
    return here.align("report", "run")


@wrong("report-list", "A report on a run with a list instead of an object")
def _(here: Here) -> str:
    (here.folder / "run").mkdir()
    here.write("run/recipe.json", "[]")
    return here.align("report", "run")
