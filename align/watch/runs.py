"""Runs as they grow: stages with their progress, curves, samples and router loads, read from the run folders.

    runs/<run>/recipe.json                   name, stages
    runs/<run>/report.json                   comparison and samples of evaluate stages
    runs/<run>/<stage>/config.json           the stage has started
    runs/<run>/<stage>/steps.json            its number of steps
    runs/<run>/<stage>/manifest.json         it has finished
    runs/<run>/<stage>/metrics.jsonl         curves
    runs/<run>/<stage>/samples.jsonl         samples of PPO
    runs/<run>/<stage>/experts.jsonl         router load of each expert
    runs/<run>/<stage>/data/train.jsonl      rows that a sampling stage has made

Nothing is written and nothing is locked. Any of the files may be missing, replaced or removed at any time.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from align.config.recipe import BASE
from align.eval.report.formatting import NOTHING, interval, mean, number, plain
from align.run.folder import MANIFEST, STEPS
from align.run.metrics import PHASES
from align.watch.charts import chart_data, grouped_charts
from align.watch.curve import Curve, Floats
from align.watch.tail import Tail

SAMPLES = 12
"""Number of samples shown per stage, the newest ones."""
LONGEST = 4000
"""Number of characters shown of a text."""
RECENT = 50
"""Number of latest steps whose mean time predicts the time left."""
DEPTH = 2
"""Levels of folders that are searched for runs: runs, and runs of a sweep."""
RUNS = 200
"""Maximum number of listed runs, the newest ones."""


class JsonFile:
    """The JSON object in a file, read again when the file changes; empty without a file.

    changed: modification time of the file in seconds since the epoch; 0.0 without a file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {}
        self.version = 0
        self._signature: tuple[int, int, int] | None = None

    @property
    def changed(self) -> float:
        return self._signature[0] / 1e9 if self._signature else 0.0

    @property
    def exists(self) -> bool:
        return self._signature is not None

    def read(self) -> dict[str, Any]:
        signature = _signature(self.path)
        if signature != self._signature:
            self._signature, self.version = signature, self.version + 1
            try:
                content = json.loads(self.path.read_bytes()) if signature else {}
            except (OSError, ValueError, RecursionError):
                content = {}
            self.content = content if isinstance(content, dict) else {}
        return self.content


class Stage:
    """One stage of a run.

    kind: kind of the stage; "" if it is unknown.
    versions: {part of the page: counter}, incremented when the part (curves, samples, experts) changes.
    """

    def __init__(self, folder: Path, kind: str):
        self.name, self.folder, self.kind = folder.name, folder, kind
        self.curves: dict[str, Curve] = {}
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self.loads: list[tuple[float, Floats]] = []
        self.versions = {"curves": 0, "samples": 0, "experts": 0}
        self.latest: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._metrics, self._samples, self._experts = (
            Tail(folder / f"{name}.jsonl") for name in ("metrics", "samples", "experts")
        )
        self._rows = Tail(folder / "data" / "train.jsonl")
        self._config, self._steps, self._manifest = (
            JsonFile(folder / name) for name in ("config.json", STEPS, MANIFEST)
        )

    def read(self, deadline: float) -> bool:
        """Read new lines until `deadline` (of time.monotonic); returns True if more remain."""
        for file in (self._config, self._steps, self._manifest):
            file.read()
        if isinstance(kind := self._manifest.content.get("kind"), str):
            self.kind = kind
        more = self._read_metrics(deadline)
        self._read_samples()
        self._read_experts()
        return more

    def state(self, now: float) -> dict[str, Any]:
        """Progress of the stage as JSON; times in seconds."""
        manifest, started = self._manifest.content, self._config.exists or bool(self.curves)
        finished = manifest.get("status") == "finished"
        status = "finished" if finished else "running" if started else "waiting"
        steps, step = _number(self._steps.content.get("steps")), self.latest.get("step")
        seconds = _number(manifest.get("seconds")) if finished else None
        if status == "running" and self._config.exists:
            seconds = max(now - self._config.changed, 0.0)
        left = None
        if status == "running" and steps and step is not None and self._seconds:
            left = max(steps - step, 0) * sum(self._seconds) / len(self._seconds)
        return {
            "name": plain(self.name),
            "kind": plain(self.kind),
            "status": status,
            "step": step,
            "steps": steps,
            "seconds": seconds,
            "left": left,
            "tokens": next((self.latest[key] for key in SPEEDS if key in self.latest), None),
            "memory": self.latest.get("memory/peak_gib"),
            "versions": self.versions,
        }

    def charts(self) -> list[dict[str, Any]]:
        """The charts of the stage's metrics as JSON."""
        return [
            chart_data(self.kind, group, found, self.curves) for group, found in grouped_charts(self.kind, self.curves)
        ]

    def expert_load(self, layer: int | None) -> dict[str, Any]:
        """Share of assignments of each expert times the number of experts, by step, as JSON.

        layer: number of the MoE layer, from 0; None for the mean over layers. `last` has all layers at the last step.
        """
        if not self.loads:
            return {"steps": [], "load": [], "last": []}
        chosen = [load.mean(axis=0) if layer is None or layer >= len(load) else load[layer] for _, load in self.loads]
        return {
            "steps": [step for step, _ in self.loads],
            "load": [np.round(load, 3).tolist() for load in chosen],
            "last": np.round(self.loads[-1][1], 3).tolist(),
        }

    def _read_metrics(self, deadline: float) -> bool:
        while True:
            found = self._metrics.read()
            if found.restarted:
                self.curves, self.latest = {}, {}
                self._seconds.clear()
            if found.restarted or found.rows:
                self.versions["curves"] += 1
                self._add(found.rows)
            if not found.more or time.monotonic() >= deadline:
                return found.more

    def _add(self, rows: list[dict[str, Any]]) -> None:
        columns: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            step = _number(row.pop("step", None))
            if step is None:
                continue
            for key, value in row.items():
                if type(value) is float or _is_number(value):
                    column = columns.get(key)
                    if column is None:
                        column = columns[key] = ([], [])
                    column[0].append(step)
                    column[1].append(value)
            self.latest["step"] = max(step, self.latest.get("step", step))
        for key, (steps, values) in columns.items():
            self.curves.setdefault(key, Curve()).extend(steps, values)
            if math.isfinite(values[-1]):
                self.latest[key] = values[-1]
        self._seconds.extend(filter(None, map(_seconds_of, rows[-RECENT:])))

    def _read_samples(self) -> None:
        for tail, sample in ((self._samples, _ppo_sample), (self._rows, _row_sample)):
            found = tail.read()
            if found.restarted:
                self.samples.clear()
            if found.rows or found.restarted:
                self.versions["samples"] += 1
            self.samples.extend(shown for row in found.rows if (shown := sample(row)) is not None)

    def _read_experts(self) -> None:
        found = self._experts.read()
        if found.restarted:
            self.loads.clear()
        if found.rows or found.restarted:
            self.versions["experts"] += 1
        for row in found.rows:
            try:
                load = np.array(row["load"], dtype=np.float32)
                step = float(row["step"])
            except (KeyError, TypeError, ValueError):
                continue
            if load.ndim == 2 and load.size and np.isfinite(load).all():
                self.loads = [(at, of) for at, of in self.loads if at < step and of.shape == load.shape]
                self.loads.append((step, load * load.shape[1]))


SPEEDS = ("speed/train", "speed/rollout", "speed/generate")


class Run:
    """One run. name: the recipe's, or the folder's until the recipe is written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stages: dict[str, Stage] = {}
        self._recipe, self._report = JsonFile(folder / "recipe.json"), JsonFile(folder / "report.json")

    @property
    def name(self) -> str:
        return plain(self._recipe.content.get("name") or self.folder.resolve().name)

    def read(self, deadline: float) -> bool:
        """Read new lines of all stages until `deadline`; returns True if more remain."""
        self._recipe.read()
        self._report.read()
        kinds = self._kinds()
        for name in [name for name in self.stages if name not in kinds]:
            del self.stages[name]
        self.stages = {name: self.stages.get(name) or Stage(self.folder / name, kind) for name, kind in kinds.items()}
        more = [stage.read(deadline) for stage in self.stages.values()]
        return any(more)

    def _kinds(self) -> dict[str, str]:
        """{stage: kind} of the base model, of the recipe's stages in order, and of other stage folders."""
        try:
            folders = [entry.name for entry in os.scandir(self.folder) if _is_stage(entry)]
        except OSError:
            folders = []
        recipe = self._recipe.content.get("stages")
        named = {
            str(name): str(stage.get("kind", "")) if isinstance(stage, dict) else ""
            for name, stage in (recipe.items() if isinstance(recipe, dict) else ())
            if Path(name).name == name
        }
        base = {BASE: BASE} if BASE in folders else {}
        return base | named | {name: "" for name in sorted(folders) if name not in base | named}

    def state(self, now: float) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": plain(self._recipe.content.get("description") or ""),
            "stages": [stage.state(now) for stage in self.stages.values()],
            "report": self._report.version if self._report.content.get("evaluations") else 0,
        }

    def comparison(self) -> dict[str, Any]:
        """Verdict, tables and samples of report.json, as texts."""
        report = self._report.content
        found = report.get("evaluations")
        tables = [_table(evaluation) for evaluation in found or [] if isinstance(evaluation, dict)]
        samples = [
            _evaluation_sample(sample)
            for evaluation in found or []
            if isinstance(evaluation, dict)
            for sample in evaluation.get("samples") or []
        ]
        verdict = str(report.get("verdict") or "").rstrip(".").split("; ")
        return {"verdict": [plain(line) for line in verdict if line], "tables": tables, "samples": samples}


class Watched:
    """The runs in a folder, which is a run itself or contains runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, Run] = {}

    def scan(self) -> dict[str, float]:
        """Find the runs; returns {name in requests: time of the last change}, newest first."""
        found = dict(sorted(_found(self.folder, "", DEPTH), key=lambda item: -item[1])[:RUNS])
        for name in [name for name in self.runs if name not in found]:
            del self.runs[name]
        return found

    def read(self, names: list[str], deadline: float) -> bool:
        """Read the runs `names`, which `scan` has found; returns True if more remains to be read."""
        more = False
        for name in names:
            run = self.runs.setdefault(name, Run(self.folder / name))
            more |= run.read(deadline)
        return more


def _found(folder: Path, name: str, depth: int) -> Iterator[tuple[str, float]]:
    """(name, time of the last change) of each run in a folder. name: name of `folder` in requests; "" for the root."""
    if signature := _signature(folder / "recipe.json"):
        yield name or ".", max([signature[0] / 1e9, *_stage_changes(folder)])
        return
    if depth == 0:
        return
    try:
        children = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return
    for child in children:
        yield from _found(folder / child, f"{name}/{child}" if name else child, depth - 1)


def _stage_changes(folder: Path) -> Iterator[float]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        for name in ("metrics.jsonl", MANIFEST, "config.json"):
            if signature := _signature(Path(entry.path) / name):
                yield signature[0] / 1e9


def _is_stage(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and any(os.path.isfile(os.path.join(entry.path, name)) for name in ("config.json", MANIFEST))


def _signature(path: Path) -> tuple[int, int, int] | None:
    """(modification time in ns, size, inode) of a file; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _is_number(value: Any) -> bool:
    """True for a number that a float can represent, NaN and infinity included."""
    return type(value) is float or (type(value) is int and abs(value) < 1e300)


def _number(value: Any) -> float | None:
    return value if _is_number(value) and math.isfinite(value) else None


def _seconds_of(row: dict[str, Any]) -> float:
    """Seconds of a step or of a PPO iteration; 0.0 if the row has no times."""
    times = [row.get(key) for key in ("time/step", *(f"time/{phase}" for phase in PHASES))]
    return sum(filter(None, map(_number, times)))


def _text(value: Any) -> str:
    text = plain(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} characters more)"


def _ppo_sample(row: dict[str, Any]) -> dict[str, Any] | None:
    if not _is_number(row.get("step")):
        return None
    score = row.get("score")
    title = f"score {number(score)}" if _is_number(score) else ""
    if row.get("finished") is False:
        title += ", truncated"
    texts = [{"title": title, "text": _text(row.get("completion"))}]
    return {"title": f"step {number(row['step'])}", "prompt": _text(row.get("prompt")), "texts": texts}


def _row_sample(row: dict[str, Any]) -> dict[str, Any] | None:
    names = [name for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
    texts = [{"title": name, "text": _text(_content(row[name]))} for name in names]
    return {"title": "row", "prompt": _text(_content(row.get("prompt"))), "texts": texts} if texts else None


def _content(messages: Any) -> Any:
    """The text of a single message; several messages unchanged."""
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        return messages[0].get("content")
    return [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else messages


def _evaluation_sample(sample: dict[str, Any]) -> dict[str, Any]:
    texts = [] if sample.get("reference") is None else [{"title": "Reference", "text": _text(sample["reference"])}]
    for model, completion in (sample.get("completions") or {}).items():
        score = (sample.get("scores") or {}).get(model)
        title = plain(model) if score is None else f"{plain(model)}, score {number(score)}"
        texts.append({"title": title, "text": _text(completion)})
    return {"title": plain(sample.get("title")), "prompt": _text(sample.get("prompt")), "texts": texts}


def _table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Means and intervals of an evaluation: head and rows of texts."""
    metrics = evaluation.get("metrics") or []
    rows = []
    for model in evaluation.get("models") or []:
        cells = [metric["models"].get(model) for metric in metrics]
        rows.append([plain(model), *([mean(cell), interval(cell)] if cell else [NOTHING, ""] for cell in cells)])
    return {
        "stage": plain(evaluation.get("stage")),
        "head": [plain(metric["label"]) for metric in metrics],
        "rows": rows,
    }
