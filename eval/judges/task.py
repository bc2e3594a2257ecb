"""Judged tasks of `align eval`: MT-Bench, AlignBench, AlpacaEval, Arena-Hard, and the user's own in YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

from align.config.judged_task import JudgedTask
from align.config.own_task import read_task
from align.errors import UserError
from align.eval.encoder import Encoder, Unscorable
from align.eval.judges.bias import grade_agreement, judge_agreement
from align.eval.judges.grading import Grade, ModelAnswers, Pair
from align.eval.judges.length import equal_length_rate
from align.eval.judges.panel import AnyJudge
from align.eval.judges.prompts import VERSION, Question
from align.eval.judges.questions import read_baseline, read_questions
from align.eval.judges.report import agreement_line, comparing_notes, grade_agreement_line, grading_notes
from align.eval.records import Record
from align.eval.statistics.summary import summarize
from align.eval.task import CorpusValue, Item, Scores, Verdict, unscored
from align.eval.task_data import data_place, read_rows

SHOWN_CHARACTERS = 4000
Key = tuple[str, int]
"""Document and sample."""


@dataclass(frozen=True)
class _Judged:
    """The judgements of one judge on one model.

    values: by metric, document and sample; None without a judgement. said: the judge's texts.
    reasons: why a document has no judgement.
    """

    values: dict[str, dict[Key, float | None]]
    said: dict[Key, str]
    reasons: dict[Key, str]


class QuestionTask:
    """Questions whose answers are judged. See `Task` and `FollowUp` for the methods.

    Prompts are rendered with the chat template. A question of several turns is asked one turn after the other.

    file: the YAML file. judges: the first and any others. data: folder of `--data`.
    missing: the command that downloads each data set that is not in `data`.
    """

    def __init__(self, file: Path, *, judges: Sequence[AnyJudge], data: Path | None = None):
        self.file, self.judges, self.data = file, judges, data
        self.settings = read_task(file, JudgedTask, "a task; write a mapping with kind: judged")
        settings = self.settings
        self.name = settings.name
        against = f", against {settings.baseline.name}" if settings.baseline else ""
        self.version = f"{settings.version}, judge prompts {VERSION}{against}"
        self.text = f"{self.name}, version {settings.version}"
        self.better: Mapping[str, int] = {}
        sources = [settings.data, *([settings.baseline.data] if settings.baseline else [])]
        self.missing = [gone for source in sources if source and (gone := data_place(source, file, data)[1])]
        if not judges:
            raise UserError(
                f"{self.name}: its answers are judged, and no judge is given. Pass --judge with the URL of a server or "
                "the folder of a reward model."
            )
        self._asked: tuple[Encoder, dict[tuple[str, ...], Item]] | None = None

    # --- data ------------------------------------------------------------------------------------------------

    @cached_property
    def _questions(self) -> dict[str, Question]:
        rows = read_rows(self.settings.data, self.file, self.data)
        return {question.id: question for question in read_questions(self.settings, rows, str(self.file))}

    @cached_property
    def _baseline(self) -> dict[str, tuple[str, ...]]:
        """Answers of the baseline by document."""
        baseline = self.settings.baseline
        assert baseline is not None
        rows = read_rows(baseline.data or self.settings.data, self.file, self.data)
        key = baseline.id or self.settings.id
        return read_baseline(baseline, rows, key, list(self._questions.values()), str(self.file))

    def documents(self) -> Sequence[str]:
        if self.settings.mode == "compare":
            _ = self._baseline  # a missing answer is found before a model is loaded
        return list(self._questions)

    # --- requests --------------------------------------------------------------------------------------------

    def requests(self, documents: Sequence[str], encoder: Encoder) -> Iterator[Item]:
        for document in documents:
            yield self._turn(document, (), encoder)

    def follow_up(self, records: Sequence[Record], encoder: Encoder) -> Iterator[Item]:
        for (document, sample), found in _conversations(records).items():
            answers = tuple(answer_text(record.text) for record in found)
            for turn in range(1, min(len(found), len(self._questions[document].turns) - 1) + 1):
                if not unscored(found[:turn]):
                    yield self._turn(document, answers[:turn], encoder)._replace(sample=sample)

    def _turn(self, document: str, answers: tuple[str, ...], encoder: Encoder) -> Item:
        """The request for the answer after `answers`; encoded once for each encoder."""
        if self._asked is None or self._asked[0] is not encoder:
            self._asked = encoder, {}
        known, key = self._asked[1], (document, *answers)
        if key not in known:
            known[key] = self._encoded(document, answers, encoder)
        return known[key]

    def _encoded(self, document: str, answers: tuple[str, ...], encoder: Encoder) -> Item:
        settings, number = self.settings, len(answers)
        messages = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        for asked, answer in zip(self._questions[document].turns, answers, strict=False):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self._questions[document].turns[number]})
        try:
            request = encoder.request(
                encoder.chat(messages),
                task=self.name,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
            )
        except Unscorable as reason:
            return Item(document, str(reason), number)
        return Item(document, request, number)

    # --- scores ----------------------------------------------------------------------------------------------

    def score(self, records: Sequence[Record]) -> Scores:
        answers: dict[Key, tuple[str, ...]] = {}
        reasons: dict[Key, str] = {}
        for key, found in _conversations(records).items():
            turns = len(self._questions[key[0]].turns)
            if reason := unscored(found):
                reasons[key] = reason
            elif len(found) == turns:
                answers[key] = tuple(answer_text(record.text) for record in found)
        names = {key: f"{key[0]} sample {key[1]}" if key[1] else key[0] for key in answers}
        questions = [replace(self._questions[key[0]], id=name) for key, name in names.items()]
        ours = {names[key]: texts for key, texts in answers.items()}
        keys = {name: key for key, name in names.items()}
        judge_all = self._grade if self.settings.mode == "grade" else self._compare
        judged, corpus, notes = judge_all(questions, ours, keys)
        verdicts = self._verdicts(answers, reasons, judged)
        return Scores(verdicts, corpus | self._by_category(judged), notes)

    def _grade(
        self, questions: Sequence[Question], ours: ModelAnswers, keys: Mapping[str, Key]
    ) -> tuple[list[_Judged], dict[str, CorpusValue], list[str]]:
        """(what each judge said, metrics, notes)."""
        found = [(judge, judge.grade(questions, ours)) for judge in self.judges]
        judged = [self._by_key(f"{judge.unit} by {judge.name}", grading.grades, keys) for judge, grading in found]
        notes = [f"{judge.name}: {line}" for judge, grading in found for line in grading_notes(grading)]
        for (a, one), (b, two) in combinations(found, 2):
            if a.unit == b.unit:
                notes.append(grade_agreement_line(a.name, b.name, grade_agreement(one.grades, two.grades)))
        return judged, {}, notes

    def _compare(
        self, questions: Sequence[Question], ours: ModelAnswers, keys: Mapping[str, Key]
    ) -> tuple[list[_Judged], dict[str, CorpusValue], list[str]]:
        """(what each judge said, metrics, notes)."""
        theirs = {name: self._baseline[key[0]] for name, key in keys.items()}
        found = [(judge, judge.compare(questions, ours, theirs)) for judge in self.judges]
        judged = [self._by_key(f"win rate by {judge.name}", comparing.pairs, keys) for judge, comparing in found]
        corpus, notes = dict[str, CorpusValue](), list[str]()
        for judge, comparing in found:
            notes += [f"{judge.name}: {line}" for line in comparing_notes(comparing, ours, theirs)]
            decided = [(pair, pair.result) for pair in comparing.pairs if pair.result is not None]
            lengths = [(len(ours[p.question.id][p.turn]), len(theirs[p.question.id][p.turn])) for p, _ in decided]
            if (rate := equal_length_rate([result for _, result in decided], lengths)) is not None:
                corpus[f"win rate by {judge.name}, equal length"] = CorpusValue(*rate)
        for (a, one), (b, two) in combinations(found, 2):
            notes.append(agreement_line(a.name, b.name, judge_agreement(one.pairs, two.pairs)))
        return judged, corpus, notes

    @staticmethod
    def _by_key(metric: str, units: Sequence[Grade] | Sequence[Pair], keys: Mapping[str, Key]) -> _Judged:
        """Values of each question: the mean over its turns, and each turn's if there are several."""
        by_key: dict[Key, list[tuple[float | None, tuple[str, ...]]]] = {}
        for unit in units:
            value = unit.value if isinstance(unit, Grade) else unit.result
            by_key.setdefault(keys[unit.question.id], []).append((value, unit.said))
        turns = max(map(len, by_key.values()), default=1)
        judged = _Judged({metric: {}}, {}, {})
        for key, found in by_key.items():
            known = [value for value, _ in found if value is not None]
            judged.values[metric][key] = sum(known) / len(known) if len(known) == len(found) else None
            for turn, (value, _) in enumerate(found if turns > 1 else []):
                judged.values.setdefault(f"{metric}, turn {turn + 1}", {})[key] = value
            judged.said[key] = "\n\n".join(text for _, said in found for text in said)
            if len(known) < len(found):
                said = next((text for value, texts in found if value is None for text in texts), "")
                judged.reasons[key] = f"{metric}: no verdict{f' ({said[-80:]!r})' if said else ''}"
        return judged

    def _verdicts(
        self, answers: Mapping[Key, Sequence[str]], reasons: Mapping[Key, str], judged: Sequence[_Judged]
    ) -> list[Verdict]:
        order = {document: number for number, document in enumerate(self._questions)}
        metrics = [next(iter(one.values)) for one in judged]
        verdicts = []
        for key in sorted([*answers, *reasons], key=lambda key: (order[key[0]], key[1])):
            values = {name: by_key[key] for one in judged for name, by_key in one.values.items() if key in by_key}
            reason = reasons.get(key) or next((one.reasons[key] for one in judged if key in one.reasons), "")
            shown = self._shown(key, answers.get(key, ()), judged)
            verdicts.append(Verdict(*key, values or dict.fromkeys(metrics), reason, shown=shown))
        return verdicts

    def _shown(self, key: Key, answers: Sequence[str], judged: Sequence[_Judged]) -> dict[str, str]:
        question, shown = self._questions[key[0]], dict[str, str]()
        for turn, asked in enumerate(question.turns):
            suffix = f", turn {turn + 1}" if len(question.turns) > 1 else ""
            shown[f"question{suffix}"] = asked
            for name, texts in (("answer", answers), ("reference", question.references)):
                if turn < len(texts):
                    shown[f"{name}{suffix}"] = texts[turn]
            if self.settings.baseline is not None:
                shown[f"{self.settings.baseline.name}{suffix}"] = self._baseline[key[0]][turn]
        for judge, one in zip(self.judges, judged, strict=True):
            if one.said.get(key):
                shown[f"{judge.name} says"] = one.said[key]
        return {name: text[:SHOWN_CHARACTERS] for name, text in shown.items()}

    def _by_category(self, judged: Sequence[_Judged]) -> dict[str, CorpusValue]:
        """Mean of each category, if there are several; the samples of a question are one cluster."""
        categories = dict.fromkeys(question.category for question in self._questions.values() if question.category)
        corpus = {}
        for one in judged:
            metric, values = next(iter(one.values.items()))
            for category in categories if len(categories) > 1 else ():
                chosen = [(k, v) for k, v in values.items() if self._questions[k[0]].category == category]
                found = summarize([v for _, v in chosen], resamples=2000, seed=0, clusters=[k[0] for k, _ in chosen])
                if found.mean is not None:
                    corpus[f"{metric} ({category})"] = CorpusValue(found.mean, found.low, found.high, found.method)
        return corpus


def _conversations(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each (document, sample) from the first turn on, without a gap."""
    found: dict[Key, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.place.number):
        turns = found.setdefault((record.document, record.place.sample), [])
        if record.place.number == len(turns):
            turns.append(record)
    return {key: turns for key, turns in found.items() if turns}


def answer_text(text: str) -> str:
    """The answer without the reasoning before it, which neither the judge nor the next turn sees."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return text.partition("<think>")[0].strip()
