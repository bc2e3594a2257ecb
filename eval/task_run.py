"""Run tasks on one model after another: make requests, record answers, score, and collect results in one folder.

Under several ranks all of them make the same calls. Rank 0 finds tasks, plans, records and scores; answering requests
is up to the model, which may need all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align import __version__
from align.config.parallel import Parallel
from align.errors import UserError
from align.eval.answering import Planned, Sampling, choose, follow_ups, plan, run_requests, settle
from align.eval.encoder import Encoder
from align.eval.judges.panel import AnyJudge, open_judges
from align.eval.model import EvalModel
from align.eval.near_ties import near_tie_notes
from align.eval.opening import Backend
from align.eval.records import RecordStore
from align.eval.resolve import Resolved, resolve
from align.eval.results import Results, group_metrics, summarize_task, warnings, write_verdicts
from align.eval.task import Scores, Task
from align.parallel.group import from_rank_0, is_main

Say = Callable[[str], None]
Counts = dict[str, tuple[int, int]]
"""By task (truncated prompts, unstable seams); see `Encoder`."""


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation, besides checkpoints and tasks.

    data: folder of data sets. backend, dtype, max_length, batch_size, cache_gib: see `Engine`.
    limit: documents per task, drawn with the seed; None is all. samples: completions per request.
    temperature, max_new_tokens: replace the tasks' own. seed: seed of the draw and of the completions.
    chat: render prompts with the chat template. chat_template_kwargs: values for the template's own variables.
    truncate: remove the beginning of prompts that are too long.
    judges: of judged tasks: URLs of servers, YAML files, folders of reward models. judge_model: the model at a URL.
    contamination: folder of a run, or training data, in which the tasks' items are looked for.
    unsafe_code: run programs of the model without the sandbox.
    parallel: shard the model over the ranks of a run, with the backend hf.
    """

    data: Path | None = None
    backend: Backend = "vllm"
    dtype: str | None = None
    max_length: int | None = None
    batch_size: int = 64
    cache_gib: float | None = None
    limit: int | None = None
    samples: int = 1
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncate: bool = False
    judges: tuple[str, ...] = ()
    judge_model: str | None = None
    contamination: Path | None = None
    unsafe_code: bool = False
    parallel: Parallel | None = None

    def encoder(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
        """The encoder for a model with this tokenizer and maximum length."""
        return Encoder(
            tokenizer,
            max_length,
            truncate=self.truncate,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True)
class Measured:
    """The model that is measured.

    name: name in the results, and of the folder of its records.
    key: text that determines the answers, for example a hash of the checkpoint's files and the dtype.
    encoder: encoder for the model's tokenizer and maximum length.
    open: returns the model; called when the first answer is missing. Called on every rank.
    release: frees the memory of the model, which a reward model as judge needs.
    """

    name: str
    key: str
    encoder: Encoder
    open: Callable[[], EvalModel]
    release: Callable[[], None] = lambda: None


class TaskRun:
    """An evaluation of some tasks in `folder`.

    better: by task and metric, 1 if higher is better, -1 if lower is, 0 if neither; on every rank.
    results: results of the models up to now; on rank 0.
    """

    def __init__(
        self, tasks: Sequence[str | Task], folder: Path, options: Options, status: Say, *, contact: bool = True
    ):
        """contact: check that the servers of judges respond."""
        self.options, self.folder, self.status = options, folder, status
        self._judges: list[AnyJudge] = []
        self._resolved = Resolved()
        self._documents: dict[str, list[str]] = {}
        self.results = Results({}, folder)
        self.better: dict[str, dict[str, int]] = from_rank_0(
            "evaluate: find tasks", lambda: self._find(tasks, contact=contact)
        )

    def _find(self, tasks: Sequence[str | Task], *, contact: bool) -> dict[str, dict[str, int]]:
        options = self.options
        self._judges = open_judges(
            options.judges,
            self.folder / "judges",
            model=options.judge_model,
            dtype=options.dtype,
            contact=contact,
            status=self.status,
        )
        self._resolved = found = resolve(
            tasks, data=options.data, chat=options.chat, judges=self._judges, unsafe_code=options.unsafe_code
        )
        if options.chat_template_kwargs and not any(getattr(task, "chat", True) for task in found.tasks):
            raise UserError(
                "--chat-template-kwargs: no task renders its prompts with the chat template. Pass --chat, or remove "
                "the option."
            )
        self._documents = {
            task.name: choose(task.documents(), options.limit, task.name, options.seed) for task in found.tasks
        }
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key != "parallel"}
        self.results.content = {
            "align": __version__,
            "settings": settings,
            "models": {},
            "notes": list(found.notes),
        }
        return {task.name: dict(task.better) for task in found.tasks}

    def measure(self, model: Measured) -> dict[str, Any]:
        """Record the answers of a model that are missing, and score them; see `score`."""
        with closing(self._store(model.name)) as store:
            counts = self._answer(model, store)
            if any(judge.is_local for judge in self._judges):
                model.release()
            return from_rank_0("evaluate: score", lambda: self._score(model.name, store, counts))

    def rescore(self, name: str) -> dict[str, Any]:
        """Score the recorded answers of a model again."""
        with closing(self._store(name)) as store:
            return self._score(name, store, earlier_counts(self.folder, name))

    def add(self, name: str, about: Mapping[str, Any], tasks: dict[str, Any]) -> None:
        """Add a model to the results. about: its checkpoint and dtype."""
        if is_main():
            self.results.content["models"][name] = {**about, "tasks": tasks}
            self.results.content["judges"] = [judge.facts() for judge in self._judges]

    def _store(self, name: str) -> RecordStore:
        """The records of a model; ranks other than 0 keep none."""
        opened: list[RecordStore] = []
        path = self.folder / name / "records.jsonl"
        from_rank_0("evaluate: open the records", lambda: opened.append(RecordStore(path)))
        return opened[0] if opened else RecordStore(None)

    def _answer(self, model: Measured, store: RecordStore) -> Counts:
        """Record the answers to all requests."""
        encoder, sampling = model.encoder, Sampling(self.options.samples, self.options.seed)
        tasks, name = self._resolved.tasks, model.name

        def batches() -> Iterator[list[Planned]]:
            """The requests without an answer; then those that depend on earlier answers."""
            planned: list[Planned] = []
            for task in tasks:
                self.status(f"{name}: {task.name}: encoding")
                planned += plan(task, self._documents[task.name], encoder, sampling, model.key)
            _require_distinct_samples(planned, sampling)
            while planned:
                yield settle(planned, store)
                planned = follow_ups(tasks, self._documents, store, encoder, sampling, model.key)

        remaining = batches()
        while (wanted := from_rank_0("evaluate: plan", lambda: next(remaining, None))) is not None:
            if wanted:
                opened = model.open()
                run_requests(opened, wanted, store, lambda done, all_: self.status(f"{name}: {done} of {all_} answers"))
        return {task.name: (encoder.truncated[task.name], encoder.unstable_seams[task.name]) for task in tasks}

    def _score(self, name: str, store: RecordStore, counts: Counts) -> dict[str, Any]:
        """The results of tasks and groups as JSON types. Writes the scores and adds notes."""
        options, notes = self.options, self.results.content["notes"]
        self.status(f"{name}: scoring")
        scores: dict[str, Scores] = {}
        found: dict[str, Any] = {}
        for task in self._resolved.tasks:
            chosen = set(self._documents[task.name])
            records = [
                record
                for record in store.of(task.name, task.version)
                if record.document in chosen and record.place.sample < options.samples
            ]
            scores[task.name] = task.score(records)
            truncated_prompts, seams = counts.get(task.name, (0, 0))
            result = summarize_task(
                task,
                scores[task.name],
                records,
                documents=len(chosen),
                samples=options.samples,
                truncated_prompts=truncated_prompts,
                unstable_seams=seams,
                seed=options.seed,
            )
            found[task.name] = result
            notes += warnings(name, task.name, result)
            said = [*scores[task.name].notes, *near_tie_notes(records, len(chosen))]
            notes += [f"{name}, {task.name}: {note}" for note in said]
            notes += _other_versions(name, task, store)
        groups = {}
        for group in self._resolved.groups:
            metrics = group_metrics(group, scores, found, options.seed)
            leaves = [found[leaf] for leaf in group.leaves]
            total = {
                key: sum(getattr(leaf, key) for leaf in leaves)
                for key in ("documents", "total", "missing", "unscored", "truncated", "completions", "unanswered")
            }
            groups[group.name] = {
                "version": leaves[0].version,
                "members": group.leaves,
                **total,
                "metrics": {k: asdict(m) for k, m in metrics.items()},
            }
        write_verdicts(self.folder / name / "scores.jsonl", scores)
        return {**groups, **{task: asdict(result) for task, result in found.items()}}


def earlier_counts(folder: Path, name: str) -> Counts:
    """Counts of the encoder when the records were made."""
    if not (folder / "results.json").is_file():
        return {}
    tasks = Results.read(folder).content["models"].get(name, {}).get("tasks", {})
    return {task: (found.get("truncated_prompts", 0), found.get("unstable_seams", 0)) for task, found in tasks.items()}


def _other_versions(name: str, task: Task, store: RecordStore) -> list[str]:
    others = sorted({r.version for r in store if r.task == task.name and r.version != task.version})
    return [f"{name}, {task.name}: records of version {v} are not used; this is {task.version}" for v in others]


def _require_distinct_samples(planned: Sequence[Planned], sampling: Sampling) -> None:
    """Raise `UserError` if several samples would be the same greedy completion."""
    for one in planned:
        if sampling.samples > 1 and getattr(one.request, "temperature", 1) == 0:
            raise UserError(
                f"--samples {sampling.samples}: task '{one.record.task}' decodes greedily, so its samples would all be "
                "equal. Set --temperature above 0, or --samples 1."
            )
