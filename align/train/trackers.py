"""Experiment trackers: TensorBoard, Weights & Biases, trackio and MLflow, through transformers' callbacks.

Every stage has one run of each tracker. The run receives the values that metrics.jsonl receives, so metrics have the
same names in all stages. It also receives the stage's settings as hyper-parameters. A resumed stage continues its runs,
whose ids are in trackers.json. An evaluate stage adds the report.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import rewrite_logs

from align.errors import UserError
from align.run.context import StageContext
from align.run.folder import remove_folder, write_json
from align.run.manifest import stage_settings

IDS = "trackers.json"
"""File with the ids of a stage's runs in the trackers."""


class Trackers:
    """The runs of a stage in the recipe's trackers; a no-op if the recipe names none. Only rank 0 creates it.

    first_step: step from which training continues; 0 for a new start, which begins new runs.
    """

    def __init__(self, context: StageContext, model: Any = None, *, first_step: int = 0):
        self._state, self._control = TrainerState(), TrainerControl()
        self._runs: list[_TrackerRun] = []
        recipe, file = context.recipe, context.dir / IDS
        if not recipe.report_to:
            return
        resumed = first_step > 0 and file.is_file()
        ids = json.loads(file.read_text(encoding="utf-8")) if resumed else {"id": secrets.token_hex(6)}
        settings = flattened(stage_settings(recipe, context.name))
        name = f"{recipe.name}-{context.name}"
        self._arguments = Settings({}, context, name, ids["id"])
        try:
            callbacks = get_reporting_integration_callbacks(list(recipe.report_to))
            for tracker, callback in zip(recipe.report_to, callbacks, strict=True):
                self._runs.append(RUNS[tracker](callback, context, ids, first_step if resumed else 0))
        except (RuntimeError, ImportError) as error:
            raise UserError(f"report_to: {str(error).strip().splitlines()[0]}") from None
        write_json(file, ids)
        for run in self._runs:
            # The model's configuration is one of the hyper-parameters.
            known = resumed and run.keeps_settings
            begun = self._arguments if known else Settings(settings, context, name, ids["id"])
            run.callback.on_train_begin(begun, self._state, self._control, model=None if known else model)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._state.global_step = step
        for run in self._runs:
            run.log(self._arguments, self._state, self._control, dict(metrics))

    def attach(self, files: Mapping[str, Path]) -> None:
        """Add the report. files: by extension, `md` and `html`."""
        for run in self._runs:
            run.attach(files)

    def close(self) -> None:
        for run in self._runs:
            run.callback.on_train_end(self._arguments, self._state, self._control)
            run.close()


class Settings(TrainingArguments):
    """Training arguments for transformers' callbacks: the run's names; the recipe's settings as hyper-parameters.

    The base class is not initialised, because that resets the state of the trainer's accelerator. Its other fields are
    class attributes with their defaults.
    """

    def __init__(self, settings: Mapping[str, Any], context: StageContext, name: str, run_id: str):
        # trackio continues a run by its name, so a new start needs another name.
        self.run_name = f"{name}-{run_id}" if "trackio" in context.recipe.report_to else name
        self.output_dir, self.project = str(context.dir), context.recipe.name
        self.settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def to_json_string(self) -> str:
        return json.dumps(self.settings, indent=2, default=str)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= flattened(value, name) if isinstance(value, dict) else {name: value}
    return flat


class _TrackerRun:
    """One run of one tracker. It is opened before the callback uses it, so that the callback does not open another.

    keeps_settings: True if a resumed run has its hyper-parameters already; False if each start replaces them.
    """

    keeps_settings = True

    def __init__(self, callback: Callable[[], Any], context: StageContext, ids: dict[str, str], first_step: int):
        self.callback = callback()
        self.open(context, ids, first_step)

    def open(self, context: StageContext, ids: dict[str, str], first_step: int) -> None:
        """Open the run. ids: ids of the stage's runs; a tracker that chooses its own id adds it."""

    def log(self, arguments: Settings, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        self.callback.on_log(arguments, state, control, logs=metrics)

    def attach(self, files: Mapping[str, Path]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard(_TrackerRun):
    def open(self, context: StageContext, ids: dict[str, str], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        base = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = context.dir / "tensorboard"
        if base is not None:
            folder = Path(base).expanduser() / f"{context.recipe.name}-{context.name}-{ids['id']}"
        elif not first_step:
            remove_folder(folder)
        # Steps after the checkpoint are logged again.
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=first_step + 1 if first_step else None)
        self.callback.tb_writer = self.writer
        self.callback.logging_dir = str(folder)

    def attach(self, files: Mapping[str, Path]) -> None:
        self.writer.add_text("report", files["md"].read_text(encoding="utf-8"))


class _Wandb(_TrackerRun):
    def open(self, context: StageContext, ids: dict[str, str], first_step: int) -> None:
        import wandb

        self.wandb, name = wandb, context.recipe.name
        project = os.environ.get("WANDB_PROJECT", name)
        wandb.init(
            project=project, group=name, name=f"{name}-{context.name}", id=ids["id"], resume="allow", dir=context.dir
        )

    def attach(self, files: Mapping[str, Path]) -> None:
        self.wandb.log({"report": self.wandb.Html(files["html"].read_text(encoding="utf-8"), inject=False)})

    def close(self) -> None:
        self.wandb.finish()


class _Trackio(_TrackerRun):
    """Run of trackio, which transformers' callback opens itself; it continues the run of the same name.

    The callback numbers its logs instead of passing the step, so a held-out loss would shift all later steps. `log`
    therefore calls trackio directly.
    """

    keeps_settings = False

    def log(self, arguments: Settings, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        import trackio

        trackio.log(rewrite_logs(metrics), step=state.global_step)

    def attach(self, files: Mapping[str, Path]) -> None:
        import trackio

        trackio.log({"report": trackio.Markdown(files["md"].read_text(encoding="utf-8"))})


class _Mlflow(_TrackerRun):
    def open(self, context: StageContext, ids: dict[str, str], first_step: int) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", context.recipe.name))
        run = mlflow.start_run(run_id=ids.get("mlflow"), run_name=f"{context.recipe.name}-{context.name}")
        ids["mlflow"] = run.info.run_id

    def attach(self, files: Mapping[str, Path]) -> None:
        for file in files.values():
            self.mlflow.log_artifact(str(file))

    def close(self) -> None:
        if flush := getattr(self.mlflow, "flush_async_logging", None):
            flush()
        self.mlflow.end_run()


RUNS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}
