"""Evaluate stages and their tasks."""

from __future__ import annotations

from typing import Any

from .here import Here, sample_stage, wrong
from .rewards import ppo_stage

ROWS = [{"kind": "file", "path": "rows.jsonl"}]


def check(here: Here, **evaluate: Any) -> str:
    return here.check(stages={"evaluate": {"kind": "evaluate", "models": ["base"], **evaluate}})


def check_metrics(here: Here, *metrics: dict[str, Any]) -> str:
    return check(here, tasks=[{"name": "sums", "prompts": ROWS, "metrics": list(metrics)}])


@wrong("evaluate-nothing", "An evaluate stage without prompts and tasks")
def _(here: Here) -> str:
    return check(here)


@wrong("evaluate-reference-without-prompts", "A reference, and no prompts on which to measure the KL to it")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}], reference="base")


@wrong("task-unknown", "A task without prompts that is not built in")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm9k"}])


@wrong("task-without-metrics", "A task without metrics that is not built in")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "sums", "prompts": ROWS}])


@wrong("tasks-of-one-name", "Two tasks under one name")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}, {"name": "gsm8k"}])


@wrong("task-leaves-no-prompt", "A task whose completions fill the whole context")
def _(here: Here) -> str:
    return check(here, tasks=[{"name": "gsm8k"}], rollout={"max_model_length": 256})


@wrong("metric-with-weight", "A metric with a reward's setting")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "math", "weight": 2.0})


@wrong("metrics-of-one-name", "Two metrics of a task under one name")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "exact"}, {"kind": "exact", "ignore_case": True})


@wrong("metric-file-missing", "A metric's function in a file that does not exist")
def _(here: Here) -> str:
    return check_metrics(here, {"kind": "function", "path": "mine.py:score"})


@wrong("greedy-ppo", "PPO without sampling")
def _(here: Here) -> str:
    stage = ppo_stage({"kind": "exact"}) | {"rollout": {"temperature": 0.0}}
    return here.check(stages={"ppo": stage})


@wrong("greedy-pairs", "Preference pairs without sampling")
def _(here: Here) -> str:
    return here.check(stages={"pairs": sample_stage(temperature=0.0)})
