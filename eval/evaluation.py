"""Evaluate checkpoints on tasks: find tasks and data, answer all requests with one engine, score, and summarise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align import __version__
from align.errors import UserError
from align.eval.answering import Planned, Sampling, choose, follow_ups, plan, run_requests, settle
from align.eval.judges.panel import open_judges
from align.eval.model import EvalModel
from align.eval.opening import Backend, Engine, default_dtype, length_limit, open_model
from align.eval.records import Record, RecordStore
from align.eval.resolve import Resolved, resolve
from align.eval.results import Results, group_metrics, summarize_task, warnings, write_verdicts
from align.eval.task import Scores, Task
from align.run.checkpoint import require_checkpoint
from align.run.folder import MODEL, locked
from align.run.inputs import checkpoint_digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation, besides checkpoints and tasks.

    data: folder of data sets. backend, dtype, max_length, batch_size, cache_gib: see `Engine`.
    limit: documents per task, drawn with the seed; None is all. samples: completions per request.
    temperature, max_new_tokens: replace the tasks' own. seed: seed of the draw and of the completions.
    chat: render prompts with the chat template. truncate: cut prompts that are too long at their beginning.
    judges: of judged tasks: URLs of servers, YAML files, folders of reward models. judge_model: the model at a URL.
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
    truncate: bool = False
    judges: tuple[str, ...] = ()
    judge_model: str | None = None


def evaluate(
    checkpoints: Mapping[str, Path | str] | Sequence[Path | str],
    tasks: Sequence[str | Task],
    *,
    out: Path | str = "evaluation",
    resume: bool = False,
    rescore: bool = False,
    options: Options | None = None,
    say: Say = lambda line: None,
    status: Say = lambda line: None,
) -> Results:
    """Evaluate checkpoints on tasks and write OUT/results.json, results.md, and each model's records and scores.

    Args:
        checkpoints: Folders of checkpoints or of stages, by name or as a list, which is named by its folders.
        tasks: Names of harness tasks, `suite:NAME`, files with tasks, or tasks.
        out: Folder of the evaluation.
        resume: Continue in a folder that has records; recorded answers are not computed again.
        rescore: Compute the scores of recorded answers again; no model is loaded.
        options: All other settings.
        say, status: Print a line; print a line that the next one overwrites.
    """
    options, folder = options or Options(), Path(out)
    models = named_checkpoints(checkpoints, read=not rescore)
    _check(options, models, folder, resume=resume, rescore=rescore)
    judges = open_judges(
        options.judges,
        folder / "judges",
        model=options.judge_model,
        dtype=options.dtype,
        contact=not rescore,
        status=status,
    )
    resolved = resolve(tasks, data=options.data, chat=options.chat, judges=judges)
    documents = {task.name: choose(task.documents(), options.limit, task.name, options.seed) for task in resolved.tasks}
    content: dict[str, Any] = {"align": __version__, "settings": {}, "models": {}, "notes": list(resolved.notes)}
    content["settings"] = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(options).items()}
    results = Results(content, folder)
    with locked(folder), ExitStack() as stack:
        runner = stack.enter_context(closing(_Runner(options, status)))
        for name, checkpoint in models.items():
            store = stack.enter_context(closing(RecordStore(folder / name / "records.jsonl")))
            if rescore:
                counts = _earlier_counts(folder, name)
            else:
                counts = runner.answer(name, checkpoint, resolved.tasks, documents, store)
            status(f"{name}: scoring")
            if any(judge.is_local for judge in judges):
                runner.close()  # a reward model needs the engine's memory
            found = _score(name, resolved, documents, store, counts, options, results)
            content["models"][name] = {"checkpoint": str(checkpoint), "dtype": runner.dtype, **found}
    content["judges"] = [judge.facts() for judge in judges]
    results.write()
    for note in content["notes"]:
        say(f"note: {note}")
    return results


class _Runner:
    """Answers requests of one checkpoint after another; the engine is started when the first answer is missing."""

    def __init__(self, options: Options, status: Say):
        self.options, self.status = options, status
        self.dtype = options.dtype
        self._model: EvalModel | None = None
        self._settings: Engine | None = None
        self._loaded: Path | None = None

    def answer(
        self,
        name: str,
        checkpoint: Path,
        tasks: Sequence[Task],
        documents: Mapping[str, Sequence[str]],
        store: RecordStore,
    ) -> dict[str, tuple[int, int]]:
        """Record the answers to all requests. Returns (truncated prompts, unstable seams) by task."""
        from align.eval.encoder import Encoder
        from align.train.checkpoint import load_tokenizer

        options = self.options
        self.dtype = options.dtype or default_dtype()
        length = length_limit(checkpoint, options.max_length)
        engine = Engine(options.backend, self.dtype, length, options.batch_size, options.cache_gib)
        tokenizer = load_tokenizer(checkpoint)
        encoder = Encoder(
            tokenizer,
            length,
            truncate=options.truncate,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
        )
        sampling = Sampling(options.samples, options.seed)
        key = f"{checkpoint_digest(checkpoint)} {self.dtype} {options.backend}"
        planned: list[Planned] = []
        for task in tasks:
            self.status(f"{name}: {task.name}: encoding")
            planned += plan(task, documents[task.name], encoder, sampling, key)
        _require_distinct_samples(planned, sampling)
        while planned:
            if missing := settle(planned, store):
                model = self._opened(name, checkpoint, tokenizer, engine)
                run_requests(model, missing, store, lambda done, all_: self.status(f"{name}: {done} of {all_} answers"))
            planned = follow_ups(tasks, documents, store, encoder, sampling, key)
        return {task.name: (encoder.truncated[task.name], encoder.unstable_seams[task.name]) for task in tasks}

    def _opened(self, name: str, checkpoint: Path, tokenizer: Any, engine: Engine) -> EvalModel:
        if self._model is not None and self._settings == engine and self._loaded == checkpoint:
            return self._model
        self.status(f"{name}: loading")
        if self._model is None or self._settings != engine or not self._model.load(checkpoint, tokenizer):
            self.close()
            self._model, self._settings = open_model(checkpoint, tokenizer, engine), engine
        self._loaded = checkpoint
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


def _score(
    name: str,
    resolved: Resolved,
    documents: Mapping[str, Sequence[str]],
    store: RecordStore,
    counts: Mapping[str, tuple[int, int]],
    options: Options,
    results: Results,
) -> dict[str, Any]:
    """Score a model's records; returns the tasks' and groups' results, and adds notes."""
    scores: dict[str, Scores] = {}
    found: dict[str, Any] = {}
    for task in resolved.tasks:
        chosen = set(documents[task.name])
        records = [
            record
            for record in store.of(task.name, task.version)
            if record.document in chosen and record.place.sample < options.samples
        ]
        scores[task.name] = task.score(records)
        truncated, seams = counts.get(task.name, (0, 0))
        result = summarize_task(
            task,
            scores[task.name],
            records,
            documents=len(chosen),
            samples=options.samples,
            truncated=truncated,
            unstable_seams=seams,
            seed=options.seed,
        )
        found[task.name] = result
        results.content["notes"] += warnings(name, task.name, result)
        results.content["notes"] += [f"{name}, {task.name}: {note}" for note in scores[task.name].notes]
        results.content["notes"] += _other_versions(name, task, store)
    groups = {}
    for group in resolved.groups:
        metrics = group_metrics(group, scores, found, options.seed)
        leaves = [found[leaf] for leaf in group.leaves]
        total = {
            key: sum(getattr(leaf, key) for leaf in leaves)
            for key in ("documents", "total", "missing", "unscored", "cut", "completions", "unanswered")
        }
        groups[group.name] = {
            "version": leaves[0].version,
            "members": group.leaves,
            **total,
            "metrics": {k: asdict(m) for k, m in metrics.items()},
        }
    write_verdicts(results.folder / name / "scores.jsonl", scores)
    return {"tasks": {**groups, **{task: asdict(result) for task, result in found.items()}}}


def _earlier_counts(folder: Path, name: str) -> dict[str, tuple[int, int]]:
    """Counts of the encoder when the records were made; see `_Runner.answer`."""
    if not (folder / "results.json").is_file():
        return {}
    tasks = Results.read(folder).content["models"].get(name, {}).get("tasks", {})
    return {task: (found.get("truncated", 0), found.get("unstable_seams", 0)) for task, found in tasks.items()}


def _other_versions(name: str, task: Task, store: RecordStore) -> list[str]:
    others = sorted({r.version for r in store if r.task == task.name and r.version != task.version})
    return [f"{name}, {task.name}: records of version {v} are not used; this is {task.version}" for v in others]


def named_checkpoints(checkpoints: Mapping[str, Path | str] | Sequence[Path | str], *, read: bool) -> dict[str, Path]:
    """Checkpoint folders by name. A name is the folder's, or the stage's; with the folder above it, if two are equal.

    read: check that each is a checkpoint.
    """
    if isinstance(checkpoints, Mapping):
        named = {name: Path(path) for name, path in checkpoints.items()}
    else:
        paths = [Path(path).absolute() for path in checkpoints]
        if len(set(paths)) < len(paths):
            raise UserError("a checkpoint is listed twice. Remove one of the two.")
        parts = [path.parts[:-1] if path.name == MODEL else path.parts for path in paths]
        depth = 1
        while len({part[-depth:] for part in parts}) < len(parts):
            depth += 1
        named = {"-".join(part[-depth:]): path for part, path in zip(parts, paths)}
    if not named:
        raise UserError("no checkpoint is given. Pass the folder of a checkpoint or of a finished stage.")
    return {name: require_checkpoint(path) if read else path for name, path in named.items()}


def _check(options: Options, models: Mapping[str, Path], folder: Path, *, resume: bool, rescore: bool) -> None:
    """Raise `UserError` for settings that exclude each other."""
    for flag, value, least in (("--limit", options.limit, 1), ("--samples", options.samples, 1)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}.")
    recorded = [name for name in models if (folder / name / "records.jsonl").is_file()]
    if rescore:
        if missing := [name for name in models if name not in recorded]:
            raise UserError(f"{folder}: it has no records of {missing[0]}. Run without --rescore first.")
    elif recorded and not resume:
        raise UserError(
            f"{folder}: it has records of {recorded[0]}. Continue with --resume, or choose another folder with --out."
        )
    if options.data is not None and not options.data.is_dir():
        raise UserError(f"--data {options.data}: no such folder. Pass the folder that holds the data sets.")


def _require_distinct_samples(planned: Sequence[Planned], sampling: Sampling) -> None:
    """Raise `UserError` if several samples would be the same greedy completion."""
    for one in planned:
        if sampling.samples > 1 and getattr(one.request, "temperature", 1) == 0:
            raise UserError(
                f"--samples {sampling.samples}: task '{one.record.task}' decodes greedily, so its samples would all be "
                "equal. Set --temperature above 0, or --samples 1."
            )


def records_of(results: Results, model: str) -> list[Record]:
    """All records of a model."""
    with closing(RecordStore(results.folder / model / "records.jsonl")) as store:
        return list(store)
