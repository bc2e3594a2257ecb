"""Estimate how long a stage trains: from an earlier run of it, otherwise a lower bound from the arithmetic."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from align.config.ppo import PpoStage
from align.config.recipe import BASE, Recipe
from align.config.stages import PretrainStage, TrainingStage
from align.errors import UserError
from align.plan.job import jobs_of
from align.plan.setting import setting_of
from align.plan.speed import operations
from align.recipes.preview import Preview
from align.run.folder import read_jsonl
from align.run.manifest import changes, hardware, read_manifest
from align.run.metrics import PHASES

MEASURED_SECONDS = 0.3
"""Time that the measurement of a device takes."""
PASS_TOKENS = 2048
"""Largest number of tokens in the matrix product that is measured."""


@dataclass(frozen=True)
class Estimate:
    """Time that a stage trains.

    seconds  None if it is unknown
    kind     where the seconds come from
    basis    the measurement that they are computed from, or the reason why they are unknown
    """

    seconds: float | None
    kind: Literal["earlier run", "lower bound", "unknown", "does not train"]
    basis: str


def estimate_time(recipe: Recipe, name: str, run_dir: Path, data: Preview) -> Estimate:
    """The time of a stage that trains on `data`, with evaluation and checkpoints if it is known from an earlier run."""
    stage = recipe.stages[name]
    if not isinstance(stage, TrainingStage | PpoStage) or data.steps is None:
        return Estimate(None, "does not train", f"a stage of the kind '{stage.kind}' has no training steps")
    manifest = _earlier_run(recipe, name, run_dir)
    found: Estimate | str
    if isinstance(manifest, str):
        found = manifest
    elif isinstance(stage, PpoStage):
        found = _of_iterations(run_dir / name / "metrics.jsonl", stage.steps)
    else:
        found = _of_steps(manifest, name, stage, data)
    if isinstance(found, Estimate):
        return found
    if isinstance(stage, PpoStage):
        return Estimate(None, "unknown", found)
    if recipe.parallel is not None and recipe.parallel.processes > 1:
        return Estimate(None, "unknown", f"{found}; `align plan` estimates a step on a cluster")
    row_tokens = stage.data.max_length if data.lengths is None else data.lengths.computed
    return _lower_bound(recipe, name, stage, data.steps * stage.batch_size * row_tokens)


# --- an earlier run ---------------------------------------------------------------------------------------


def _earlier_run(recipe: Recipe, name: str, run_dir: Path) -> dict[str, Any] | str:
    """The manifest of an earlier run of the stage with this model on this machine, or why there is none."""
    try:
        manifest, base = read_manifest(run_dir / name), read_manifest(run_dir / BASE)
    except UserError as error:
        return str(error)
    if manifest is None:
        return f"{run_dir / name} has no finished run"
    if base is not None and changes(recipe, BASE, base["config"]):
        return f"the run in {run_dir} has another model"
    parallel = recipe.parallel.model_dump(mode="json") if recipe.parallel else None
    if manifest.get("parallel") != parallel or manifest.get("hardware") != hardware():
        return f"the run in {run_dir / name} had other hardware or another `parallel` section"
    return manifest


def _of_steps(manifest: Mapping[str, Any], name: str, stage: TrainingStage, data: Preview) -> Estimate | str:
    """From the seconds per step, scaled by the tokens of a step."""
    measured, before = manifest.get("training") or {}, manifest["config"][name]
    if not measured.get("steps") or before.get("lora") != stage.model_dump(mode="json").get("lora"):
        return "the earlier run of this stage was not timed, or trained other weights"
    per_step = measured["seconds"] / measured["steps"]
    tokens = stage.batch_size * _row_tokens(
        stage, stage.data.max_length, data.report.to_dict() if data.report else None
    )
    then = before["batch_size"] * _row_tokens(stage, before["data"]["max_length"], manifest["data"])
    assert data.steps is not None
    basis, scale = f"{per_step:.3g} s per step in the earlier run of this stage", tokens / then
    if f"{scale:.2f}" != "1.00":
        basis += f", times {scale:.3g}: a step has about {tokens:,.0f} tokens now, {then:,.0f} then"
    return Estimate(data.steps * per_step * scale, "earlier run", basis)


def _row_tokens(stage: TrainingStage, max_length: int, report: Mapping[str, Any] | None) -> float:
    """Mean tokens per row; the maximum for pretraining, which fills its rows, and for rows that are not counted."""
    if isinstance(stage, PretrainStage) or not report or not report["rows_train"]:
        return max_length
    return float(report["tokens"] / report["rows_train"])


def _of_iterations(metrics: Path, steps: int) -> Estimate | str:
    lines = [line for line in read_jsonl(metrics) if any(f"time/{phase}" in line for phase in PHASES)]
    seconds = [sum(line.get(f"time/{phase}", 0.0) for phase in PHASES) for line in lines]
    if not seconds:
        return f"{metrics} has no iteration"
    return Estimate(steps * mean(seconds), "earlier run", f"{mean(seconds):.3g} s per iteration in an earlier run")


# --- a lower bound ----------------------------------------------------------------------------------------


def _lower_bound(recipe: Recipe, name: str, stage: TrainingStage, tokens: float) -> Estimate:
    """Operations of the matrix products of the model, at the rate of one matrix product on this machine."""
    try:
        (job,) = jobs_of(recipe, None, name)
    except UserError as error:
        return Estimate(None, "unknown", str(error))
    one = replace(job, batch=1, micro_batch=1, length=1, sequences=1)  # a token that attends to none before it
    total = tokens * operations(one, setting_of(one, None, 1))
    shape = job.members[0].shape
    layer = shape.largest_layer
    width = max(layer.mlp_width, layer.expert_width)
    rate = matmul_rate(min(stage.pass_tokens, PASS_TOKENS), shape.hidden_size, width, recipe.dtype)
    return Estimate(
        total / rate,
        "lower bound",
        f"{total:.2g} operations in the matrices of the model, at {rate / 1e12:.2g} TFLOP/s that one matrix product "
        "reaches on this machine; attention, optimizer and the rest are left out",
    )


def matmul_rate(tokens: int, hidden: int, width: int, dtype: str) -> float:
    """Operations per second of the product of matrices [tokens, hidden] and [hidden, width], the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.ones(tokens, hidden, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(hidden, width, dtype=left.dtype, device=device)
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * hidden * width / best
