"""Build the entry of a source: encode its missing shards, in this process or by all cores.

One process of a machine builds an entry, the others wait for it. After an interruption the next process goes on with
the missing shards.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.encode import Encoding
from align.data.filters.items import evaluation_files
from align.data.store.cache import mark_used, remove_unused
from align.data.store.entry import SEAL, Entry, open_entry, seal_entry
from align.data.store.fingerprint import code_fingerprint, library_versions, tokenizer_state
from align.data.store.progress import Progress, Show, silent, size_of, text_bytes
from align.data.store.reading import ChunkGroup, Reading
from align.data.store.shards import shard_facts
from align.data.store.worker import Job, Worker
from align.errors import UserError
from align.run.cache import content_hash, hashed, locked, read_json, write_atomically, writing

ALONE = 4
"""Most shards that this process encodes itself: workers take seconds to start."""
Task = tuple[int, ChunkGroup, np.ndarray | None]
"""(shard number, chunk, rows of the chunk to encode or None for all)."""


@dataclass(frozen=True)
class EntryPlan:
    """Everything that determines an entry, and the folder that it gets.

    selected: sorted numbers of the rows to encode; None for all rows.
    origin: what the name of the folder is the hash of, for people to read.
    """

    reading: Reading
    job: Job
    selected: np.ndarray | None
    origin: dict[str, Any]

    @classmethod
    def of(
        cls,
        reading: Reading,
        encoding: Encoding,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        selected: np.ndarray | None = None,
    ) -> EntryPlan:
        """The plan for a source, an encoding and a tokenizer."""
        origin = {
            "contents": reading.identity,
            "encoding": [encoding.kind, encoding.max_length],
            "filters": [settings.model_dump(mode="json") for settings in encoding.filters],
            "evaluation_sets": [content_hash(file, cache) for file in evaluation_files(encoding.filters)],
            "selected": None if selected is None else hashed(selected.tolist()),
            "tokenizer": tokenizer_state(tokenizer),
            "code": code_fingerprint(),
            "libraries": library_versions(),
        }
        folder = cache / "entries" / hashed(origin)[:32]
        return cls(reading, Job(folder, encoding, tokenizer), selected, origin)

    @property
    def cache(self) -> Path:
        return self.folder.parents[1]

    @property
    def folder(self) -> Path:
        return self.job.folder

    def is_built(self) -> bool:
        """True if the entry needs nothing from the source."""
        return open_entry(self.folder) is not None


def build_entry(plan: EntryPlan, workers: int | None = None, show: Show = silent) -> Entry:
    """The entry, built if it is missing.

    workers: maximum number of processes; default: one per core.
    show: shows how far the tokenisation is.
    """
    folder = plan.folder
    if (entry := open_entry(folder)) is None:
        with ExitStack() as stack:
            with writing(plan.cache):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder, waiting=lambda: show(_waiting(plan))))
            if (entry := open_entry(folder)) is None:
                remove_unused(folder.parent, keep=folder)
                progress = Progress(plan.reading.name, size_of(plan.reading.files), show)
                stack.callback(progress.end)
                shards = _encode_missing(plan, workers or len(os.sched_getaffinity(0)), progress)
                seal_entry(folder, shards, {"source": plan.reading.name, **plan.origin})
                entry = open_entry(folder)
    if entry is None:
        raise UserError(f"data.cache: {folder / SEAL} cannot be read back. Check the disk, or set `data.cache`.")
    mark_used(folder)
    return entry


def _waiting(plan: EntryPlan) -> str:
    done = sum(1 for file in plan.folder.glob("*.json") if file.name != SEAL)
    return f"  waiting for another process that tokenises {plan.reading.name}: {done} parts are done"


def row_counts(reading: Reading, cache: Path) -> list[int]:
    """Rows of each group of chunks of a source. They are counted once, by parsing it."""
    file = cache / "counts" / f"{hashed(reading.identity)}.json"
    known = read_json(file)
    if not isinstance(known, list):
        known = [len(chunk.rows()) for chunk in reading.open()]
        with writing(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, str(known).encode())
    return known


# --- encoding ---------------------------------------------------------------------------------------------


def _encode_missing(plan: EntryPlan, processes: int, progress: Progress) -> int:
    """Encode the shards that the entry lacks, and return the number of its shards."""
    total, job, selected = 0, plan.job, plan.selected
    size = progress.size
    if size is not None and size.unit == "rows" and selected is not None:
        progress.size = replace(size, total=len(selected))

    def tasks() -> Iterator[Task]:
        nonlocal total
        starts = None if selected is None else np.cumsum([0, *row_counts(plan.reading, plan.cache)])
        for number, chunk in enumerate(plan.reading.open()):
            total = number + 1
            if (facts := shard_facts(job.folder, number)) is not None:
                progress.keep(facts["encoded"], sum(map(text_bytes, chunk.chunks)))
                continue
            if selected is None or starts is None:
                yield number, chunk, None
            else:
                first, last = np.searchsorted(selected, starts[number : number + 2])
                yield number, chunk, selected[first:last] - starts[number]

    waiting = tasks()
    first = list(islice(waiting, ALONE + 1))
    if len(first) > ALONE and processes > 1:
        _encode_in_workers(chain(first, waiting), job, processes, progress)
    elif first:
        writer = job.writer()
        for task in chain(first, waiting):
            _count(progress, task, writer.write(*task))
    return total


def _count(progress: Progress, task: Task, rows: int) -> None:
    _, chunk, _ = task
    progress.add(rows, sum(map(text_bytes, chunk.chunks)))


def _encode_in_workers(tasks: Iterator[Task], job: Job, processes: int, progress: Progress) -> None:
    """Encode the shards in several processes. Raises the `UserError` of the first shard that has one.

    Shards are handed out in order, and all that were handed out are finished. So the error does not depend on which
    process is faster.
    """
    errors: dict[int, BaseException] = {}
    lock, pickled = threading.Lock(), pickle.dumps(job)

    def take() -> Task | None:
        with lock:
            return None if errors else next(tasks, None)

    def drive() -> None:
        number = sys.maxsize  # of an error in reading the source, which is at the end of what was handed out
        worker: Worker | None = None
        try:
            while (task := take()) is not None:
                worker, number = worker or Worker(pickled), task[0]
                rows = worker.encode(*task)
                with lock:
                    _count(progress, task, rows)
                number = sys.maxsize
        except BaseException as error:
            with lock:
                errors[number] = error
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=drive, daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
