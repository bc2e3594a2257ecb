"""Evaluate checkpoints on tasks: find tasks and data, answer all requests with one engine, score, and summarise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from align.eval.adapters import merged, named_adapters
from align.eval.contamination import TrainingData, add_contamination
from align.eval.model import EvalModel
from align.eval.opening import Engine, default_dtype, length_limit, open_model
from align.eval.records import Record, RecordStore
from align.eval.results import Results
from align.eval.task import Task
from align.eval.task_run import Measured, Options, Say, TaskRun
from align.parallel.group import from_rank_0
from align.run.checkpoint import require_checkpoint
from align.run.folder import MODEL, locked
from align.run.inputs import checkpoint_digest

__all__ = ["Options", "evaluate", "named_checkpoints", "records_of"]


def evaluate(
    checkpoints: Mapping[str, Path | str] | Sequence[Path | str],
    tasks: Sequence[str | Task],
    *,
    adapters: Mapping[str, Path | str] | None = None,
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
        adapters: LoRA adapters of the only checkpoint by name; each is evaluated as a checkpoint of its own.
        out: Folder of the evaluation.
        resume: Continue in a folder that has records; recorded answers are not computed again.
        rescore: Compute the scores of recorded answers again; no model is loaded.
        options: All other settings.
        say, status: Print a line; print a line that the next one overwrites.
    """
    options, folder = options or Options(), Path(out)
    models = named_checkpoints(checkpoints, read=not rescore)
    tuned = named_adapters(adapters or {}, models)
    _check(options, {**models, **tuned}, folder, resume=resume, rescore=rescore)
    training = TrainingData.of(options.contamination) if options.contamination else None
    task_run = TaskRun(tasks, folder, options, status, contact=not rescore)
    with locked(folder), ExitStack() as stack:
        checkpoint_engine = stack.enter_context(closing(CheckpointEngine(options, status, scratch=folder)))
        base = next(iter(models.values()))
        measured: list[tuple[str, Path, Path | None]] = [(name, path, None) for name, path in models.items()]
        measured += [(name, base, adapter) for name, adapter in tuned.items()]
        for name, checkpoint, adapter in measured:
            if rescore:
                dtype, found = options.dtype, task_run.rescore(name)
            else:
                dtype = checkpoint_engine.dtype
                found = task_run.measure(checkpoint_engine.measured(name, checkpoint, adapter))
            about = {"checkpoint": str(checkpoint), **({"adapter": str(adapter)} if adapter else {}), "dtype": dtype}
            task_run.add(name, about, found)
    results = task_run.results
    if training is not None:
        status("looking for the tasks' items in the training data")
        add_contamination(results, training)
    results.write()
    for note in results.content["notes"]:
        say(f"note: {note}")
    return results


class CheckpointEngine:
    """One engine for one checkpoint after another. It is started when the first answer is missing.

    dtype: dtype of the weights. prepare: changes each tokenizer after it is loaded. scratch: folder for the merged
    checkpoint of an adapter, while it is loaded.
    """

    def __init__(
        self,
        options: Options,
        status: Say,
        prepare: Callable[[PreTrainedTokenizerBase], None] = lambda tokenizer: None,
        scratch: Path = Path(),
    ):
        self.options, self.status, self.prepare, self.scratch = options, status, prepare, scratch
        self.dtype = options.dtype or default_dtype()
        self._model: EvalModel | None = None
        self._settings: Engine | None = None
        self._loaded: tuple[Path, Path | None] | None = None

    def measured(self, name: str, checkpoint: Path, adapter: Path | None = None) -> Measured:
        """The checkpoint, with an adapter if given, as the model that a `TaskRun` measures.

        An adapter's folder may have its own tokenizer and chat template.
        """
        from align.train.checkpoint import load_tokenizer

        options = self.options
        length = length_limit(checkpoint, options.max_length)
        own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(adapter if adapter is not None and own else checkpoint)
        self.prepare(tokenizer)
        set_template_defaults(tokenizer, options.chat_template_kwargs, "--chat-template-kwargs")
        encoder = options.encoder(tokenizer, length)
        engine = Engine(options.backend, self.dtype, length, options.batch_size, options.cache_gib, options.parallel)
        parts = [checkpoint, *([adapter] if adapter else [])]
        digest = from_rank_0("evaluate: read the checkpoint", lambda: " ".join(map(checkpoint_digest, parts)))
        key = f"{digest} {self.dtype} {options.backend}"

        def opened() -> EvalModel:
            if self._model is not None and self._settings == engine and self._loaded == (checkpoint, adapter):
                return self._model
            self.status(f"{name}: loading")
            with ExitStack() as stack:
                folder = stack.enter_context(merged(checkpoint, adapter, self.scratch)) if adapter else checkpoint
                if self._model is None or self._settings != engine or not self._model.load(folder, tokenizer):
                    self.close()
                    self._model, self._settings = open_model(folder, tokenizer, engine), engine
            self._loaded = checkpoint, adapter
            return self._model

        return Measured(name, key, encoder, opened, self.close)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


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


def records_of(results: Results, model: str) -> list[Record]:
    """All records of a model."""
    with closing(RecordStore(results.folder / model / "records.jsonl")) as store:
        return list(store)
