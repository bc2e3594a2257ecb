"""Reading a growing file: half-written lines, other files under the same name, long and broken lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from align.run.folder import MetricsWriter
from align.watch import tail
from align.watch.tail import Tail


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)


def steps(reader: Tail) -> list[int]:
    return [row["step"] for row in reader.read().rows]


def test_each_line_is_read_once_when_it_is_whole(file: Path) -> None:
    reader = Tail(file)
    assert reader.read() == ([], False, False)  # the file is not there yet
    append(file, '{"step": 1}\n{"step": 2')
    assert steps(reader) == [1]
    assert steps(reader) == []
    append(file, "}")
    assert steps(reader) == []
    append(file, '\n{"step": 3}\n')
    assert steps(reader) == [2, 3]


def test_a_file_that_is_written_byte_by_byte(file: Path) -> None:
    reader, text, seen = Tail(file), '{"step": 1, "é": "\u2028"}\n{"step": 2}\n'.encode(), []
    for place in range(len(text)):
        with file.open("ab") as opened:
            opened.write(text[place : place + 1])
        seen += steps(reader)
    assert seen == [1, 2]


def test_lines_that_are_not_objects_are_skipped(file: Path) -> None:
    append(file, '{"step": 1}\n{"step": 2, "los\n[3]\n4\n\n"5"\n' + "[" * 100_000 + '\n{"step": 6}\n')
    with file.open("ab") as opened:
        opened.write(b'{"step": 7, "loss": "\xff"}\n{"step": 8}\n')
    assert steps(Tail(file)) == [1, 6, 8]


def test_a_resumed_run_replaces_the_file(file: Path) -> None:
    """The resumed run keeps the steps up to its checkpoint, and then writes others."""
    reader = Tail(file)
    first = MetricsWriter(file)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0})
    assert steps(reader) == [1, 2, 3]
    resumed = MetricsWriter(file, from_step=1)
    for step in (2, 3, 4, 5):
        resumed.write(step, {"loss": 2.0})
    found = reader.read()
    assert found.restarted
    assert [(row["step"], row["loss"]) for row in found.rows] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_another_file_with_the_inode_of_the_old_one_is_noticed(file: Path) -> None:
    append(file, '{"step": 1, "loss": 1.0}\n')
    reader = Tail(file)
    reader.read()
    inode = file.stat().st_ino
    with file.open("r+") as opened:
        opened.write('{"step": 8, "loss": 1.0}\n{"step": 9}\n')
    assert os.stat(file).st_ino == inode
    found = reader.read()
    assert (found.restarted, [row["step"] for row in found.rows]) == (True, [8, 9])


def test_a_removed_file_counts_no_longer_and_may_come_back(file: Path) -> None:
    append(file, '{"step": 1}\n')
    reader = Tail(file)
    reader.read()
    file.unlink()
    assert reader.read() == ([], True, False)
    assert reader.read() == ([], False, False)
    append(file, '{"step": 5}\n')
    assert reader.read() == ([{"step": 5}], False, False)


def test_long_files_come_in_chunks_and_a_longer_line_is_skipped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 1000)
    lines = [json.dumps({"step": step}) for step in range(500)]
    lines[250] = json.dumps({"step": 250, "text": "x" * 5000})
    append(file, "\n".join(lines) + "\n")
    reader, seen, calls = Tail(file), [], 0
    while True:
        found = reader.read()
        calls += 1
        seen += [row["step"] for row in found.rows]
        if not found.more:
            break
    assert seen == [step for step in range(500) if step != 250]
    assert calls > 10
