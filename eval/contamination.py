"""Find items of an evaluation in training data, and score with and without them.

An item is flagged if a training text has at least `THRESHOLD` of its n-grams: word 3-grams, or 6-grams of characters in
a language without spaces; see `align.data.filters.contamination`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.parts import FileSource, SourceBase
from align.config.recipe import Recipe
from align.config.stage import find
from align.config.stages import EvaluateStage
from align.data.filters.contamination import ItemIndex
from align.data.filters.texts import texts_of
from align.data.shapes import SHAPES, DropRow, Shape
from align.data.sources import source_chunks
from align.errors import UserError
from align.eval.results import Results, mean_metric
from align.eval.task import Verdict
from align.run.folder import MODEL

THRESHOLD = 0.35
SHOWN_CHARACTERS = 2000
QUESTION = ("question", "question, turn 1", "prompt")
"""Keys of `Verdict.shown` with the text of the document; the first key that a verdict has is used."""
EVALUATED = {"held_out", "evaluate"}
"""Parts of a stage whose sources are not trained on."""
SHAPES_OF_TRAINING: tuple[tuple[Shape, ...], ...] = (tuple(shape for shape in SHAPES if shape != "prompt"), ("prompt",))


@dataclass
class TrainingData:
    """Texts that a run was trained on.

    sources: (stage, source) of each training source. rows: rows that were read. unusable: rows without a text.
    """

    run: Path
    sources: list[tuple[str, Any]]
    stage_dirs: dict[str, Path] = field(default_factory=dict)
    rows: int = 0
    unusable: int = 0

    @classmethod
    def of(cls, run: Path) -> TrainingData:
        """The training data of a run, or the rows of a file or folder. Raises UserError for unreadable data."""
        recipe_file = run / "recipe.json"
        if recipe_file.is_file():
            recipe = Recipe.model_validate_json(recipe_file.read_text(encoding="utf-8"))
            sources = [
                (name, source)
                for name, stage in recipe.stages.items()
                if not isinstance(stage, EvaluateStage)
                for place, source in find(stage, SourceBase)
                if not EVALUATED & set(place.split("."))
            ]
            found = cls(run, sources, {name: run / name for name in recipe.stages})
        elif run.exists() and not (run / MODEL).is_dir():
            found = cls(run, [(run.name, FileSource(path=str(run)))])
        else:
            raise UserError(
                f"--contamination {run}: it is neither the folder of a run nor a file or folder with training data. "
                "Pass the folder that `align run` wrote."
            )
        if not found.sources:
            raise UserError(f"--contamination {run}: no stage of this run has training data. Pass another run.")
        for _, source in found.sources:
            next(source_chunks(source, stage_dirs=found.stage_dirs))
        return found

    def texts(self) -> Iterator[tuple[str, str]]:
        """(stage, file and row; text) of each row, before filters and truncation."""
        self.rows = self.unusable = 0
        for stage, source in self.sources:
            for chunk in source_chunks(source, stage_dirs=self.stage_dirs):
                for number, row in enumerate(chunk.rows()):
                    self.rows += 1
                    text = _text(row)
                    if text:
                        yield f"{stage}: {chunk.where(number)}", text
                    else:
                        self.unusable += 1


def _text(row: Any) -> str:
    for accepted in SHAPES_OF_TRAINING:
        with suppress(DropRow):
            if text := texts_of(row, accepted).part("all"):
                return text
    return ""


def add_contamination(results: Results, data: TrainingData) -> None:
    """Add the key `contamination` to the content of some results, and a note for each task with flagged items.

    Its value: run; threshold; rows of the training data, and those without a text (`unusable`); tasks that have
    documents without a question (`unread`); and by task the number of documents, those without an n-gram
    (`too_short`), the flagged ones with share, item, training text and place, and by model and metric the statistics of
    all documents, of those that are not flagged, and of those that are.
    """
    verdicts = {model: results.all_verdicts(model) for model in results.models}
    items: dict[tuple[str, str], str] = {}
    unread: dict[str, None] = {}
    for rows in verdicts.values():
        for row in rows:
            if text := next((row["shown"][key] for key in QUESTION if row["shown"].get(key)), ""):
                items.setdefault((row["task"], row["document"]), text)
            else:
                unread.setdefault(row["task"])
    flagged, short = _flagged(items, data)
    tasks: dict[str, dict[str, Any]] = {}
    for task, document in items:
        found = tasks.setdefault(task, {"documents": 0, "too_short": 0, "flagged": {}, "scores": {}})
        found["documents"] += 1
        found["too_short"] += (task, document) in short
        if (task, document) in flagged:
            found["flagged"][document] = flagged[task, document]
    for task, found in tasks.items():
        for model, rows in verdicts.items():
            chosen = [row for row in rows if row["task"] == task]
            found["scores"][model] = _scores(chosen, set(found["flagged"]))
    results.content["contamination"] = {
        "run": str(data.run),
        "threshold": THRESHOLD,
        "rows": data.rows,
        "unusable": data.unusable,
        "unread": list(unread),
        "tasks": tasks,
    }
    results.content["notes"] += list(_notes(results.content["contamination"]))


def _flagged(
    items: Mapping[tuple[str, str], str], data: TrainingData
) -> tuple[dict[tuple[str, str], dict[str, Any]], set[tuple[str, str]]]:
    """(the training text with the largest share of each flagged item, items without an n-gram)."""
    keys = list(items)
    index = ItemIndex(items.values())
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for where, text in data.texts():
        for item, share in index.matches(text, THRESHOLD):
            key = keys[item]
            if key not in found or share > found[key]["share"]:
                found[key] = {
                    "share": share,
                    "item": items[key][:SHOWN_CHARACTERS],
                    "training": text[:SHOWN_CHARACTERS],
                    "where": where,
                }
    return found, {keys[item] for item in index.short_items}


def _scores(rows: list[dict[str, Any]], flagged: set[str]) -> dict[str, dict[str, Any]]:
    """By metric: [mean, low, high, n] of all documents, of those that are not flagged (clean), and of the flagged."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row["values"]):
        parts = {"all": rows, "clean": [r for r in rows if r["document"] not in flagged]}
        parts["flagged"] = [row for row in rows if row["document"] in flagged]
        found[name] = {}
        for part, chosen in parts.items():
            verdicts = [Verdict(row["document"], row["sample"], row["values"]) for row in chosen]
            metric = mean_metric(verdicts, name, 0, 0)
            found[name][part] = {key: getattr(metric, key) for key in ("mean", "low", "high", "n")}
    return found


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    for task in found["unread"]:
        yield f"{task}: documents without a question are not looked for in the training data"
    for task, of_task in found["tasks"].items():
        if of_task["flagged"]:
            yield (
                f"{task}: {len(of_task['flagged'])} of {of_task['documents']} documents are in the training data of "
                f"{found['run']}; the page has the scores without them, and the texts"
            )
        if of_task["too_short"]:
            yield f"{task}: {of_task['too_short']} documents are too short to be found in training data"
