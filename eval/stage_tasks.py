"""Tasks of `align eval` in a recipe: their options, their errors, and the values that a run's report compares."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.evaluation import TaskOptions
from align.config.paths import local_path
from align.config.stages import EvaluateStage
from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from align.eval.evaluation import CheckpointEngine
from align.eval.judges.panel import open_judges
from align.eval.opening import Backend
from align.eval.pairing import document_values
from align.eval.resolve import resolve
from align.eval.results import Results
from align.eval.task_run import Options, TaskRun
from align.parallel.group import from_rank_0, is_main
from align.run.context import StageContext
from align.run.folder import remove_folder

FOLDER = "tasks"
"""Folder of the results in the stage's folder; it has the layout of `align eval --out`."""


def run_options(
    settings: TaskOptions, context: StageContext, *, backend: Backend, cache_gib: float | None = None
) -> Options:
    """The options of `align eval` that a section of a recipe describes."""
    values = {name: getattr(settings, name) for name in TaskOptions.model_fields}
    return Options(
        **{**values, "data": data_folder(settings), "judges": tuple(settings.judges)},
        backend=backend,
        dtype=context.recipe.dtype,
        cache_gib=cache_gib,
        parallel=context.recipe.parallel,
    )


def data_folder(settings: TaskOptions) -> Path | None:
    return None if settings.data is None else local_path(settings.data).absolute()


def section_of(field: str) -> str:
    """The section with the options of the tasks in `field`: `options` beside `tasks`, otherwise the field's own."""
    return field.rpartition(".")[0] or "options"


@contextmanager
def as_in_recipe(where: str, field: str) -> Iterator[None]:
    """Let a `UserError` about an option of `align eval` name the setting of the recipe.

    where: the stage. field: dotted path of its tasks.
    """
    try:
        yield
    except UserError as error:
        section = section_of(field)
        flags = {f"--{name.replace('_', '-')}": name for name in TaskOptions.model_fields} | {"--judge": "judges"}
        text = re.sub(r"--[a-z-]+[a-z]", lambda m: f"{section}.{flags[m[0]]}" if m[0] in flags else m[0], str(error))
        raise UserError(f"{where}.{field}: {text}") from None


def require_tasks(where: str, field: str, names: Sequence[str], settings: TaskOptions) -> None:
    """Raise `UserError` for tasks that are unknown or invalid, or whose data is missing. No data is read."""
    with as_in_recipe(where, field):
        data = data_folder(settings)
        if data is not None and not data.is_dir():
            raise UserError(f"--data {data}: no such folder. Set it to the folder that holds the data sets.")
        judges = open_judges(settings.judges, Path(), model=settings.judge_model, contact=False)
        resolve(names, data=data, chat=settings.chat, judges=judges, load=False)


def run_tasks(stage: EvaluateStage, context: StageContext) -> dict[str, Any]:
    """Measure the stage's checkpoints on its tasks with one engine; returns the values for results.json.

    Under `parallel` the models are sharded over the ranks, which share the forward passes of transformers.
    """
    where, folder = f"stages.{context.name}", context.dir / FOLDER
    if not context.resume:
        from_rank_0("evaluate: remove earlier answers", lambda: remove_folder(folder))
    shards = context.recipe.parallel is not None
    backend: Backend = "hf" if shards or stage.rollout.engine == "huggingface" else "vllm"
    options = run_options(stage.options, context, backend=backend, cache_gib=stage.rollout.cache_gib)
    engine = "transformers, sharded over the ranks" if shards else {"hf": "transformers", "vllm": "vLLM"}[backend]
    context.say(f"  tasks {', '.join(stage.task_names)}: with {engine}")
    with as_in_recipe(where, "tasks"):
        task_run = TaskRun(stage.task_names, folder, options, lambda line: context.status(f"  {line}"))

        def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
            set_template_defaults(tokenizer, stage.chat_template_kwargs, f"{where}.chat_template_kwargs")

        with closing(CheckpointEngine(options, lambda line: context.status(f"  {line}"), prepare)) as checkpoints:
            for name in stage.models:
                checkpoint = context.checkpoint(name)
                measured = checkpoints.measured(folder_name(name), checkpoint)
                found = task_run.measure(measured)
                task_run.add(measured.name, {"checkpoint": str(checkpoint), "dtype": checkpoints.dtype}, found)
                context.say(f"  {name}: {shown_metrics(found)}")
    if not is_main():
        return {}
    task_run.results.write()
    for note in task_run.results.content["notes"]:
        context.say(f"  note: {note}")
    return comparison_values(task_run.results, {folder_name(name): name for name in stage.models})


def folder_name(model: str) -> str:
    """Name of a model in the results, which is also the name of a folder: the stage's, or the path without slashes."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def comparison_values(results: Results, names: Mapping[str, str]) -> dict[str, Any]:
    """By task and metric, the value of each document for each model: the mean over its samples.

    A group of tasks replaces its tasks. Metrics that are not means over documents are only in the folder's own results.
    names: name in results.json of each model in `results`.
    """
    found: dict[str, Any] = {}
    for model, of_model in results.content["models"].items():
        members = {task for result in of_model["tasks"].values() for task in result.get("members", ())}
        for (task, metric), values in document_values(results.folder / model, of_model["tasks"]).items():
            if task not in members:
                entry = found.setdefault(task, {}).setdefault(metric, {"models": {}})
                entry["better"] = of_model["tasks"][task]["metrics"].get(metric, {}).get("better", 1)
                entry["models"][names[model]] = values
    return found


def metric_values(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of `TaskRun.measure` by TASK/METRIC."""
    return {
        f"{task}/{metric}": values for task, result in tasks.items() for metric, values in result["metrics"].items()
    }


def shown_metrics(tasks: Mapping[str, Any]) -> str:
    """The metrics in one line for the log."""
    parts = []
    for name, metric in metric_values(tasks).items():
        if metric["mean"] is None:
            parts.append(f"{name} unknown")
            continue
        interval = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
        parts.append(f"{name} {metric['mean']:.4f}{interval} (n {metric['n']})")
    return "  ".join(parts)
