"""Evaluate the weights of a stage on tasks while it trains them.

An evaluation does not affect training: it restores the models' modes and the random states, so the training metrics are
the same with and without it. All ranks make the same calls.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase, TrainerCallback

from align.config.evaluation import EvaluateDuring
from align.errors import UserError
from align.eval.model import EvalModel
from align.eval.opening import Backend
from align.eval.results import Results
from align.eval.stage_tasks import as_in_recipe, metric_values, run_options, shown_metrics
from align.eval.task_run import Measured, TaskRun
from align.parallel.group import from_rank_0
from align.run.context import StageContext
from align.run.folder import remove_folder
from align.run.metrics import DURING
from align.train.random_state import preserved_random_state

FOLDER = "evaluation"
"""Folder of the results in the stage's folder; a model called step-N has the results after step N."""
FIELD = "evaluate.tasks"


class Weights(Protocol):
    """The trained weights of a stage. Both methods are collective."""

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        ...


@dataclass(frozen=True)
class Subject:
    """The model that a stage trains.

    tokenizer: its tokenizer. max_length: maximum tokens of prompt and completion.
    backend: engine that answers. engine: the same in words, for the log.
    model: the model with its current weights.
    close: called after each evaluation. weights: its weights.
    checkpoints: steps from which the stage may resume.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    backend: Backend
    engine: str
    model: Callable[[], EvalModel]
    close: Callable[[], None]
    weights: Weights
    checkpoints: Callable[[], Sequence[int]]


class DuringTraining:
    """The evaluations of a stage.

    record: writes metrics of a step to metrics.jsonl and to the trackers.
    history: (step, value of the metric) of each evaluation; None if no document was scored.
    """

    def __init__(
        self,
        settings: EvaluateDuring,
        context: StageContext,
        subject: Subject,
        record: Callable[[int, dict[str, float]], None],
    ):
        self.settings, self.context, self.subject, self.record = settings, context, subject, record
        self.folder = context.dir / FOLDER
        self.history: list[tuple[int, float | None]] = []
        self._better = 1
        self._metric = settings.metric
        options = run_options(settings, context, backend=subject.backend)
        with self._errors():
            self.task_run = TaskRun(settings.tasks, self.folder, options, lambda line: context.status(f"  {line}"))
        context.say(f"  evaluates every {settings.every} steps with {subject.engine}: {', '.join(settings.tasks)}")

    def begin(self, step: int) -> None:
        """Restore the results of the steps up to `step`, from which training continues; evaluate before the first."""
        found = from_rank_0("evaluate: read earlier results", lambda: self._restore(step))
        self.history = []
        for at, tasks in found:
            self._note(at, tasks)
        if not self.history:
            self.evaluate(step)

    def after_step(self, step: int, *, last: bool) -> bool:
        """Evaluate if it is time; returns True if training should stop. last: `step` is the last one."""
        if not last and step % self.settings.every:
            return False
        self.evaluate(step)
        stale = len(self.history) - 1 - self._best_index()
        if last or self.settings.patience is None or stale < self.settings.patience:
            return False
        step, value = self.history[self._best_index()]
        self.context.say(f"  stops: {self._metric} has not improved in {stale} evaluations since step {step} ({value})")
        return True

    def evaluate(self, step: int) -> None:
        """Measure the current weights and record the results as those of `step`."""
        started, name = time.perf_counter(), f"step-{step}"
        # Answers of an interrupted run are those of other weights.
        from_rank_0("evaluate: remove earlier answers", lambda: remove_folder(self.folder / name))
        subject = self.subject
        encoder = self.task_run.options.encoder(subject.tokenizer, subject.max_length)
        with self._errors(), preserved_random_state():
            try:
                measured = Measured(name, f"{self.context.name} step {step}", encoder, subject.model)
                tasks = self.task_run.measure(measured)
            finally:
                subject.close()
        self.task_run.add(name, {"checkpoint": f"step {step}", "dtype": self.context.recipe.dtype}, tasks)
        from_rank_0("evaluate: write the results", self.task_run.results.write)
        self._note(step, tasks)
        self.record(step, logged(tasks))
        seconds = time.perf_counter() - started
        self.context.say(f"  evaluation at step {step}: {shown_metrics(tasks)}  {seconds:.1f} s")
        if self.settings.keep == "best" and self._best_index() == len(self.history) - 1:
            subject.weights.save(self._best(step))
            from_rank_0("evaluate: remove other weights", self._prune)

    def finish(self) -> dict[str, float]:
        """Restore the weights of the stage's result; returns their metrics."""
        step, value = self.history[-1]
        if self.settings.keep == "best":
            best, value = self.history[self._best_index()]
            if best != step:
                self.subject.weights.load(self._best(best))
            step = best
            self.context.say(f"  keeps the weights of step {step}, the best by {self._metric} ({value})")
        metrics = from_rank_0("evaluate: read the results", lambda: self._of(f"step-{step}"))
        return {**logged(metrics), f"{DURING}step": float(step)}

    # --- parts -----------------------------------------------------------------------------------------------

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with as_in_recipe(f"stages.{self.context.name}", FIELD):
            yield

    def _of(self, name: str) -> dict[str, Any]:
        tasks: dict[str, Any] = self.task_run.results.content["models"][name]["tasks"]
        return tasks

    def _restore(self, step: int) -> list[tuple[int, dict[str, Any]]]:
        """On rank 0: keep the results up to `step` of an interrupted run; returns them by step."""
        content = self.task_run.results.content
        if self.context.resume and step and (self.folder / "results.json").is_file():
            earlier = Results.read(self.folder).content
            for name, of_model in earlier["models"].items():
                if _step(name) <= step:
                    content["models"][name] = of_model
            kept = tuple(f"{name}," for name in content["models"])
            content["notes"] += [note for note in earlier["notes"] if note.startswith(kept)]
        for folder in [*self.folder.glob("step-*"), *self._best(0).parent.glob("best-*")]:
            if f"step-{_step(folder.name)}" not in content["models"]:
                remove_folder(folder)
        return [(_step(name), of_model["tasks"]) for name, of_model in content["models"].items()]

    def _note(self, step: int, tasks: dict[str, Any]) -> None:
        """Add the metric's value at a step to the history."""
        found = metric_values(tasks)
        if self._metric is None:
            self._metric = next(iter(found), "")
        if self._metric not in found:
            raise UserError(
                f"stages.{self.context.name}.evaluate.metric: '{self._metric}' is not a metric of the tasks; set it to "
                f"one of {', '.join(found)}."
            )
        metric = found[self._metric]
        self._better = metric["better"] or 1
        self.history.append((step, metric["mean"]))

    def _best_index(self, before: int | None = None) -> int:
        """Index in the history of the first evaluation with the best value, at most at the step `before`."""
        known = [i for i, (step, _) in enumerate(self.history) if before is None or step <= before]
        return max(known or [0], key=lambda i: (self._value(i), -i))

    def _value(self, index: int) -> float:
        value = self.history[index][1]
        return float("-inf") if value is None else value * self._better

    def _best(self, step: int) -> Path:
        return self.context.dir / "checkpoints" / f"best-{step}"

    def _prune(self) -> None:
        """Remove weights that no resumed run can need: those that are not the best up to any checkpoint."""
        steps = [None, *self.subject.checkpoints()]
        needed = {self.history[self._best_index(step)][0] for step in steps}
        for folder in self._best(0).parent.glob("best-*"):
            if _step(folder.name) not in needed:
                remove_folder(folder)


class EvaluationCallback(TrainerCallback):
    """Evaluates during the training of transformers' Trainer."""

    def __init__(self, during: DuringTraining):
        self.during = during

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.during.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logs = control.should_log
        stops = self.during.after_step(state.global_step, last=state.global_step >= state.max_steps)
        control.should_log = logs  # writing the evaluation's metrics has reset it
        if stops:
            control.should_training_stop = True
            control.should_save = False  # resumed from this step, the run would train one step more


def logged(tasks: dict[str, Any]) -> dict[str, float]:
    """Metrics of an evaluation for metrics.jsonl, with the ends of their intervals."""
    found: dict[str, float] = {}
    for name, metric in metric_values(tasks).items():
        if metric["mean"] is not None:
            found[f"{DURING}{name}"] = metric["mean"]
            if metric["low"] is not None:
                found |= {f"{DURING}{name}/{end}": metric[end] for end in ("low", "high")}
    return found


def _step(name: str) -> int:
    """Step of a folder called step-N or best-N."""
    found = re.fullmatch(r"(?:step|best)-(\d+)", name)
    return int(found[1]) if found else -1
