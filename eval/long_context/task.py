"""The grid as a task of `align eval`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align.config.long_context import LongContext
from align.config.own_task import read_task
from align.eval.encoder import Encoder, Unscorable
from align.eval.long_context.fit import Count
from align.eval.long_context.generate import Generator, spots
from align.eval.long_context.grid import Cell, weak_places
from align.eval.long_context.heat_map import heat_map
from align.eval.long_context.score import share_found
from align.eval.records import Record
from align.eval.statistics.summary import summarize
from align.eval.task import CorpusValue, Item, Scores, Verdict, by_sample, unscored

METRIC = "found"


class LongContextTask:
    """A grid of a YAML file. See `Task` for the methods; each cell is a metric of its own beside the mean.

    settings: the grid.
    chat: render prompts with the chat template; otherwise the prompt ends with the opening of the answer.
    """

    def __init__(self, settings: LongContext, *, chat: bool = False):
        self.settings, self.chat, self.name = settings, chat, settings.name
        facts = settings.model_dump_json(exclude={"name"})
        self.version = f"1, {hashlib.sha256(facts.encode()).hexdigest()[:8]}{', chat' if chat else ''}"
        self.text = f"{self.name}, version {self.version}"
        self._spots = {spot.id: spot for spot in spots(settings)}
        self._generator = Generator(settings)
        self.better: Mapping[str, int] = {METRIC: 1} | {self._cell(name): 1 for name in self._spots}

    @classmethod
    def read(cls, file: Path, *, chat: bool = False) -> LongContextTask:
        """The grid of a file. Paths of haystacks are relative to it."""
        settings = read_task(file, LongContext, "a grid; write a mapping with kind: long_context")
        places = {language: str(file.parent / path) for language, path in settings.haystacks.items()}
        return cls(settings.model_copy(update={"haystacks": places}), chat=chat)

    def documents(self) -> Sequence[str]:
        return list(self._spots)

    def requests(self, documents: Sequence[str], encoder: Encoder) -> Iterator[Item]:
        new = self.settings.max_new_tokens
        for document in documents:
            spot = self._spots[document]
            if spot.length > encoder.max_length:
                yield Item(document, f"length {spot.length} exceeds max_length {encoder.max_length}")
                continue
            opening = self._generator.opening(spot)
            sample = self._generator.sample(spot, self._count(opening, encoder))
            try:
                ids = self._ids(sample.prompt, opening, encoder)
                yield Item(document, encoder.request(ids, task=self.name, max_new_tokens=new))
            except Unscorable as reason:
                yield Item(document, str(reason))

    def _count(self, opening: str, encoder: Encoder) -> Count:
        return lambda prompt: len(self._ids(prompt, opening, encoder))

    def _ids(self, prompt: str, opening: str, encoder: Encoder) -> list[int]:
        if self.chat:
            return encoder.chat([{"role": "user", "content": prompt}])
        return encoder.text(f"{prompt}\n\n{opening}")

    def score(self, records: Sequence[Record]) -> Scores:
        verdicts = []
        cells: dict[str, list[tuple[str, float]]] = {}
        for (document, sample), (record, *_) in by_sample(records).items():
            reason, expected = unscored([record]), self._generator.expected(self._spots[document])
            value = None if reason else share_found(record.text, expected)
            if value is not None:
                cells.setdefault(self._cell(document), []).append((document, value))
            shown = {"answer": record.text, "target": ", ".join(expected)}
            verdicts.append(Verdict(document, sample, {METRIC: value}, reason, shown=shown))
        places = self._places(verdicts, {record.document: record.prompt_tokens for record in records})
        titles = dict.fromkeys((cell.task, cell.language) for cell in places)
        figures = {
            f"{task} ({language})": heat_map(
                [cell for cell in places if (cell.task, cell.language) == (task, language)],
                f"{task} ({language}): score by depth and length in tokens",
            )
            for task, language in titles
        }
        corpus = {name: _corpus(values) for name, values in cells.items()}
        return Scores(verdicts, corpus, weak_places(places), figures)

    def _places(self, verdicts: Sequence[Verdict], tokens: Mapping[str, int]) -> list[Cell]:
        """The grid's cells. tokens: of each document's prompt."""
        found: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            found.setdefault(self._cell(verdict.document), []).append(verdict)
        cells = []
        for chosen in found.values():
            spot = self._spots[chosen[0].document]
            counts = [tokens[verdict.document] for verdict in chosen]
            scores = tuple(verdict.values[METRIC] for verdict in chosen)
            cells.append(Cell(spot.task, spot.language, spot.length, spot.depth, (min(counts), max(counts)), scores))
        return cells

    def _cell(self, document: str) -> str:
        spot = self._spots[document]
        depth = "" if spot.depth is None else f", depth {spot.depth:g} %"
        return f"{spot.task} ({spot.language}), {spot.length} tokens{depth}"


def _corpus(scores: Sequence[tuple[str, float]]) -> CorpusValue:
    """Mean score of a cell; several answers to one document are a cluster."""
    documents, values = zip(*scores, strict=True)
    found = summarize(values, resamples=2000, seed=0, clusters=documents)
    assert found.mean is not None
    return CorpusValue(found.mean, found.low, found.high, found.method)
