"""The line that shows how far a tokenisation is, against numbers made by hand, and its way to a terminal and a log."""

from __future__ import annotations

import gzip
import re
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.cli import terminal
from align.config.parts import Data, FileSource
from align.data.prepare import prepare_sft
from align.data.store import progress
from align.data.store.progress import Progress, Size, silent, size_of
from align.run import cache as run_cache
from align.run.cache import locked

from .conftest import conversations


def test_share_rate_and_time_left() -> None:
    found = Progress("chats.jsonl", Size("bytes", 1000), silent)
    found.add(30, 250)
    # A quarter of the bytes in 10 s: three quarters are left, which take 30 s.
    assert found.line(10.0) == "  tokenising chats.jsonl: 25%, 30 rows, 3 rows/s, 30 s left"


def test_rows_of_an_earlier_start_do_not_count_as_fast() -> None:
    found = Progress("chats.parquet", Size("rows", 1000), silent)
    found.keep(400, 0)
    found.add(100, 0)
    # 100 rows in 50 s; 500 rows are left.
    assert found.line(50.0) == "  tokenising chats.parquet: 50%, 500 rows, 2 rows/s, 4 min left"


def test_a_source_of_unknown_size_has_rows_and_a_rate() -> None:
    found = Progress("hub", None, silent)
    found.add(1200, 0)
    assert found.line(2.0) == "  tokenising hub: 1,200 rows, 600 rows/s"


def test_the_size_is_bytes_of_text_or_rows_of_parquet(tmp_path: Path) -> None:
    text, table, packed = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.jsonl.gz"
    text.write_text("{}\n" * 5)
    pq.write_table(pa.table({"text": ["x"] * 7}), table)
    packed.write_bytes(gzip.compress(b"{}\n"))
    assert size_of([text]) == Size("bytes", 15)
    assert size_of([table]) == Size("rows", 7)
    assert size_of([packed]) is None
    assert size_of([text, table]) is None


def test_every_row_and_byte_of_a_file_is_counted(tmp_path, jsonl, tokenizer, small_chunks, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    shown: list[str] = []
    data = Data(train=[FileSource(path=jsonl(conversations(35)))], cache=str(tmp_path), workers=1)
    prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0, show=shown.append)
    shares = [int(found[1]) for line in shown if (found := re.search(r": (\d+)%", line))]
    assert shares == [29, 57, 86, 100]
    assert "100%, 35 rows" in shown[-2]
    assert shown[-1] == ""
    shown.clear()
    prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0, show=shown.append)
    assert shown == []


def test_a_process_that_waits_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_cache, "POLL", 0.01)
    waited: list[float] = []
    release = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "entry"):
            taken.set()
            release.wait(5)

    taken = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(5)

    def note() -> None:
        waited.append(time.monotonic())
        if len(waited) == 3:
            release.set()

    with locked(tmp_path / "entry", waiting=note):
        assert len(waited) >= 3
    thread.join()


def test_a_log_gets_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal, "_logged", float("-inf"))
    monkeypatch.setattr(terminal, "_began", 100.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for second in range(25):
        now[0] = 100.0 + second
        terminal.progress(f"line {second}")
        terminal.progress("")
    assert capsys.readouterr().out == "line 0\nline 10\nline 20\n"
    for minute in range(11, 14):  # after ten minutes, one line per minute
        for second in range(60):
            now[0] = 100.0 + 60 * minute + second
            terminal.progress(f"{minute}:{second:02d}")
    assert capsys.readouterr().out == "11:00\n12:00\n13:00\n"
    monkeypatch.setenv("ALIGN_LOG_STEPS", "1")
    terminal.progress("a")
    terminal.progress("b")
    assert capsys.readouterr().out == "a\nb\n"
