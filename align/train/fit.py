"""Run a TRL trainer: write metrics and checkpoints, resume, stop early, and save the finished model."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PrinterCallback, TrainerCallback

from align.data.prepare import DataReport
from align.errors import UserError
from align.models.lora.adapters import AnyModel
from align.models.lora.describe import table_lines, trained_rows, weight_lines, weight_rows
from align.parallel.group import from_rank_0, should_stop
from align.parallel.sharding import full_shape
from align.run import interrupt
from align.run.context import StageContext, StageResult
from align.run.folder import EXPERTS, STEPS, MetricsWriter, write_json
from align.run.metrics import DURING, HELD_OUT
from align.run.pace import Pace
from align.train.checkpoint import count_parameters, save_model
from align.train.trackers import Trackers

COMPLETE = "complete"
"""Empty file that is written into a checkpoint last; a checkpoint without this file is incomplete."""

ROWS = "rows.json"
"""File with the fingerprint of the rows that a stage trains on."""
SHOWN = (
    ("loss", "loss", ".4f"),
    (f"{HELD_OUT}loss", "held-out loss", ".4f"),
    ("accuracy", "accuracy", ".3f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    (f"{HELD_OUT}accuracy", "accuracy", ".3f"),
    (f"{HELD_OUT}rewards/accuracies", "accuracy", ".3f"),
    ("kto_kl", "KL", ".3f"),
    ("learning_rate", "learning rate", ".1e"),
)
"""(metric, name, format) of the values in the line of a step."""
NOT_METRICS = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "num_tokens", "preparation_time")
"""A logged value whose name contains one of these strings is not written to metrics.jsonl."""


class Evaluations(Protocol):
    """Evaluations during training; see `align.eval.during.DuringTraining`."""

    def finish(self) -> dict[str, float]:
        """Restore the weights of the stage's result; returns their metrics."""
        ...


def train_and_save(
    trainer: Any, report: DataReport, context: StageContext, evaluations: Evaluations | None = None
) -> StageResult:
    """Train, save the model with its tokenizer, and return the results for the stage's manifest.

    evaluations: the stage's evaluations; the trainer has their callback.
    """
    parameters = count_parameters(trainer.model)  # before adapters are merged
    weights = say_trained(trainer.model, context, parameters["total"])
    metrics, training = fit(trainer, context, report.fingerprint, evaluations)
    lora, recipe = trainer.align_stage.lora, context.recipe
    save_model(
        trainer.model,
        trainer.processing_class,
        context.dir,
        recipe.dtype,
        recipe.parallel,
        save="merged" if lora is None else lora.save,
    )
    return StageResult(metrics, report.to_dict(), parameters, training, {"model": weights} if weights else None)


def say_trained(
    model: AnyModel, context: StageContext, whole: int, role: str = "model"
) -> dict[str, dict[str, int]] | None:
    """Print the groups that a model with adapters trains, and the groups of its weights in 4 bits, if it has any.

    whole: number of its parameters, without adapters.

    Returns the table of the weights in 4 bits for the manifest.
    """
    if not hasattr(model, "peft_config"):
        return None
    context.say(f"  the {role} trains:")
    for line in table_lines(trained_rows(model, full_shape), whole):
        context.say(f"    {line}")
    if not (rows := weight_rows(model)):
        return None
    context.say(f"  the weights of the {role}:")
    for line in weight_lines(rows):
        context.say(f"    {line}")
    return {row.group: {key: value for key, value in row._asdict().items() if key != "group"} for row in rows}


def fit(
    trainer: Any, context: StageContext, rows: str, evaluations: Evaluations | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Train from the start or from the last checkpoint.

    rows: fingerprint of the token rows.

    Returns (metrics, training). The metrics are those of the trained model on the held-out rows and of the evaluations,
    if any. `training` has the number of steps and the seconds.
    """
    with ExitStack() as until_the_end:
        return _fit(trainer, context, rows, evaluations, until_the_end)


def _fit(
    trainer: Any, context: StageContext, rows: str, evaluations: Evaluations | None, until_the_end: ExitStack
) -> tuple[dict[str, float], dict[str, float]]:
    checkpoint = from_rank_0("find the last checkpoint", lambda: checkpoint_for(context, rows))
    step = checkpoint_step(checkpoint) if checkpoint else None
    writer = None
    if trainer.args.process_index == 0:
        writer = MetricsWriter(context.dir / "metrics.jsonl", from_step=step)
    trainer.remove_callback(PrinterCallback)
    stop = StopEarly(context)
    trainer.add_callback(stop)
    loads = ExpertLoads(context.dir / EXPERTS, step, lambda: trainer.expert_load) if writer else None
    trackers = Trackers(context, trainer.model, first_step=step or 0) if writer else None
    for opened in (writer, loads, trackers):
        if opened is not None:
            until_the_end.callback(opened.close)
    trainer.add_callback(Recorder(context, writer, lambda: trainer.trained_tokens, loads, trackers))
    if checkpoint:
        context.say(f"  resuming at step {step}")
    elif trainer.eval_dataset is not None:
        if trainer.is_deepspeed_enabled:
            trainer.args.eval_on_start = True  # DeepSpeed cannot train with an engine created for evaluation
        else:
            trainer.evaluate()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    training = {"steps": trainer.state.global_step - (step or 0), "seconds": round(time.perf_counter() - start, 2)}
    interrupt.stop_polling()
    if stop.requested:
        interrupt.stop()
    handed_on = evaluations.finish() if evaluations is not None else {}
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    return metrics_of(final) | handed_on, training


def metrics_of(logs: dict[str, float] | None) -> dict[str, float]:
    """The logged values, without those that `NOT_METRICS` excludes."""
    return {
        name: value
        for name, value in (logs or {}).items()
        if name.startswith(DURING) or not any(part in name for part in NOT_METRICS)
    }


class StopEarly(TrainerCallback):
    """Stops training at the first non-finite loss or gradient norm, or on request.

    In the first case it raises a `UserError`, in the second a checkpoint is saved. All ranks stop at the same step,
    because logged values and `should_stop()` are the same on all ranks.
    """

    def __init__(self, context: StageContext):
        self.context, self.requested = context, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for name, label in (("loss", "loss"), ("grad_norm", "gradient norm"), ("eval_loss", "held-out loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise non_finite(self.context.name, label, value, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and should_stop():
            self.requested = control.should_save = control.should_training_stop = True


def non_finite(stage: str, label: str, value: float, step: int) -> UserError:
    """The error for a loss or gradient norm that is infinite or not a number."""
    if step <= 1:
        advice = f"the model overflows before training: check the checkpoint of stages.{stage}.init_from"
    else:
        advice = f"lower stages.{stage}.optimizer.learning_rate"
    return UserError(f"stages.{stage}: the {label} is {value} at step {step}; {advice}, and start with --from {stage}.")


class ExpertLoads:
    """Writes experts.jsonl: the share of assignments per expert and MoE layer, for the steps that record it.

    resumed: step from which training continues; None for a new start.
    load: returns the load of the last step; None if it was not recorded.
    """

    def __init__(self, path: Path, resumed: int | None, load: Callable[[], list[list[float]] | None]):
        self.path, self.resumed, self.load = path, resumed, load
        self._writer: MetricsWriter | None = None
        if resumed is None:
            path.unlink(missing_ok=True)

    def write(self, step: int) -> None:
        load = self.load()
        if load is None:
            return
        if self._writer is None:  # a dense model gets no file
            self._writer = MetricsWriter(self.path, from_step=self.resumed)
        self._writer.write(step, {"load": load})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks complete checkpoints, and shows each step.

    On a terminal a line replaces the one before, except the lines of evaluations and of the last step.

    trained_tokens: returns the number of tokens of the training steps since the start.
    loads: writes the loads of the experts.
    trackers: receive what metrics.jsonl receives.
    """

    def __init__(
        self,
        context: StageContext,
        writer: MetricsWriter | None,
        trained_tokens: Callable[[], int],
        loads: ExpertLoads | None = None,
        trackers: Trackers | None = None,
    ):
        self.context, self.writer, self.trained_tokens, self.loads = context, writer, trained_tokens, loads
        self.trackers = trackers
        self.pace: Pace | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace = Pace(state.max_steps, state.global_step)
        if self.writer is not None:
            write_json(self.context.dir / STEPS, {"steps": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        metrics = metrics_of(logs)
        if not metrics or self.writer is None:
            return
        self.writer.write(state.global_step, metrics)
        if self.trackers is not None:
            self.trackers.log(state.global_step, metrics)
        if self.loads is not None and "loss" in metrics:
            self.loads.write(state.global_step)
        if all(name.startswith(DURING) for name in metrics):
            return  # an evaluation prints its own line
        values = {label: f"{metrics[name]:{form}}" for name, label, form in SHOWN if name in metrics}
        if self.pace is None:  # an evaluation before training
            self.context.say(f"  before training: {', '.join(f'{name} {value}' for name, value in values.items())}")
            return
        held_out = f"{HELD_OUT}loss" in metrics
        line = self.pace.line(state.global_step, values, 0 if held_out else self.trained_tokens())
        last = state.global_step == state.max_steps
        (self.context.say if held_out or last else self.context.progress)(line)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.context.status("  evaluating on held-out rows")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def checkpoint_for(context: StageContext, rows: str) -> Path | None:
    """The checkpoint to resume from, if any; the fingerprint of the rows is written beside the checkpoints.

    Raises `UserError` if the interrupted run had other rows: another version of a library may encode the same data
    differently, or hold out other rows.
    """
    checkpoint, file = find_checkpoint(context), context.dir / ROWS
    before = json.loads(file.read_text(encoding="utf-8"))["fingerprint"] if checkpoint and file.is_file() else rows
    if before != rows:
        raise UserError(
            f"{context.dir}: the same data now gives other token rows than in the interrupted run, because align or a "
            f"library has changed since; install the earlier versions, or start the stage again with "
            f"--from {context.name}."
        )
    write_json(file, {"fingerprint": rows})
    return checkpoint


def find_checkpoint(context: StageContext) -> Path | None:
    """Return the checkpoint to resume from; if there is none, remove all checkpoints of the stage."""
    checkpoint = last_checkpoint(context.dir / "checkpoints") if context.resume else None
    if checkpoint is None:
        shutil.rmtree(context.dir / "checkpoints", ignore_errors=True)
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, if any, and remove incomplete ones.

    Folders that are not named checkpoint-STEP are ignored.
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    complete = [path for path in sorted(found, key=checkpoint_step) if (path / COMPLETE).is_file()]
    for path in set(found) - set(complete):
        shutil.rmtree(path)
    return complete[-1] if complete else None


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
