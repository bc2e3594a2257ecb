"""Run a sweep: its runs one after another as `align run`, each distinct stage once.

sweeps/<name>/sweep.json                  swept settings, and the points so far
sweeps/<name>/recipe.yaml                 the recipe that all runs share
sweeps/<name>/<point>/seed-<N>/           a run folder; stages shared with another run are links
sweeps/<name>/report.{html,md,json}       the sweep's report, written every minute and at the end
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from pydantic import ValidationError

from align.config.load import dump
from align.config.recipe import Recipe
from align.errors import Stopped, UserError
from align.preflight import problems
from align.run.folder import locked, write_json, write_text
from align.run.manifest import differences, read_manifest
from align.sweep.plan import Plan, Point, Run, plan_lines
from align.sweep.results import collect, metric_value, write_sweep_report
from align.sweep.state import STATE, is_sweep, read_state

RECIPE = "recipe.yaml"
REPORT_EVERY = 60.0
"""Seconds between two reports of a running sweep."""


class Settings(NamedTuple):
    """Ranking and search of a sweep.

    metric: MODEL/KEY; None chooses it from the results.
    better: 1 if higher is better, -1 if lower is; 0 takes the direction from the table of metrics.
    search: (name, number of trials) of the search; None for a grid.
    """

    metric: str | None
    better: int
    search: tuple[str, int] | None


class Search(Protocol):
    """Proposes points. `tell` receives the metric's mean over the seeds, or None if the point failed."""

    def ask(self) -> dict[str, str]: ...

    def tell(self, settings: dict[str, str], value: float | None) -> None: ...


def run_sweep(
    plan: Plan,
    folder: Path,
    settings: Settings,
    *,
    search: Search | None = None,
    resume: bool = False,
    start: Callable[[Run, Path], int] | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run every point of the grid, or as many points as `settings.search` has trials, with every seed.

    Finished runs are kept.

    start: executes one run of a recipe file and returns its exit status; default: `align run` in a process.
    Returns the folders of the failed runs, with their exit statuses.
    Raises `UserError` before the first run if the recipe is invalid with a point's settings.
    """
    with locked(folder):
        points = _earlier_points(plan, folder, settings, resume=resume)
        state = _State(plan, folder, settings, points)
        if search is None:
            grid = plan.grid()
            runs = [run for point in grid for run in state.runs(point)]
            _require_valid(runs)
            for line in plan_lines(runs):
                say(line)
            state.points = grid
            todo: Iterable[Point] = grid
        else:
            assert settings.search is not None
            todo = _proposed(state, search, settings.search[1])
        write_text(folder / RECIPE, dump(plan.recipe.model_dump(mode="json")))
        state.write()
        failed: list[str] = []
        reported = time.monotonic()
        total = len(state.points) if search is None or settings.search is None else settings.search[1]
        for number, point in enumerate(todo, 1):
            for run in state.runs(point):
                share_stages(run, state.finished_stages())
                if is_finished(run):
                    continue
                of_seeds = f", seed {run.seed}" if plan.seeds > 1 else ""
                say(f"sweep: {number} of {total}: {point.label}{of_seeds}")
                run.folder.mkdir(parents=True, exist_ok=True)
                status = (start or start_run)(run, folder / RECIPE)
                if status:
                    failed.append(f"{run.folder} (exit status {status})")
                if time.monotonic() - reported > REPORT_EVERY:
                    write_sweep_report(folder)
                    reported = time.monotonic()
            if search is not None:
                search.tell(point.settings, state.value(point))
        write_sweep_report(folder)
    return failed


class _State:
    """The points of a sweep so far. `write` keeps them in sweep.json."""

    def __init__(self, plan: Plan, folder: Path, settings: Settings, points: list[Point]):
        self.plan, self.folder, self.settings, self.points = plan, folder, settings, points
        self._runs: dict[str, list[Run]] = {}
        """{name of a point: its runs}. Cached, because validating a recipe takes a tenth of a second."""

    def runs(self, point: Point) -> list[Run]:
        if point.name not in self._runs:
            self._runs[point.name] = self.plan.runs(point, self.folder)
        return self._runs[point.name]

    def write(self) -> None:
        content = state_content(self.plan, self.settings)
        points = [{"name": point.name, "settings": point.settings} for point in self.points]
        write_json(self.folder / STATE, {**content, "points": points})

    def finished_stages(self) -> dict[str, Path]:
        """{identity of a finished stage: its folder}. Links are skipped: their targets are listed."""
        found: dict[str, Path] = {}
        for run in (run for point in self.points for run in self.runs(point)):
            for name, identity in run.stages.items():
                stage = run.folder / name
                if identity not in found and not stage.is_symlink() and read_manifest(stage) is not None:
                    found[identity] = stage
        return found

    def value(self, point: Point) -> float | None:
        """Mean of the metric over the seeds; None if a run has none."""
        values = [metric_value(collect(run.folder), self.settings.metric) for run in self.runs(point)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def state_content(plan: Plan, settings: Settings) -> dict[str, Any]:
    """The content of sweep.json without the points."""
    return {
        "source": plan.source,
        "overrides": plan.overrides,
        "recipe": plan.recipe.model_dump(mode="json"),
        "axes": [asdict(axis) for axis in plan.axes],
        "seeds": plan.seeds,
        "affected": plan.seeded,
        "metric": settings.metric,
        "better": settings.better,
        "search": list(settings.search) if settings.search else None,
    }


def _earlier_points(plan: Plan, folder: Path, settings: Settings, *, resume: bool) -> list[Point]:
    """The points that an earlier start of the same sweep has recorded."""
    if not is_sweep(folder):
        return []
    if not resume:
        raise UserError(f"{folder}: it has an earlier sweep; add --resume to continue it, or pass another --out.")
    before, now = read_state(folder), state_content(plan, settings)
    if changed := differences(_current(before.get("recipe")), now["recipe"]):
        raise UserError(
            f"{folder}: the earlier sweep had another recipe ({changed[0]}); restore it, or pass another --out."
        )
    if settings.search is not None and before.get("axes") != json.loads(json.dumps(now["axes"])):
        raise UserError(f"{folder}: the earlier search had other ranges; restore them, or pass another --out.")
    return [Point(point["settings"], point["name"]) for point in before["points"]]


def _current(stored: Any) -> Any:
    """A stored recipe, with defaults for settings added since; unchanged if it is not valid."""
    try:
        return Recipe.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def _require_valid(runs: Iterable[Run]) -> None:
    """Raise `UserError` if a preflight check of a run fails; torch is not loaded."""
    found: dict[str, None] = {}
    for run in runs:
        found |= dict.fromkeys(problems(run.recipe, list(run.stages)))
    if found:
        raise UserError("\n".join(found))


def _proposed(state: _State, search: Search, trials: int) -> Iterator[Point]:
    """The points of a search: first the unfinished points of an earlier start, then new ones.

    Finished points of an earlier start are added to the search with their values.
    """
    earlier = state.points[:trials]
    finished = {point.name: all(map(is_finished, state.runs(point))) for point in earlier}
    for point in earlier:
        if finished[point.name]:
            search.tell(point.settings, state.value(point))
    yield from (point for point in earlier if not finished[point.name])
    while len(state.points) < trials:
        point = state.plan.point(search.ask(), state.points)
        _require_valid(state.runs(point))
        state.points.append(point)
        state.write()
        yield point


def is_finished(run: Run) -> bool:
    return all(read_manifest(run.folder / name) is not None for name in run.stages)


def share_stages(run: Run, finished: dict[str, Path]) -> None:
    """Link the stages that another run has finished; replace links to removed folders."""
    for name, identity in run.stages.items():
        place = run.folder / name
        if place.is_symlink() and not place.exists():
            place.unlink()
        if identity in finished and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(finished[identity], place.parent), target_is_directory=True)


def start_run(run: Run, recipe: Path, output: TextIO | None = None) -> int:
    """Execute `align run` in a child process, which ends with this one; return its exit status.

    output: stream for its lines; default: standard output.
    Signals are forwarded to the run, and raised again once it has stopped.
    """
    words = ["run", str(recipe), *run.overrides, "--run-dir", str(run.folder), "--resume"]
    command = [sys.executable, "-m", "align.cli", *words]
    process = subprocess.Popen(command, stdout=output, preexec_fn=_end_with_parent)
    stopped: Stopped | None = None
    while True:
        try:
            status = process.wait()
            break
        except Stopped as request:  # the run writes a checkpoint; a second signal ends it at once
            stopped = request
            process.send_signal(request.number)
    if stopped is not None:
        raise stopped
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(status - 128)
    return status


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends (Linux), even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
