"""The sides of a comparison: runs, stages of runs, and models of `align eval`, on tasks or on preference pairs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config.paths import local_path
from align.errors import UserError
from align.eval.compare import BETTER
from align.eval.comparison.pairs import TASK as PAIRS_TASK
from align.eval.comparison.pairs import Figure, pair_figures, pair_metrics, prompts_of
from align.eval.pairing import document_values, model_results
from align.eval.report.formatting import flat
from align.eval.report.write import read_metrics, read_object, stage_kinds, valid_recipe
from align.eval.reward_model.recorded import PAIRS, read_scores
from align.eval.reward_model.recorded import RESULTS as PAIRS_RESULTS
from align.run.folder import MANIFEST, METRICS, RESULTS
from align.run.manifest import result_id
from align.run.metrics import EVALUATION, with_unit
from align.run.stale import stale_stages

SCORES = "scores.jsonl"
"""The values of a model's documents, in its folder in that of an evaluation."""
EVALUATE = "evaluate"
"""Kind of the stages whose results are values per document."""
Documents = Mapping[str, float | None]
"""Value of each document; None if it is unscored."""


class Key(NamedTuple):
    """A metric of a comparison.

    model: the stage whose model is measured; "" if the side itself is a model. task: "" for an evaluate stage's own
    prompts and pairs.
    """

    model: str
    task: str
    metric: str


class Measured(NamedTuple):
    """Values of a metric.

    label: title with its unit. better: 1 if higher is better, -1 if lower is, 0 if neither. clusters: of documents that
    belong together, such as the pairs of one prompt; None if every document is one of its own.
    """

    label: str
    better: int
    documents: Documents
    clusters: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Curves:
    """The rows of a stage's metrics.jsonl."""

    kind: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    kind: what `path` is. measured: values per document. finals: last value of each metric of a training stage, by
    (stage, key); the stage is "" if the side is a stage. curves: by stage. settings: by dotted path. results: id of
    each stage's result. stale: reason of each stale stage. versions: of tasks. unpaired: (task, metric) that are not
    means over documents. figures: biases and calibration on preference pairs, by label.
    """

    name: str
    path: Path
    kind: Literal["run", "stage", "evaluation"]
    measured: dict[Key, Measured] = field(default_factory=dict)
    finals: dict[tuple[str, str], float] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    unpaired: tuple[tuple[str, str], ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)


def read_sides(texts: Sequence[str]) -> list[Side]:
    """Read the sides, each `PATH` or `NAME=PATH`; an evaluation with several models is one side per model."""
    sides: list[Side] = []
    named: set[int] = set()
    for text in texts:
        name, path = _split(text)
        found = _read(path)
        for side in found:
            if name:
                named.add(len(sides))
                side = replace(side, name=name if len(found) == 1 else f"{name}/{side.name}")
            sides.append(side)
    if len(sides) < 2:
        raise UserError(f"{texts[0]}: it is one model, and a comparison needs two. Pass another run or evaluation.")
    return _distinct(sides, named)


def _split(text: str) -> tuple[str, Path]:
    """The name, or "", and the path of an argument. A path that exists may contain `=`."""
    name, equals, rest = text.partition("=")
    if equals and name and rest and "/" not in name and not local_path(text).exists():
        return name, local_path(rest)
    return "", local_path(text)


def _distinct(sides: list[Side], named: set[int]) -> list[Side]:
    """Give sides with the same name more of their paths. named: positions of the sides that the user has named."""
    parts = [side.path.absolute().parts for side in sides]
    depths = [1] * len(sides)
    while True:
        names = [
            side.name if depth == 1 else "/".join(of_side[-depth:])
            for side, depth, of_side in zip(sides, depths, parts)
        ]
        repeated = [number for number, name in enumerate(names) if names.count(name) > 1]
        longer = [number for number in repeated if number not in named and depths[number] < len(parts[number]) - 1]
        if not longer:
            break
        for number in longer:
            depths[number] += 1
    if repeated:
        raise UserError(
            f"'{names[repeated[0]]}': {len(repeated)} of the compared results have this name. Pass each as NAME=PATH."
        )
    return [replace(side, name=name) for side, name in zip(sides, names)]


def _read(path: Path) -> list[Side]:
    if (path / "recipe.json").is_file():
        return [read_run(path)]
    if _is_model(path):
        return [_read_model(path)]
    if (path / MANIFEST).is_file() or (path / METRICS).is_file():
        return [read_stage(path)]
    if models := _models(path):
        return [_read_model(model) for model in models]
    raise UserError(
        f"{path}: it is neither a run, a stage nor an evaluation. Pass a folder that `align run` or `align eval` wrote."
    )


# --- runs and stages -----------------------------------------------------------------------------------------


def read_run(path: Path) -> Side:
    """A run with all its stages, and the values per document of its evaluate stages."""
    recipe = read_object(path / "recipe.json") or {}
    kinds = stage_kinds(path, recipe)
    manifests = _manifests(path, kinds)
    finals = {
        (stage, key): value
        for stage, manifest in manifests.items()
        if kinds[stage] != EVALUATE
        for key, value in _numbers(manifest.get("metrics"))
    }
    settings = {key: value for key, value in flat(recipe) if key not in ("name", "description")}
    return Side(
        path.resolve().name,
        path,
        "run",
        measured=_measured(path, kinds, None),
        versions=_versions(path, kinds),
        finals=finals,
        curves={stage: curves for stage, kind in kinds.items() if (curves := _curves(path / stage, kind)).rows},
        settings=settings | _environment(manifests.values()),
        results={stage: str(result_id(path / stage)) for stage in manifests},
        stale=stale_stages(path, manifests, valid_recipe(recipe)),
    )


def read_stage(path: Path) -> Side:
    """A stage of a run: its curves, and what the run's evaluate stages have measured of its model."""
    run, name = path.absolute().parent, path.absolute().name
    recipe = read_object(run / "recipe.json") or {}
    kinds = stage_kinds(run, recipe)
    manifests = _manifests(run, kinds)
    manifest = manifests.get(name, {})
    kind = kinds.get(name) or str(manifest.get("kind") or "")
    evaluates = kind == EVALUATE
    config = manifest.get("config") or read_object(path / "config.json") or {}
    settings = {"seed": config.get("seed"), "dtype": config.get("dtype"), **dict(flat(config.get(name) or {}))}
    return Side(
        name,
        path,
        "stage",
        measured=_measured(run, {name: kind} if evaluates else kinds, None if evaluates else name),
        versions=_versions(run, kinds),
        finals={} if evaluates else {("", key): value for key, value in _numbers(manifest.get("metrics"))},
        curves={name: curves} if (curves := _curves(path, kind)).rows else {},
        settings=settings | _environment([manifest]),
        results={name: str(result_id(path))} if manifest else {},
        stale={key: why for key, why in stale_stages(run, manifests, valid_recipe(recipe)).items() if key == name},
    )


def _manifests(run: Path, kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifests of the finished stages, in the order of the recipe."""
    return {name: found for name in kinds if (found := read_object(run / name / MANIFEST)) is not None}


def _numbers(metrics: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    for key, value in (metrics or {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def _curves(folder: Path, kind: str) -> Curves:
    return Curves(kind, read_metrics(folder / METRICS))


def _environment(manifests: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Commit, packages and machine of some stages; several values are separated by commas."""
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        if manifest.get("commit"):
            changed = " with changes" if manifest.get("dirty") else ""
            found.setdefault("commit", {})[f"{str(manifest['commit'])[:12]}{changed}"] = None
        for package, version in (manifest.get("packages") or {}).items():
            found.setdefault(f"package {package}", {})[str(version)] = None
        for part, value in (manifest.get("hardware") or {}).items():
            found.setdefault(f"machine {part}", {})[str(value)] = None
    return {key: ", ".join(values) for key, values in found.items()}


def _measured(run: Path, kinds: Mapping[str, str], model: str | None) -> dict[Key, Measured]:
    """Values of the evaluate stages of a run, the last one's if several measure the same. model: only this one, under
    the name ""; None: all models."""
    found: dict[Key, Measured] = {}
    for stage, kind in kinds.items():
        results = read_object(run / stage / RESULTS) if kind == EVALUATE else None
        if results is not None and (manifest := read_object(run / stage / MANIFEST)) is not None:
            for key, measured in _of_results(results, _pairs_id(run, manifest, stage)):
                if model is None:
                    found[key] = measured
                elif key.model == model:
                    found[key._replace(model="")] = measured
    return found


def _versions(run: Path, kinds: Mapping[str, str]) -> dict[str, str]:
    """Versions of the tasks of `align eval` that the evaluate stages of a run have measured."""
    found: dict[str, str] = {}
    for stage in (stage for stage, kind in kinds.items() if kind == EVALUATE):
        content = read_object(run / stage / "tasks" / RESULTS) or {}
        for of_model in (content.get("models") or {}).values():
            found |= {task: str(result["version"]) for task, result in of_model["tasks"].items() if "version" in result}
    return found


def _of_results(results: Mapping[str, Any], pairs: str) -> Iterator[tuple[Key, Measured]]:
    """The metrics of an evaluate stage's results.json. pairs: identifies its preference pairs."""
    models: Mapping[str, Mapping[str, Any]] = results.get("models") or {}
    reference = str(results.get("reference") or results.get("baseline") or "the reference")
    names = _document_names(results.get("prompts") or [])
    for model, of_model in models.items():
        for metric in (metric for metric in EVALUATION if metric.key in BETTER):
            values, documents = of_model.get(metric.key), names
            if metric.key == "preference":
                values = (values or {}).get("values")
                documents = [f"{pairs} {number}" for number in range(len(values or []))]
            if isinstance(values, list) and len(values) == len(documents):
                label = with_unit(metric.title.replace("REFERENCE", reference), metric.unit)
                yield Key(model, "", metric.key), Measured(label, BETTER[metric.key], _paired(documents, values))
    for task, of_task in (results.get("tasks") or {}).items():
        documents = _document_names(of_task.get("prompts") or [])
        for model, result in of_task["models"].items():
            for label, metric_values in result["metrics"].items():
                if len(metric_values["values"]) == len(documents):
                    measured = _paired(documents, metric_values["values"])
                    yield Key(model, task, label), Measured(f"{task}: {label}", 1, measured)
    for task, metrics in (results.get("benchmarks") or {}).items():
        for label, of_metric in metrics.items():
            for model, values_by_document in of_metric["models"].items():
                yield Key(model, task, label), Measured(f"{task}: {label}", of_metric["better"], values_by_document)


def _paired(documents: Sequence[str], values: Sequence[float | None]) -> dict[str, float | None]:
    return {document: None if v is None else float(v) for document, v in zip(documents, values, strict=True)}


def _document_names(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name of each prompt, from its text and reference, and the number of equal ones before it."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        text = json.dumps([prompt.get("prompt"), prompt.get("reference")])
        names.append(f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {seen[text]}")
        seen[text] += 1
    return names


def _pairs_id(run: Path, manifest: Mapping[str, Any], stage: str) -> str:
    """Identifies the preference pairs of an evaluate stage: the settings of its sources, and the rows of stages."""
    config = (manifest.get("config") or {}).get(stage) or {}
    found = hashlib.sha256(json.dumps([config.get("preferences"), manifest.get("inputs")]).encode())
    for source in config.get("preferences") or []:
        if isinstance(source, dict) and source.get("kind") == "stage":
            for file in sorted((run / str(source.get("stage")) / "data").glob("*.jsonl")):
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


# --- evaluations ---------------------------------------------------------------------------------------------


def _is_model(path: Path) -> bool:
    """True for a model's folder in that of an evaluation on tasks or on preference pairs."""
    has_pairs = (path / PAIRS).is_file() and (path.absolute().parent / PAIRS_RESULTS).is_file()
    return has_pairs or (path / SCORES).is_file()


def _models(path: Path) -> list[Path]:
    """The models in the folder of an evaluation, in the order in which they were evaluated."""
    contents = [read_object(path / file) or {} for file in (RESULTS, PAIRS_RESULTS)]
    order = list(dict.fromkeys(name for content in contents for name in content.get("models") or {}))
    found = sorted(folder for folder in path.glob("*") if _is_model(folder))
    return sorted(found, key=lambda folder: order.index(folder.name) if folder.name in order else len(order))


def _read_model(folder: Path) -> Side:
    """A model of `align eval`, with its results on tasks and on preference pairs."""
    tasks = model_results(folder)
    values = document_values(folder, tasks)
    measured = {
        Key("", task, metric): Measured(
            f"{task}: {metric}",
            int(((tasks.get(task) or {}).get("metrics") or {}).get(metric, {}).get("better", 1)),
            documents,
        )
        for (task, metric), documents in values.items()
    }
    pairs = read_scores(folder)
    prompts = prompts_of(pairs)
    for metric in pair_metrics(pairs):
        measured[Key("", PAIRS_TASK, metric.key)] = Measured(metric.label, metric.better, metric.values, prompts)
    return Side(
        folder.name,
        folder,
        "evaluation",
        measured=measured,
        settings=_evaluation_settings(folder),
        versions={task: str(result["version"]) for task, result in tasks.items() if "version" in result},
        unpaired=tuple(
            (task, metric)
            for task, result in tasks.items()
            for metric in result["metrics"]
            if (task, metric) not in values
        ),
        figures=pair_figures(pairs),
    )


def _evaluation_settings(folder: Path) -> dict[str, Any]:
    """The settings of a model's evaluation on tasks and of that on preference pairs."""
    found: dict[str, Any] = {}
    if content := read_object(folder.parent / RESULTS):
        about = (content.get("models") or {}).get(folder.name) or {}
        kept = {key: value for key, value in about.items() if key != "tasks"}
        found |= flat({**(content.get("settings") or {}), **kept})
    scored = read_object(folder.parent / PAIRS_RESULTS) or {}
    if about := (scored.get("models") or {}).get(folder.name):
        found["checkpoint"] = about.get("checkpoint")
        found |= flat({"pairs": {"source": scored.get("source"), **(scored.get("settings") or {})}})
    return found
