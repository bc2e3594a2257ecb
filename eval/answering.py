"""Make the requests of tasks, and record the model's answers as they come."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from align.eval.encoder import Encoder
from align.eval.model import EvalModel
from align.eval.records import Place, Record, RecordStore, answer, moved, request_key
from align.eval.task import FollowUp, Item, Task
from align.rollout.base import completion_seed
from align.rollout.requests import Generation, Pair, Request, Scored

RECORDS_AT_A_TIME = 256
SECONDS_AT_A_TIME = 2.0
"""Number of records, and seconds, after which a batch of records is written."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of an evaluation.

    samples: completions per request; a target is scored once.
    seed: seed of the run; a completion's seed depends on it, its document and its sample only.
    """

    samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Planned:
    """A request to make: the record without an answer, and the request; None if it cannot be made."""

    record: Record
    request: Request | Pair | None


def choose(documents: Sequence[str], limit: int | None, task: str, seed: int) -> list[str]:
    """Documents to evaluate: all, or `limit` drawn with the seed. A larger limit includes those of a smaller one."""
    if limit is None or limit >= len(documents):
        return list(documents)
    chosen = set(sorted(documents, key=lambda document: text_number(f"{seed} {task} {document}"))[:limit])
    return [document for document in documents if document in chosen]


def plan(task: Task, documents: Sequence[str], encoder: Encoder, sampling: Sampling, checkpoint: str) -> list[Planned]:
    """The requests of a task's documents, once per sample."""
    return _planned(task, list(task.requests(documents, encoder)), sampling, checkpoint)


def _planned(task: Task, items: Sequence[Item], sampling: Sampling, checkpoint: str) -> list[Planned]:
    counts: dict[str, int] = {}
    for item in items:
        if item.sample is None:
            counts[item.document] = counts.get(item.document, 0) + 1
    # A document with targets has one sample, because its scores are the same in all.
    once = {item.document for item in items if not isinstance(item.request, Request)}
    found = []
    for item in items:
        samples = range(1 if item.document in once else sampling.samples)
        for sample in samples if item.sample is None else [item.sample]:
            place = Place(item.document, item.number, item.part, sample)
            of = counts[item.document] if item.sample is None else item.number + 1
            record = Record(task.name, task.version, place, "unscored", of=of)
            if isinstance(item.request, str):
                found.append(Planned(replace(record, reason=item.request), None))
                continue
            request = _sampled(item.request, place, task.name, sampling)
            key = request_key(checkpoint, task.text, request)
            found.append(Planned(replace(record, key=key), request))
    return found


def _sampled(request: Request | Pair, place: Place, task: str, sampling: Sampling) -> Request | Pair:
    if isinstance(request, Pair):
        return request
    document = text_number(f"{task} {place.document} {place.number} {place.part}")
    return replace(request, seed=completion_seed(sampling.seed, document, place.sample))


def follow_ups(
    tasks: Sequence[Task],
    documents: Mapping[str, Sequence[str]],
    store: RecordStore,
    encoder: Encoder,
    sampling: Sampling,
    checkpoint: str,
) -> list[Planned]:
    """Unrecorded requests of the tasks whose requests depend on earlier answers."""
    found: list[Planned] = []
    for task in tasks:
        if isinstance(task, FollowUp):
            chosen = set(documents[task.name])
            records = [
                record
                for record in store.of(task.name, task.version)
                if record.document in chosen and record.place.sample < sampling.samples
            ]
            found += _planned(task, list(task.follow_up(records, encoder)), sampling, checkpoint)
    return [one for one in found if not _is_recorded(one, store)]


def _is_recorded(one: Planned, store: RecordStore) -> bool:
    """True if the store has the answer at the request's place."""
    there = store.at(one.record.task, one.record.place)
    facts = one.record.key, one.record.version, one.record.of
    return there is not None and (there.key, there.version, there.of) == facts


def settle(planned: Sequence[Planned], store: RecordStore) -> list[Planned]:
    """Record answers that the store has, and requests that cannot be made; returns the remaining requests."""
    known, open_ = [], []
    for one in planned:
        if _is_recorded(one, store):
            continue
        if one.request is None:
            known.append(one.record)
        elif found := store.find(one.record.key):
            known.append(moved(found, one.record))
        else:
            open_.append(one)
    store.add(known)
    return open_


def run_requests(
    model: EvalModel, planned: Sequence[Planned], store: RecordStore, progress: Callable[[int, int], None]
) -> None:
    """Answer the requests and record the answers in batches. Equal requests are answered once.

    progress: called with the number of answered requests and of all.
    """
    twins: dict[str, list[Planned]] = {}
    for one in planned:
        twins.setdefault(one.record.key, []).append(one)
    # Prompts that share a prefix are adjacent, for the prefix cache.
    ordered = sorted((group[0] for group in twins.values()), key=_beginning)
    batch: list[Record] = []
    done, started, last = 0, time.perf_counter(), time.perf_counter()
    for one, result in _answers(model, ordered):
        now = time.perf_counter()
        assert one.request is not None
        first = replace(answer(one.record, one.request, result), seconds=round(now - last, 6))
        last = now
        batch += [first, *(moved(first, twin.record) for twin in twins[one.record.key][1:])]
        done += 1
        if len(batch) >= RECORDS_AT_A_TIME or now - started > SECONDS_AT_A_TIME:
            store.add(batch)
            progress(done, len(ordered))
            batch, started = [], now
    store.add(batch)
    progress(done, len(ordered))


def _answers(model: EvalModel, ordered: Sequence[Planned]) -> Iterator[tuple[Planned, Generation | Scored]]:
    texts = [one for one in ordered if isinstance(one.request, Request)]
    pairs = [one for one in ordered if isinstance(one.request, Pair)]
    for index, generation in model.generate([one.request for one in texts if isinstance(one.request, Request)]):
        yield texts[index], generation
    for index, scored in model.score([one.request for one in pairs if isinstance(one.request, Pair)]):
        yield pairs[index], scored


def _beginning(one: Planned) -> tuple[int, ...]:
    assert one.request is not None
    return one.request.prompt_ids if isinstance(one.request, Request) else one.request.prefix_ids


def text_number(text: str) -> int:
    """A 63-bit number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
