"""Read mutated data files: each must give rows, or one sentence. No traceback, no hang, bounded memory.

    python -m tests.fuzz_data --cases 2000

A case is decided by its number alone; `--first N --cases 1` repeats one. Exit status 1 if a case fails.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data import shapes
from align.data.files import chunks
from align.errors import UserError

SECONDS = 10
MEMORY = 512 << 20
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich? 🌧"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": {"city": "Zürich"}}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "assistant", "content": "Rain.", "reasoning_content": "It rains.", "weight": 1},
]
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}]
HH = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: "
ROWS: dict[str, dict[str, Any]] = {
    "openai": {"messages": TALK, "tools": TOOLS, "chat_template_kwargs": {"a": 1}, "id": 7},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        "system": "s",
    },
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    "prompt": {"prompt": "1 + 1?", "completion": "2", "reference": 2},
    "pair": {"prompt": "1 + 1?", "chosen": TALK[1:2] + TALK[4:], "rejected": "3"},
    "hh": {"chosen": HH + "one", "rejected": HH + "two"},
    "kto": {"prompt": "1 + 1?", "completion": "2", "label": True},
    "text": {"text": "Es war einmal – 从前。", "meta": {"x": [1, 2.5, None]}},
    "ids": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
}
WILD: list[Any] = [None, True, 0, -1, 2**70, 1e999, "", " ", "x", "\ud83d", [], {}, [[]], [None], {"a": None}]
WILD += [{"role": "user"}, [{"from": 3, "value": []}], "[" * 50, [1] * 1000, float("nan")]


# --- files ------------------------------------------------------------------------------------------------


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=row is rows[0]) + "\n" for row in rows).encode(errors="surrogatepass")


def _array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in values])
    return out.getvalue().encode(errors="surrogatepass")


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = dict.fromkeys(column for row in rows for column in row)
    arrays = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError):
            arrays[column] = pa.array([json.dumps(value) for value in values])
    return pa.table(arrays)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(_table(rows), sink)
    return sink.getvalue()


def _stream(rows: list[dict[str, Any]]) -> bytes:
    table, sink = _table(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _ipc(rows: list[dict[str, Any]]) -> bytes:
    table, sink = _table(rows), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _utf16(rows: list[dict[str, Any]]) -> bytes:
    return _jsonl(rows).decode(errors="surrogatepass").encode("utf-16", errors="surrogatepass")


WRITERS: list[tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = [
    (".jsonl", _jsonl),
    (".jsonl", _utf16),
    (".json", _array),
    (".json", _jsonl),
    (".csv", _csv),
    (".tsv", _csv),
    (".parquet", _parquet),
    (".arrow", _stream),
    (".arrow", _ipc),
]
COMPRESS: list[tuple[str, Callable[[bytes], bytes]]] = [
    (".gz", lambda data: gzip.compress(data, mtime=0)),
    (".zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
]


# --- mutations --------------------------------------------------------------------------------------------


def _mutated_value(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """The value with wrong types, missing keys and deep nesting at random places."""
    if chance.random() < 0.08:
        return chance.choice(WILD)
    if chance.random() < 0.01:
        for _ in range(chance.choice([3, 300])):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if chance.random() > 0.05}
        return {key: _mutated_value(item, chance, depth + 1) for key, item in kept.items()}
    if isinstance(value, list) and depth < 20:
        return [_mutated_value(item, chance, depth + 1) for item in value]
    return value


def _mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 30])):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + chance.randrange(1, 40)]
            case 3:
                changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
            case 4:
                end = at + chance.randrange(1, 200)
                changed[at:at] = changed[at:end]
            case 5:
                changed[at:at] = chance.choice(
                    [b'"', b"{", b"[" * 3000, b"\\ud83d", b"\x00", b"\xff\xfe", b"\r", b",,"]
                )
            case _:
                changed[at : at + 8] = chance.choice([b"9" * 5000, b"\xff" * 8, b"\x00" * 8, b"NaN", b"1e999"])
    return bytes(changed)


def make_file(number: int, folder: Path) -> Path:
    """Write the file of a case."""
    chance = random.Random(number)
    names = chance.sample(list(ROWS), chance.randint(1, 4))
    rows = [ROWS[name] for name in names for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.6:
        rows = [row for row in (_mutated_value(row, chance) for row in rows) if isinstance(row, dict)] or [{}]
    suffix, write = chance.choice(WRITERS)
    try:
        data = write(rows)
    except (pa.ArrowException, ValueError, RecursionError):
        suffix, data = ".jsonl", _jsonl([ROWS[names[0]]])
    if chance.random() < 0.6:
        data = _mutated_bytes(data, chance)
    if chance.random() < 0.3 and suffix not in (".parquet", ".arrow"):
        packed, compress = chance.choice(COMPRESS)
        suffix, data = suffix + packed, compress(data)
        if chance.random() < 0.5:
            data = _mutated_bytes(data, chance)
    path = folder / f"case{number}{suffix}"
    path.write_bytes(data)
    return path


# --- running ----------------------------------------------------------------------------------------------

CONVERSIONS: dict[shapes.Shape, Callable[[Any], Any]] = {
    "preference": shapes.pair,
    "unpaired": shapes.unpaired,
    "prompt_completion": shapes.conversation,
    "messages": shapes.conversation,
    "alpaca": shapes.conversation,
    "prompt": shapes.prompt,
    "text": shapes.text,
    "token_ids": shapes.token_ids,
}


def read(path: Path) -> str:
    """Read a file and convert each row by every function that accepts it: "rows", or the sentence of the error."""
    try:
        for chunk in chunks(path):
            for row in chunk.rows():
                _convert(row)
    except UserError as error:
        sentence = str(error)
        if path.name not in sentence or "\n" in sentence or not sentence.endswith("."):
            raise AssertionError(f"not a sentence with the file: {sentence!r}") from error
        return sentence
    return "rows"


def _convert(row: shapes.Row) -> None:
    for shape, convert in CONVERSIONS.items():
        if shapes.shape_of(row, (shape,)) != shape:
            continue
        shapes.unused_columns(row, shape)
        try:
            # A tokenizer and a file of tokenised rows take only text that can be encoded.
            json.dumps([convert(row), shapes.template_variables(row)], ensure_ascii=False, allow_nan=False).encode()
        except shapes.DropRow as reason:
            if not str(reason) or "\n" in str(reason):
                raise AssertionError(f"not a reason: {reason!r}") from reason


@contextmanager
def _time_limit(seconds: int) -> Any:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(number: int, folder: Path) -> tuple[str, str]:
    """(outcome, detail) of a case; the outcome is `rows`, `sentence` or `FAILED`."""
    path = make_file(number, folder)
    try:
        with _time_limit(SECONDS):
            said = read(path)
    except BaseException:
        return "FAILED", traceback.format_exc()
    finally:
        path.unlink()
    return ("rows", "") if said == "rows" else ("sentence", said)


def _worker(numbers: range, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 4 * MEMORY,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            outcome, detail = run_case(number, Path(folder))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            if grown > MEMORY:
                outcome, detail = "FAILED", f"the process grew by {grown >> 20} MiB"
            results.put((number, outcome, detail, grown))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", action="store_true", help="print the sentence of each case")
    options = parser.parse_args()
    start, counts, failed, grown = time.perf_counter(), Counter[str](), 0, 0
    context = multiprocessing.get_context("fork")
    numbers, end = options.first, options.first + options.cases
    while numbers < end:  # a crash ends the worker; the next one continues after that case
        results: Any = context.SimpleQueue()
        worker = context.Process(target=_worker, args=(range(numbers, end), results))
        worker.start()
        while numbers < end and (worker.is_alive() or not results.empty()):
            if results.empty():
                time.sleep(0.01)
                continue
            number, outcome, detail, size = results.get()
            numbers, grown = number + 1, max(grown, size)
            counts[outcome] += 1
            if outcome == "FAILED" or options.show:
                failed += outcome == "FAILED"
                print(f"case {number}: {outcome} {detail}")
        worker.join()
        if numbers < end:
            print(f"case {numbers}: FAILED: the process died with status {worker.exitcode}")
            counts["FAILED"] += 1
            failed, numbers = failed + 1, numbers + 1
    took = time.perf_counter() - start
    print(
        f"{options.cases:,} files: {counts['rows']:,} read, {counts['sentence']:,} refused in one sentence, "
        f"{failed:,} failed; {took:.0f} s, memory grew by {grown >> 20} MiB"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
