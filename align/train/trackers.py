"""Experiment trackers (TensorBoard, trackio, Weights & Biases) for TRL trainers and for align's own training loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from align.config.recipe import Recipe
from align.errors import UserError
from align.run.context import StageContext


def tracker_arguments(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments` that select the recipe's trackers."""
    if not recipe.report_to:
        return {"report_to": "none"}
    return {"report_to": list(recipe.report_to), "run_name": f"{recipe.name}-{stage}", "project": recipe.name}


class Trackers:
    """Calls transformers' tracker callbacks from align's own loop; a no-op if the recipe names no tracker."""

    def __init__(self, context: StageContext, model: Any):
        recipe = context.recipe
        self._state, self._control = TrainerState(), TrainerControl()
        self._callbacks: list[Any] = []
        if not recipe.report_to:
            return
        self._arguments = TrainingArguments(
            output_dir=str(context.dir), use_cpu=True, **tracker_arguments(recipe, context.name)
        )
        try:
            self._callbacks = [callback() for callback in get_reporting_integration_callbacks(list(recipe.report_to))]
        except RuntimeError as error:
            raise UserError(f"report_to: {str(error).strip().splitlines()[0]}") from None
        for callback in self._callbacks:
            callback.on_train_begin(self._arguments, self._state, self._control, model=model)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._state.global_step = step
        for callback in self._callbacks:
            callback.on_log(self._arguments, self._state, self._control, logs=dict(metrics))

    def close(self) -> None:
        for callback in self._callbacks:
            callback.on_train_end(self._arguments, self._state, self._control)
