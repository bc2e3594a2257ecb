"""Score the completions of tasks, and collect the results of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.evaluation import Metric
from align.config.stages import EvaluateStage
from align.data.answers import AnswerReader
from align.data.prepare import PromptRow
from align.errors import UserError
from align.eval.data import EvaluationData
from align.eval.held_out import Accuracy, HeldOutResult
from align.eval.metrics import build_metric, measure, reference_texts
from align.eval.task import MetricResult, PromptTask, TaskResult
from align.parallel.group import from_rank_0
from align.reward.components import Component, Samples, columns
from align.reward.functions import REFERENCE
from align.reward.process import FunctionProcess
from align.rollout.base import Completion
from align.run.context import StageContext
from align.run.metrics import EVALUATION, SHARE


class TaskScorer:
    """Metrics of all tasks. Rank 0 runs verifiers and users' functions; construction and `score` are collective."""

    def __init__(
        self,
        tasks: Sequence[PromptTask],
        stage: EvaluateStage,
        context: StageContext,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.stage, self.context, self.tokenizer = stage, context, tokenizer
        self._components: dict[str, dict[str, Component]] = {}
        self._stack = ExitStack()

        def build() -> None:
            process = FunctionProcess()
            self._stack.callback(process.close)
            for task in tasks:
                self._components[task.name] = {m.label: build_metric(m, process, tokenizer) for m in task.metrics}

        from_rank_0("evaluate: load metrics", build)

    def score(self, task: PromptTask, rows: Sequence[PromptRow], completions: Sequence[Completion]) -> TaskResult:
        """Result of one model, on every rank. Raises `UserError` if a function fails on every completion."""

        def score() -> TaskResult:
            samples = Samples(rows, completions, self.tokenizer)
            return TaskResult(
                n=len(samples),
                truncated=sum(not c.finished for c in completions),
                mean_length=sum(len(c.token_ids) for c in completions) / len(completions),
                metrics={metric.label: self._measure(task, metric, samples) for metric in task.metrics},
            )

        return from_rank_0(f"evaluate: score {task.name}", score)

    def _measure(self, task: PromptTask, metric: Metric, samples: Samples) -> MetricResult:
        result, problem = measure(
            metric,
            self._components[task.name][metric.label],
            samples,
            resamples=self.stage.bootstrap,
            seed=self.context.recipe.seed,
        )
        if problem and not result.n:
            raise UserError(
                f"task '{task.name}': metric '{metric.label}' scored none of {len(samples)} completions (the last one: "
                f"{problem}); fix the function, or remove the metric."
            )
        if problem and result.unscored:
            self.context.say(f"  {task.name}, metric '{metric.label}': {result.unscored} unscored ({problem})")
        return result

    def close(self) -> None:
        self._stack.close()


class Results:
    """Content of results.json."""

    def __init__(self, stage: EvaluateStage, data: EvaluationData):
        baseline = stage.models[0]
        self.content: dict[str, Any] = {
            "models": {},
            "baseline": baseline,
            "reference": stage.reference or baseline,
            "prompts": [prompt_record(row) for row in data.prompts],
        }
        if data.tasks:
            self.content["tasks"] = {
                task.name: {
                    "temperature": task.temperature,
                    "max_new_tokens": task.max_new_tokens,
                    "models": {},
                    "prompts": [prompt_record(row) for row in rows],
                }
                for task, rows in data.tasks
            }

    def add_checkpoint(self, model: str, folder: Path) -> None:
        """Add a model that is measured on tasks of `align eval` alone."""
        self.content["models"][model] = {"checkpoint": str(folder)}

    def add_benchmarks(self, values: dict[str, Any]) -> None:
        """Add the values of tasks of `align eval`; see `align.eval.stage_tasks.comparison_values`."""
        self.content["benchmarks"] = values

    def add(self, model: str, result: HeldOutResult, texts: Sequence[str]) -> None:
        """Add a model's results on the prompts and pairs, and its completions."""
        self.content["models"][model] = result.to_dict()
        for prompt, text in zip(self.content["prompts"], texts, strict=True):
            prompt["completions"][model] = text

    def add_task(self, model: str, task: PromptTask, result: TaskResult, texts: Sequence[str]) -> None:
        """Add a model's results on a task, and its completions."""
        found = self.content["tasks"][task.name]
        found["models"][model] = asdict(result)
        for prompt, text in zip(found["prompts"], texts, strict=True):
            prompt["completions"][model] = text

    def add_reward_model(self, accuracy: Accuracy | None) -> None:
        if accuracy is not None:
            self.content["reward_model_accuracy"] = {"accuracy": accuracy.accuracy, "n": accuracy.n}

    def metrics(self, model: str = "") -> dict[str, float]:
        """Means by MODEL/KEY and MODEL/TASK/METRIC, for the manifest. A metric without a scored value is absent.

        model: return only this model's means, with `MODEL/` removed from the keys.
        """
        found: dict[str, float] = {}
        for name, result in self.content["models"].items():
            for key, values in result.items():
                if isinstance(values, list):
                    scored = [value for value in values if value is not None]
                    found[f"{name}/{key}"] = sum(scored) / len(scored)
            if "preference" in result:
                found[f"{name}/preference"] = result["preference"]["accuracy"]
            for task, of_task in self.content.get("tasks", {}).items():
                found |= {f"{name}/{task}/{key}": value for key, value in task_metrics(of_task["models"][name]).items()}
            for task, metrics in self.content.get("benchmarks", {}).items():
                for label, metric in metrics.items():
                    scored = [value for value in metric["models"].get(name, {}).values() if value is not None]
                    if scored:
                        found[f"{name}/{task}/{label}"] = sum(scored) / len(scored)
        if model:
            return {key.removeprefix(f"{model}/"): v for key, v in found.items() if key.startswith(f"{model}/")}
        if "reward_model_accuracy" in self.content:
            found["reward_model_accuracy"] = self.content["reward_model_accuracy"]["accuracy"]
        return found

    def line(self, model: str) -> str:
        """The model's metrics for the terminal, with the titles and units of the table of metrics."""
        parts = []
        for key, value in self.metrics(model).items():
            title, unit = key.replace("/", " "), ""  # task and metric
            if found := next((info for info in EVALUATION if info.key == key), None):
                title = found.title.replace("REFERENCE", self.content["reference"])
                title = title if title[1:2].isupper() else title[:1].lower() + title[1:]
                unit = f" {found.unit}" if found.unit not in ("", SHARE) else ""
            parts.append(f"{title} {round(value, 3) + 0.0:.3f}{unit}")  # without the sign of -0.0
        return f"  {model}: {', '.join(parts)}"


def task_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Mean of each metric of a task, NaN if a value is not finite, and the share of truncated completions."""
    metrics = {label: metric for label, metric in result["metrics"].items() if metric["n"]}
    means = {label: float("nan") if metric["not_finite"] else metric["mean"] for label, metric in metrics.items()}
    return means | {"truncated": result["truncated"] / result["n"]}


def prompt_record(row: PromptRow) -> dict[str, Any]:
    """A prompt's last turn and its reference, for a comparison side by side."""
    references = reference_texts(columns(row).get(REFERENCE))
    return {
        "prompt": row.messages[-1]["content"],
        "reference": references[0] if references else None,
        "completions": {},
    }


def decode(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Content of each completion; see `AnswerReader.text`."""
    reader = AnswerReader(tokenizer)
    return [reader.text(c.token_ids).strip() for c in completions]
