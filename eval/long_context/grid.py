"""Scores by task, language, length and depth, with intervals, and the places where a model is weak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from align.config.long_context import LongTask
from align.eval.long_context.generate import LongSample
from align.eval.statistics.summary import Summary, summarize


@dataclass(frozen=True)
class Cell:
    """The samples with one task, language, length and depth.

    tokens: smallest and largest number of tokens of a prompt.
    scores: one per sample; None if it is unscored.
    """

    task: LongTask
    language: str
    length: int
    depth: float | None
    tokens: tuple[int, int]
    scores: tuple[float | None, ...]

    @property
    def summary(self) -> Summary:
        """Mean score, its interval, and the number of unscored samples."""
        return summarize(self.scores, resamples=2000, seed=0)


def grid(scored: Iterable[tuple[LongSample, float | None]]) -> list[Cell]:
    """One cell for each place of the grid, in the order of the samples. A score is None for an unscored sample."""
    places: dict[tuple[LongTask, str, int, float | None], list[tuple[LongSample, float | None]]] = {}
    for sample, score in scored:
        places.setdefault((sample.task, sample.language, sample.length, sample.depth), []).append((sample, score))
    cells = []
    for place, found in places.items():
        tokens = [sample.tokens for sample, _ in found]
        cells.append(Cell(*place, (min(tokens), max(tokens)), tuple(score for _, score in found)))
    return cells


def weak_places(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each task and language whose score at some depths, or some lengths, is below that at others.

    A place is weak if the upper end of its interval is below the lower end of the best place's. All samples of a depth,
    or of a length, count together.
    """
    sentences = []
    for task, language in dict.fromkeys((cell.task, cell.language) for cell in cells):
        chosen = [cell for cell in cells if (cell.task, cell.language) == (task, language)]
        for key, unit in (("depth", "%"), ("length", "tokens")):
            scores: dict[float, list[float | None]] = {}
            for cell in chosen:
                if (value := getattr(cell, key)) is not None:
                    scores.setdefault(value, []).extend(cell.scores)
            if sentence := _weak(key, unit, scores):
                sentences.append(f"{task} ({language}) is weak at {sentence}")
    return sentences


def _weak(key: str, unit: str, scores: dict[float, list[float | None]]) -> str:
    known = {}
    for value in sorted(scores):
        found = summarize(scores[value], resamples=2000, seed=0)
        if found.mean is not None and found.low is not None and found.high is not None:
            known[value] = (found.mean, found.low, found.high)
    best = max(known.values(), default=(0.0, 0.0, 0.0))
    weak = [value for value, (_, _, high) in known.items() if high < best[1]]
    if not weak:
        return ""
    values = ", ".join(f"{value:g} {unit} ({known[value][0]:.2f})" for value in weak)
    return f"{key} {values}; the best {key} has {best[0]:.2f}"
