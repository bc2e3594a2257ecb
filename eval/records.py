"""Records of an evaluation: each answer of the model, appended to a file as it arrives, and found again by its key.

Scores are computed from records alone, so they can be computed again without the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from align.errors import UserError
from align.rollout.requests import Generation, Pair, Request, Scored
from align.run.folder import disk_error

Status = Literal["finished", "truncated", "scored", "unscored"]


class Place(NamedTuple):
    """The request that a record answers.

    document: id of the document.
    number: index of the request within the document.
    part: number of the window, if a text is scored in several.
    sample: number of the sample of the same request.
    """

    document: str
    number: int = 0
    part: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Record:
    """One answer of the model.

    task, version: the task's name and version.
    place: document, request, window and sample.
    status: `finished` or `truncated` for a completion, `scored` for a target, `unscored` if the request was not made.
    of: number of records that the document and sample need to be scored.
    key: hash of checkpoint, task, request and seed; see `request_key`. "" if the request was not made.
    prompt_hash: hash of the prompt's token ids.
    prompt_tokens: number of the prompt's tokens.
    token_ids, text: the completion.
    logprobs: log-probability of each token of the target.
    greedy: True if greedy decoding would give the target.
    reason: why the request was not made.
    seconds: time since the answers of the batch before.
    """

    task: str
    version: str
    place: Place
    status: Status
    of: int = 1
    key: str = ""
    prompt_hash: str = ""
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    greedy: bool | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def logprob(self) -> float:
        """Log-probability of the target: the sum over its tokens."""
        return sum(self.logprobs)

    @property
    def document(self) -> str:
        return self.place.document


def request_key(checkpoint: str, task: str, request: Request | Pair) -> str:
    """Key of an answer: equal keys have equal answers.

    checkpoint: hash of the checkpoint and of everything else that affects the numbers, such as the dtype.
    task: text that defines the task; see `Task.text`.
    """
    fields = asdict(request)
    if isinstance(request, Request) and request.temperature == 0:
        fields |= {"seed": 0, "top_p": 1.0}
    return _hash([checkpoint, task, type(request).__name__, fields])


def answer(record: Record, request: Request | Pair, result: Generation | Scored) -> Record:
    """The record with a result."""
    prompt = request.prompt_ids if isinstance(request, Request) else request.prefix_ids
    fields: dict[str, Any] = {"prompt_hash": _hash(prompt)[:16], "prompt_tokens": len(prompt)}
    if isinstance(result, Generation):
        fields |= {
            "status": "finished" if result.finished else "truncated",
            "token_ids": result.token_ids,
            "text": result.text,
        }
    else:
        fields |= {"status": "scored", "logprobs": result.logprobs, "greedy": result.greedy}
    return Record(**{**_fields(record), **fields})


def moved(record: Record, other: Record) -> Record:
    """The answer of `record` at the place of `other`, which has the same key."""
    place = {"task": other.task, "version": other.version, "place": other.place, "of": other.of, "seconds": 0.0}
    return Record(**{**_fields(record), **place})


class RecordStore:
    """Records of one model in a JSONL file. `add` returns after the lines are on disk. Without a path, nothing is kept.

    An incomplete last line, which a killed process may leave, is removed when the file is opened. Raises `UserError` if
    another line cannot be read.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[Record] = []
        self._by_key: dict[str, Record] = {}
        self._by_place: dict[tuple[str, Place], int] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        end = 0
        if path.is_file():
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:end].splitlines(), start=1):
                self._remember(self._parse(line, number))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
            self._file.truncate(end)
        except OSError as error:
            raise disk_error(path, error) from error

    def find(self, key: str) -> Record | None:
        """The record with this key, if the request was answered before."""
        return self._by_key.get(key)

    def at(self, task: str, place: Place) -> Record | None:
        """The last record at this place, if any."""
        index = self._by_place.get((task, place))
        return None if index is None else self.records[index]

    def of(self, task: str, version: str) -> list[Record]:
        """The last record of each place of a task in this version."""
        last = (self.records[index] for (name, _), index in self._by_place.items() if name == task)
        return [record for record in last if record.version == version]

    def add(self, records: Iterable[Record]) -> None:
        """Append records and wait until they are on disk."""
        found = list(records)
        if not found or self._file is None or self.path is None:
            return
        lines = "".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in found)
        try:
            self._file.write(lines.encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        for record in found:
            self._remember(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def _remember(self, record: Record) -> None:
        if record.key:
            self._by_key.setdefault(record.key, record)
        self._by_place[record.task, record.place] = len(self.records)
        self.records.append(record)

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            fields = json.loads(line)
            for name in ("token_ids", "logprobs"):
                fields[name] = tuple(fields[name])
            if fields["status"] not in get_args(Status):
                raise ValueError(f"status '{fields['status']}' is unknown")
            return Record(**{**fields, "place": Place(*fields["place"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.path}, line {number}: this is not a record of this version of align ({error}). Remove the "
                "file, or choose another folder with --out."
            ) from None


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
