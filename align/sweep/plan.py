"""The runs of a sweep: points (combinations of settings), seeds, and the identities of their stages."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.load import load_recipe
from align.config.recipe import BASE, Recipe, is_path
from align.config.section import result_settings
from align.config.stage import REPORT
from align.errors import UserError
from align.run.manifest import section, stage_settings
from align.sweep.axes import Axis, Range, short_keys

MOST_RUNS = 1000
LONGEST_NAME = 80


@dataclass
class Point:
    """One combination of settings.

    settings: {swept key: value as YAML text}.
    name: name of its folder in the sweep's folder.
    """

    settings: dict[str, str]
    name: str

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={text}" for key, text in self.settings.items()]

    @property
    def label(self) -> str:
        return ", ".join(self.overrides) or "the recipe"


@dataclass
class Run:
    """A point with one seed.

    folder: its run folder.
    stages: {stage: identity}, `base` first; see `identities`.
    """

    point: Point
    seed: int
    folder: Path
    overrides: list[str]
    recipe: Recipe
    stages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Points and seeds of a sweep.

    source: file or name of the recipe.
    overrides: overrides that all runs share.
    recipe: the recipe with these overrides.
    axes: swept settings.
    seeds: number of seeds per point.
    """

    source: str
    overrides: list[str]
    recipe: Recipe
    axes: list[Axis | Range]
    seeds: int

    def grid(self) -> list[Point]:
        """All combinations of the values; the last setting changes fastest."""
        axes = [axis for axis in self.axes if isinstance(axis, Axis)]
        count = len(list(itertools.product(*(axis.values for axis in axes)))) * self.seeds
        if count > MOST_RUNS:
            raise UserError(f"align sweep: it would start {count} runs, above {MOST_RUNS}. Use fewer values or seeds.")
        keys = [axis.key for axis in axes]
        points: list[Point] = []
        for values in itertools.product(*(axis.values for axis in axes)):
            points.append(self.point(dict(zip(keys, values)), points))
        return points

    def point(self, settings: dict[str, str], others: Sequence[Point]) -> Point:
        """The point with these settings, under a name that none of `others` has."""
        name = _name(settings)
        if any(other.name == name for other in others):
            name = f"{name[: LONGEST_NAME - 7]}-{_digest(settings)[:6]}"
        return Point(settings, name)

    def runs(self, point: Point, folder: Path) -> list[Run]:
        """The runs of a point, one per seed. Raises `UserError` if the recipe is invalid with the point's settings."""
        found = []
        for seed in range(self.seeds):
            own = [*point.overrides, *self.seed_overrides(seed)]
            recipe = load_recipe(self.source, [*self.overrides, *own])
            run = Run(point, seed, folder / point.name / f"seed-{seed}", own, recipe)
            run.stages = identities(recipe)
            found.append(run)
        return found

    def seed_overrides(self, seed: int) -> list[str]:
        """Overrides for seed number `seed`; number 0 is the recipe's own seed.

        Only the stages that a swept setting affects get a new seed, so their parents are shared. Evaluate stages keep
        theirs, so that all runs complete the same prompts. The seed of the whole recipe changes if nothing is swept, or
        if a swept setting belongs to no stage.
        """
        if seed == 0:
            return []
        if not self.seeded:
            return [f"seed={self.recipe.seed + seed}"]
        stages = self.recipe.stages
        own = {name: stages[name].seed for name in self.seeded}
        return [f"stages.{name}.seed={(self.recipe.seed if s is None else s) + seed}" for name, s in own.items()]

    @property
    def seeded(self) -> list[str]:
        """The stages that a swept setting affects, without evaluate stages; empty if the whole recipe is affected."""
        swept = [axis.key.split(".") for axis in self.axes]
        if not swept or any(key[0] != "stages" or len(key) < 2 for key in swept):
            return []
        affected: set[str] = {key[1] for key in swept}
        for name, stage in self.recipe.stages.items():
            if any(reference.name in affected for reference in stage.references()):
                affected.add(name)
        return [name for name, stage in self.recipe.stages.items() if name in affected and stage.makes != REPORT]


def identities(recipe: Recipe) -> dict[str, str]:
    """{stage: hash}, equal for two stages with the same settings and the same parents.

    The hash covers the settings that `--resume` compares: all but those marked † in docs/recipes.md.
    """
    found: dict[str, str] = {}
    for position, name in enumerate([BASE, *recipe.stages]):
        part = section(recipe, name)
        settings = stage_settings(recipe, name)
        settings[name] = result_settings(part, settings[name])
        references = [] if name == BASE else [reference.name for reference in recipe.stages[name].references()]
        parents = {parent: found[parent] for parent in references if not is_path(parent)}
        found[name] = _digest([position, settings, parents])
    return found


def distinct_stages(runs: Sequence[Run]) -> Mapping[str, int]:
    """{stage: number of times that it runs}, with equal stages run once."""
    return {name: len({run.stages[name] for run in runs}) for name in runs[0].stages}


def plan_lines(runs: Sequence[Run]) -> Iterator[str]:
    """Lines for the terminal: the number of settings, of runs, and of runs of each stage."""
    counts = distinct_stages(runs)
    points = len({run.point.name for run in runs})
    yield f"{points} settings, {len(runs)} runs; stages that are equal are run once:"
    for name, count in counts.items():
        yield f"  {name}: {count} {'time' if count == 1 else 'times'}"


def _name(settings: Mapping[str, str]) -> str:
    """Folder name: the last part of each key with its value; other characters become hyphens."""
    if not settings:
        return "recipe"
    short = short_keys(settings)
    words = [f"{short[key].replace('.', '-')}-{text}" for key, text in settings.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words)).strip("-.")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{_digest(dict(settings))[:6]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
