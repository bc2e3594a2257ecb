"""`align sweep`."""

from __future__ import annotations

import json
import sys
from typing import Any

from align.config.load import load_recipe
from align.run.manifest import stage_settings
from align.sweep import runner

from .here import Here, wrong

RATE = "stages.sft.optimizer.learning_rate"
RATES = f"{RATE}=1e-4,3e-4"
RANGE = f"{RATE}=1e-5..1e-3:log"


def sweep(here: Here, *arguments: str, **changes: Any) -> str:
    here.recipe(**changes)
    return here.align("sweep", "recipe.yaml", *arguments, "--out", "sweep")


def earlier(here: Here, **content: Any) -> None:
    """An earlier sweep of the same recipe. content: overrides of its sweep.json."""
    here.recipe()
    recipe = load_recipe("recipe.yaml").model_dump(mode="json")
    here.write("sweep/sweep.json", json.dumps({"recipe": recipe, "axes": [], "points": [], "seeds": 1} | content))


@wrong("sweep-setting-without-a-value", "A setting of a sweep without values")
def _(here: Here) -> str:
    return sweep(here, RATE)


@wrong("sweep-setting-twice", "A setting of a sweep that is written twice")
def _(here: Here) -> str:
    return sweep(here, RATES, f"{RATE}=1e-3")


@wrong("sweep-value-twice", "A value of a sweep that is written twice")
def _(here: Here) -> str:
    return sweep(here, f"{RATE}=1e-4,1e-4")


@wrong("sweep-value-invalid", "A value of a sweep that the recipe does not accept")
def _(here: Here) -> str:
    return sweep(here, "stages.sft.batch_size=4,-1")


@wrong("sweep-value-yaml", "A value of a sweep that is not valid YAML")
def _(here: Here) -> str:
    return sweep(here, "stages.sft.lora={rank: 8},{rank: 16")


@wrong("sweep-range-backwards", "A range from a higher to a lower number")
def _(here: Here) -> str:
    return sweep(here, f"{RATE}=1e-3..1e-5", "--search", "tpe")


@wrong("sweep-range-logarithmic", "A logarithmic range that begins at 0")
def _(here: Here) -> str:
    return sweep(here, f"{RATE}=0..1e-3:log", "--search", "tpe")


@wrong("sweep-range-ends", "A range whose ends are not numbers")
def _(here: Here) -> str:
    return sweep(here, f"{RATE}=1e-5..1.2.3", "--search", "tpe")


@wrong("sweep-range-without-search", "A range without a search")
def _(here: Here) -> str:
    return sweep(here, RANGE)


@wrong("sweep-trials-without-search", "A number of trials without a search")
def _(here: Here) -> str:
    return sweep(here, RATES, "--trials", "5")


@wrong("sweep-search-without-settings", "A search without a setting to vary")
def _(here: Here) -> str:
    return sweep(here, "--search", "tpe", "--trials", "5", "--metric", "sft/loss")


@wrong("sweep-search-without-trials", "A search without a number of trials")
def _(here: Here) -> str:
    return sweep(here, RANGE, "--search", "tpe", "--metric", "sft/loss")


@wrong("sweep-search-without-metric", "A search without a metric")
def _(here: Here) -> str:
    return sweep(here, RANGE, "--search", "tpe", "--trials", "5")


@wrong("sweep-metric-without-direction", "A search by a metric of which no direction is better in general")
def _(here: Here) -> str:
    return sweep(here, RANGE, "--search", "tpe", "--trials", "5", "--metric", "sft/learning_rate")


@wrong("sweep-without-optuna", "A search without optuna", varies=r"(?<=run `).+(?=`)")
def _(here: Here) -> str:
    here.monkeypatch.setitem(sys.modules, "optuna", None)
    return sweep(here, RANGE, "--search", "tpe", "--trials", "5", "--metric", "sft/loss")


@wrong("sweep-metric-of-no-model", "A metric of a model that the recipe does not have")
def _(here: Here) -> str:
    return sweep(here, RATES, "--metric", "stf/loss")


@wrong("sweep-metric-of-no-run", "A metric that no run of the sweep has", varies=r"(?<=use one of ).+(?=\.)")
def _(here: Here) -> str:
    point = {"name": "recipe", "settings": {}}
    earlier(here, points=[point], metric="sft/accuracy", affected=[])
    run = "sweep/recipe/seed-0"
    (here.folder / run).mkdir(parents=True)
    recipe = load_recipe("recipe.yaml")
    here.write(f"{run}/recipe.json", json.dumps(recipe.model_dump(mode="json")))
    for stage, kind in (("base", "base"), ("sft", "sft")):
        about = {"stage": stage, "kind": kind, "status": "finished", "config": stage_settings(recipe, stage)}
        here.write(f"{run}/{stage}/manifest.json", json.dumps(about | {"metrics": {"loss": 1.0}}))
    return here.align("report", "sweep")


@wrong("sweep-no-seeds", "A sweep with no seeds")
def _(here: Here) -> str:
    return sweep(here, RATES, "--seeds", "0")


@wrong("sweep-too-many-runs", "A sweep of more than a thousand runs")
def _(here: Here) -> str:
    return sweep(here, f"seed={','.join(map(str, range(501)))}", "--seeds", "2")


@wrong("sweep-earlier", "A folder that has a sweep, without `--resume`")
def _(here: Here) -> str:
    earlier(here)
    return sweep(here, RATES)


@wrong("sweep-other-recipe", "A sweep that continues with another recipe")
def _(here: Here) -> str:
    earlier(here)
    return sweep(here, RATES, "--resume", max_steps=2)


@wrong("sweep-damaged", "A sweep whose sweep.json is damaged")
def _(here: Here) -> str:
    here.write("sweep/sweep.json", '{"points": [')
    return sweep(here, RATES, "--resume")


@wrong("sweep-failed-run", "A sweep of which a run has failed")
def _(here: Here) -> str:
    here.monkeypatch.setattr(
        runner, "start_run", lambda run, recipe, output=None: int(run.overrides[0] == f"{RATE}=1e-4")
    )
    return sweep(here, RATES)
