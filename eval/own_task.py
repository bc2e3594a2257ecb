"""Tasks of the user in YAML, for `align eval`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from align.config.own_task import TaskData, Verifier, read_own_task
from align.config.rewards import ChoiceReward, CodeReward, FunctionReward, MathReward, RewardBase
from align.data.prepare import PromptRow
from align.errors import UserError
from align.eval.encoder import Encoder, Unscorable
from align.eval.records import Record
from align.eval.statistics.intervals import mean_interval
from align.eval.statistics.passes import pass_at_k
from align.eval.task import CorpusValue, Item, Scores, Verdict, by_sample, unscored
from align.eval.task_data import data_place, read_rows
from align.reward.components import Samples, build_component, has_column
from align.reward.process import FunctionProcess, Scored
from align.reward.sandbox.confine import missing_wall
from align.reward.text import Row, is_missing
from align.rollout.base import Completion

BUILT_IN = Path(__file__).parent / "tasks"
"""Folder with tasks in YAML that are known by their name."""
SHOWN_CHARACTERS = 4000


def built_in_file(name: str) -> Path | None:
    """The file of a built-in task in YAML, if there is one of this name."""
    file = BUILT_IN / f"{name}.yaml"
    return file if file.is_file() else None


class YamlTask:
    """A task of the user. See `Task` for the methods.

    file: the YAML file. data: folder of `--data`. shots: number of examples instead of the file's.
    unsafe_code: run programs of the model without the sandbox.
    missing: the command that downloads each data set that is not in `data`.
    """

    def __init__(
        self,
        file: Path,
        *,
        data: Path | None = None,
        chat: bool = False,
        shots: int | None = None,
        unsafe_code: bool = False,
    ):
        self.file, self.data, self.chat = file, data, chat
        self.settings = read_own_task(file)
        self._verifier = _with_sandbox(self.settings.verifier, self.settings.name, unsafe_code=unsafe_code)
        self._environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        if shots and self.settings.shots is None:
            raise UserError(f"{file}: {shots} shots are wanted, but the task has no `shots`. Add them to the task.")
        own = self.settings.shots.count if self.settings.shots else 0
        self.shots = own if shots is None else shots
        self.name = self.settings.name
        self.version = f"{self.settings.version}, {self.shots} shots{', chat' if chat else ''}"
        self.text = f"{self.name}, version {self.version}"
        self.better: Mapping[str, int] = dict.fromkeys(self._metrics(), 1)
        sources = [self.settings.data, *([self.settings.shots.data] if self.settings.shots else [])]
        self.missing = [
            gone for source in sources if source is not None and (gone := data_place(source, file, data)[1])
        ]

    @property
    def runs_unsafe_code(self) -> bool:
        """True if programs of the model run without the sandbox."""
        return isinstance(self._verifier, CodeReward) and self._verifier.unsafe

    def documents(self) -> Sequence[str]:
        return [str(number) for number in range(len(self._rows))]

    # --- data ------------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[Row]:
        return self._split[0]

    @cached_property
    def _examples(self) -> list[Row]:
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[list[Row], list[Row]]:
        """(documents, examples). Examples from the task's own data are not documents."""
        rows, shots = self._read(self.settings.data), self.settings.shots
        if shots is None or not self.shots:
            return rows, []
        pool = rows if shots.data is None else self._read(shots.data)
        numbers = list(range(len(pool)))
        if shots.seed is not None:
            random.Random(shots.seed).shuffle(numbers)
        if len(pool) < self.shots + (shots.data is None):
            raise UserError(f"{self.file}: {len(pool)} rows are too few for {self.shots} examples. Lower shots.count.")
        chosen = numbers[: self.shots]
        left = rows if shots.data is not None else [row for i, row in enumerate(rows) if i not in set(chosen)]
        return left, [pool[i] for i in chosen]

    def _read(self, data: TaskData) -> list[Row]:
        return read_rows(data, self.file, self.data)

    # --- requests --------------------------------------------------------------------------------------------

    def requests(self, documents: Sequence[str], encoder: Encoder) -> Iterator[Item]:
        settings = self.settings
        for document in documents:
            row = self._rows[int(document)]
            try:
                if settings.choices is not None:
                    context = self._context(row, encoder)
                    delimiter = "" if self.chat else settings.delimiter
                    for number, choice in enumerate(self._choices(row)):
                        pair = encoder.pair(context, delimiter + choice, task=self.name, rendered=self.chat)
                        yield Item(document, pair, number)
                    continue
                request = encoder.request(
                    self._context(row, encoder),
                    task=self.name,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    stop=() if self.chat else settings.stop,
                    rendered=self.chat,
                )
                yield Item(document, request)
            except Unscorable as reason:
                yield Item(document, str(reason))

    def _context(self, row: Row, encoder: Encoder) -> str:
        """Text before the answer, with the examples."""
        settings, examples = self.settings, self._examples
        opening = self._render(settings.opening, row)
        if not self.chat:
            parts = [self._render(settings.prompt, shot) + self._answered(shot) for shot in examples]
            joint = settings.delimiter if opening else ""
            return settings.separator.join([*parts, self._render(settings.prompt, row) + joint + opening])
        template = settings.chat_prompt or settings.prompt
        messages = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        for shot in examples:
            messages.append({"role": "user", "content": self._render(template, shot)})
            messages.append({"role": "assistant", "content": self._answered(shot).removeprefix(settings.delimiter)})
        messages.append({"role": "user", "content": self._render(template, row)})
        if opening:
            messages.append({"role": "assistant", "content": opening})
        return encoder.chat_text(messages)

    def _answered(self, shot: Row) -> str:
        assert self.settings.shots is not None
        opening = self._render(self.settings.opening, shot)
        return self.settings.delimiter + opening + self._render(self.settings.shots.answer, shot)

    def _choices(self, row: Row) -> list[str]:
        choices = self.settings.choices
        if isinstance(choices, list):
            return [self._render(choice, row) for choice in choices]
        found = self._value(choices or "", row)
        if not isinstance(found, list | tuple) or len(found) < 2:
            raise UserError(
                f"{self.file}: choices '{choices}' is not a list of two or more in the row {_short(row)}. Write an "
                "expression with a list, such as `options` or `[a, b]`."
            )
        return [str(choice) for choice in found]

    def _right(self, row: Row) -> int:
        """Number of the right choice."""
        found, choices = self._value(self.settings.answer or "", row), self._choices(row)
        if isinstance(found, str):
            text = found.strip()
            if text in choices:
                return choices.index(text)
            if len(text) == 1 and "A" <= text <= "Z":
                found = ord(text) - ord("A")
            elif text.isdecimal():
                found = int(text)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if not isinstance(found, int) or not 0 <= found < len(choices):
            raise UserError(
                f"{self.file}: answer '{self.settings.answer}' is {found!r} in the row {_short(row)}, which is not one "
                "of the choices. Write a number from 0, a letter, or the text of a choice."
            )
        return found

    def _render(self, template: str, row: Row) -> str:
        try:
            return self._environment.from_string(template).render(row)
        except UndefinedError as error:
            raise UserError(
                f"{self.file}: template {template[:60]!r}: {error}; the row has {', '.join(row)}. Use one."
            ) from None
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{self.file}: template {template[:60]!r}: {str(error).rstrip('.')}. Correct it.") from None

    def _value(self, expression: str, row: Row) -> Any:
        text = expression.strip().removeprefix("{{").removesuffix("}}").strip()
        try:
            return self._environment.compile_expression(text, undefined_to_none=False)(**row)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{self.file}: expression {text[:60]!r}: {str(error).rstrip('.')}. Correct it.") from None

    # --- scores ----------------------------------------------------------------------------------------------

    def score(self, records: Sequence[Record]) -> Scores:
        groups = by_sample(records)
        if self.settings.choices is not None:
            return Scores([self._score_choices(place, found) for place, found in groups.items()])
        verdicts = self._score_completions({place: found[0] for place, found in groups.items()})
        return Scores(verdicts, {f"pass@{k}": self._pass_at(k, verdicts) for k in self.settings.pass_at})

    def _score_choices(self, place: tuple[str, int], records: Sequence[Record]) -> Verdict:
        document, sample = place
        if reason := unscored(records):
            return Verdict(document, sample, dict.fromkeys(self.better, None), reason)
        row = self._rows[int(document)]
        choices, right = self._choices(row), self._right(row)
        logprobs = [record.logprob for record in records]
        by_length = [logprob / max(len(choice), 1) for logprob, choice in zip(logprobs, choices, strict=True)]
        metrics = self._metrics()
        values = {
            metrics[0]: float(logprobs.index(max(logprobs)) == right),
            metrics[1]: float(by_length.index(max(by_length)) == right),
        }
        shown = {
            "question": self._render(self.settings.prompt, row),
            "target": choices[right],
            "log-probabilities": ", ".join(f"{choice}: {value:.3f}" for choice, value in zip(choices, logprobs)),
        }
        return Verdict(document, sample, values, shown=_shortened(shown))

    def _score_completions(self, found: Mapping[tuple[str, int], Record]) -> list[Verdict]:
        verifier, (metric,) = self._verifier, self._metrics()
        assert verifier is not None
        reasons, scorable = {}, []
        for place, record in found.items():
            prompt_row = _prompt_row(self._rows[int(place[0])])
            reason = unscored([record])
            if not reason and not has_column(verifier, prompt_row):
                reason = f"the row has no value in the column '{getattr(verifier, 'column', '')}'"
            if reason:
                reasons[place] = reason
            else:
                scorable.append((place, record, prompt_row))
        scored = verify(verifier, [record for _, record, _ in scorable], [row for _, _, row in scorable])
        values = {place: value for (place, _, _), value in zip(scorable, scored.scores, strict=True)}
        verdicts = []
        for (document, sample), record in found.items():
            row, value = self._rows[int(document)], values.get((document, sample))
            reason = reasons.get((document, sample), "")
            answerable = isinstance(verifier, MathReward | ChoiceReward)
            unanswered = not reason and value is None and answerable
            if value is None and not reason and not unanswered:
                reason = scored.problem or "the verifier gave no score"
            shown = {"question": self._render(self.settings.prompt, row), "answer": record.text}
            column = getattr(verifier, "column", None)
            if column is not None and not is_missing(row.get(column)):
                shown["target"] = str(row[column])
            values_of = {metric: 0.0 if unanswered else value}
            verdicts.append(Verdict(document, sample, values_of, reason, unanswered, _shortened(shown)))
        return verdicts

    def _pass_at(self, k: int, verdicts: Sequence[Verdict]) -> CorpusValue:
        """Mean over documents of the unbiased estimate, from the samples that have a score."""
        (metric,) = self._metrics()
        by_document: dict[str, list[float]] = {}
        for verdict in verdicts:
            if (value := verdict.values[metric]) is not None:
                by_document.setdefault(verdict.document, []).append(value)
        if by_document and min(map(len, by_document.values())) < k:
            raise UserError(f"{self.file}: pass_at {k} needs {k} samples of each document. Pass --samples {k} or more.")
        if not by_document:
            return CorpusValue(float("nan"))
        estimates = [pass_at_k(len(found), sum(v == 1 for v in found), k) for found in by_document.values()]
        interval = mean_interval(estimates)
        return CorpusValue(interval.mean, interval.low, interval.high, interval.method)

    def _metrics(self) -> list[str]:
        settings = self.settings
        if settings.choices is not None:
            name = settings.metric or "acc"
            return [name, f"{name}_norm"]
        assert settings.verifier is not None
        return [settings.metric or settings.verifier.kind]


def verify(verifier: RewardBase, records: Sequence[Record], rows: Sequence[PromptRow]) -> Scored:
    """Scores of recorded completions by a verifier or a function. A function that fails leaves its completion
    unscored."""
    if not records:
        return Scored([])
    if isinstance(verifier, FunctionReward):
        verifier = verifier.model_copy(update={"failure_score": 0.0})
    completions = [Completion([], list(record.token_ids), [], record.status == "finished", 0) for record in records]
    samples = Samples(rows, completions, None, [record.text for record in records])
    with FunctionProcess() as process:
        return build_component(verifier, process, None)(samples)


def _with_sandbox(verifier: Verifier | None, task: str, *, unsafe_code: bool) -> Verifier | None:
    """The verifier; with `unsafe_code`, one that runs programs without the sandbox.

    Raises UserError if programs need the sandbox and this machine has none.
    """
    if not isinstance(verifier, CodeReward):
        return verifier
    if unsafe_code:
        return verifier.model_copy(update={"unsafe": True})
    if not verifier.unsafe and (reason := missing_wall()):
        raise UserError(
            f"{task}: this machine cannot confine the programs that the model writes: {reason}. Run it on Linux 5.13 "
            "or later, or pass --unsafe-code to run them with this user's rights."
        )
    return verifier


def _prompt_row(row: Row) -> PromptRow:
    return PromptRow((), [{"role": "user", "content": ""}], None, row)


def _shortened(shown: Mapping[str, str]) -> dict[str, str]:
    return {key: text[:SHOWN_CHARACTERS] for key, text in shown.items()}


def _short(row: Row) -> str:
    return repr(row)[:80]
