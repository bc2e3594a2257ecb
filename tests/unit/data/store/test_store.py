"""Tokenised rows on disk: kept, shared, continued after a kill, rebuilt when damaged, never stale."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from align.config.parts import Data, FileSource
from align.data import prepare
from align.data.chat import chatml_template
from align.data.store import build, cache
from align.data.store.entry import open_entry
from align.data.store.tokenised import list_lengths
from align.errors import UserError
from align.run import cache as run_cache

from .conftest import conversations, ids, tokenised


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "data" / "entries").glob("*/entry.json"))


def test_a_second_start_reads_nothing_of_the_source(tmp_path, jsonl, tokenizer, written, small_chunks, monkeypatch):
    monkeypatch.setattr(run_cache, "REMEMBERED", 1)
    path = Path(jsonl(conversations(35)))
    time.sleep(0.12)  # the hash of a file that has just been written is not kept
    first = tokenised(path, tmp_path / "cache", tokenizer)
    assert written == [0, 1, 2, 3]
    opened = []
    really = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *args, **more: opened.append(file) or really(file, *args, **more)
    )
    again = tokenised(path, tmp_path / "cache", tokenizer)
    assert written == [0, 1, 2, 3]
    assert path not in map(Path, filter(lambda file: isinstance(file, (str, Path)), opened))
    assert opened  # the spy sees the files of the cache
    assert ids(again) == ids(first)
    assert again.report == first.report


def test_what_determines_the_rows_is_noticed(tmp_path, jsonl, tokenizer, written):
    """A changed file (also one of the same size and age), length, template, kind of trainer and column name."""
    rows = conversations(5)
    path = Path(jsonl(rows))
    before = path.stat()
    kept = tokenised(path, tmp_path, tokenizer)
    path.write_text(path.read_text().replace("yes 003", "no! 003"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = tokenised(path, tmp_path, tokenizer)
    texts = {tokenizer.decode(row).split("assistant\n")[1] for row in ids(changed)}
    assert "no! 003<|im_end|>\n" in texts
    assert "yes 003<|im_end|>\n" not in texts
    assert kept.report.fingerprint != changed.report.fingerprint
    assert len(written) == 2
    tokenised(path, tmp_path, tokenizer, max_length=40)
    template = tokenizer.chat_template
    tokenizer.chat_template = chatml_template("Be brief.")
    try:
        system = tokenised(path, tmp_path, tokenizer)
    finally:
        tokenizer.chat_template = template
    assert all("Be brief." in tokenizer.decode(row) for row in ids(system))
    data = Data(train=[FileSource(path=str(path))], cache=str(tmp_path))
    prepare.prepare_sft(data, tokenizer, assistant_only_loss=False, seed=0)
    prepare.prepare_text(data, tokenizer, seed=0)
    assert len(written) == 6
    prepare.prepare_text(data, tokenizer, seed=1)  # the seed changes the order only
    tokenised(path, tmp_path, tokenizer, held_out_fraction=0.5)
    assert len(written) == 6


PROGRAM = """
import os, signal, sys
from align.data.files import text
from align.data.store import reading, shards
from align.config.parts import Data, FileSource
from align.data.prepare import prepare_sft
from align.data.tokenizer import train_tokenizer
reading.CHUNKS, text.CHUNK_BYTES = 1, int(sys.argv[4])
save, stop = shards.ShardWriter._save, int(sys.argv[3])
def interrupted(self, number, *args):
    if number == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, number, *args)
shards.ShardWriter._save = interrupted
data = Data(train=[FileSource(path=sys.argv[1])], cache=sys.argv[2], workers=1)
made = prepare_sft(data, train_tokenizer(["a"], 259), assistant_only_loss=True, seed=0)
print(made.report.fingerprint)
"""


def program(path: Path, folder: Path, stop: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(path),
        str(folder),
        str(stop),
        str(10 * len(json.dumps(conversations(1)[0]))),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_tokenisation_continues_after_a_kill(tmp_path, jsonl, tokenizer, written, small_chunks):
    path = Path(jsonl(conversations(55)))
    killed = program(path, tmp_path / "cache", 3)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not entries(tmp_path / "cache")
    continued = tokenised(path, tmp_path / "cache", tokenizer, workers=1)
    assert written == [3, 4, 5]
    whole = tokenised(path, tmp_path / "other", tokenizer, workers=1)
    assert written == [3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert ids(continued) == ids(whole)
    assert continued.report == whole.report


@pytest.mark.slow
def test_two_processes_build_once(tmp_path, jsonl):
    path = Path(jsonl(conversations(300)))
    pair = [program(path, tmp_path / "cache", -1) for _ in range(2)]
    printed = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert printed[0] == printed[1] != ""
    assert len(entries(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").rglob("*.new"))


@pytest.mark.slow
def test_workers_make_the_same_rows_and_report_the_first_error(
    tmp_path, jsonl, tokenizer, small_chunks, written, monkeypatch
):
    path = Path(jsonl(conversations(95)))
    alone = tokenised(path, tmp_path / "one", tokenizer, workers=1)
    assert written == list(range(10))
    monkeypatch.setattr(build, "ALONE", 1)
    several = tokenised(path, tmp_path / "two", tokenizer, workers=2)
    assert len(written) == 10  # this process has written none of them
    assert ids(several) == ids(alone)
    assert several.report == alone.report
    lines = path.read_text().splitlines()
    lines[43] = lines[75] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 44: not valid JSON"):
        tokenised(path, tmp_path / "two", tokenizer, workers=2)


@pytest.mark.parametrize("damage", ["truncated", "missing", "footer", "counts"])
def test_a_damaged_shard_is_made_again(tmp_path, jsonl, tokenizer, written, small_chunks, damage):
    path = jsonl(conversations(25))
    whole = ids(tokenised(path, tmp_path, tokenizer))
    (seal,) = entries(tmp_path)
    shard = seal.parent / "00001.arrow"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "missing":
        shard.unlink()
    elif damage == "footer":
        shard.write_bytes(shard.read_bytes()[:-8] + b"........")
    else:
        (seal.parent / "tokens.npy").write_bytes(b"")
    written.clear()
    assert ids(tokenised(path, tmp_path, tokenizer)) == whole
    assert written == ([] if damage == "counts" else [1])


def test_limit_encodes_only_its_rows(tmp_path, jsonl, tokenizer, small_chunks):
    path = jsonl(conversations(50))
    every = tokenised(path, tmp_path, tokenizer)
    source = FileSource(path=path, limit=8)
    data = Data(train=[source], cache=str(tmp_path))
    few = prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0)
    assert ids(few) == ids(every)[:8]
    assert few.report.rows_read == 8
    encoded = sorted(len(open_entry(seal.parent).tokens) for seal in entries(tmp_path))
    assert encoded == [8, 50]


def test_the_report_says_which_row_became_what(tmp_path, jsonl, tokenizer, small_chunks):
    rows = [
        *conversations(12),
        {"messages": [{"role": "user", "content": "alone"}], "source": "web"},
        {"messages": [], "source": "web"},
        *conversations(1, "long " * 50),
    ]
    path = jsonl(rows)
    made = tokenised(path, tmp_path, tokenizer, max_length=60)
    report = made.report
    assert (report.rows_read, report.rows_train, report.truncated) == (15, 13, 1)
    assert report.dropped == {"no assistant turn": 1, "empty conversation": 1}
    assert report.unused_columns == {"source": 2}
    assert report.sources == [{"name": path, "rows": 13, "tokens": sum(map(len, ids(made)))}]
    (seal,) = entries(tmp_path)
    entry = open_entry(seal.parent)
    assert entry.rows["count"].tolist() == [1] * 12 + [0, 0] + [1]
    assert [entry.reasons[entry.rows["reason"][n]] for n in (12, 13)] == ["no assistant turn", "empty conversation"]
    assert entry.first()[14] == 12


def test_lengths_without_reading_tokens(tmp_path, jsonl, tokenizer, small_chunks):
    path = jsonl([row for n in range(1, 25) for row in conversations(1, "a" * n)])
    made = tokenised(path, tmp_path, tokenizer).train
    expected = [len(row["input_ids"]) for row in made]
    assert list_lengths(made, "input_ids").tolist() == expected
    assert len(set(expected)) == 24
    plain = datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]]})
    assert list_lengths(plain, "input_ids").tolist() == [1, 2]


def test_prompts_are_parsed_when_they_are_read(tmp_path, jsonl, tokenizer, small_chunks):
    rows = [{"prompt": f"q{n}", "reference": "r", "level": n if n % 2 else str(n)} for n in range(25)]
    rows.append({"prompt": "last", "reference": "r", "note": {"a": [None, 1.5]}})
    prompts, _ = prepare.prepare_prompts(
        [FileSource(path=jsonl(rows))], tokenizer, max_prompt_length=99, seed=0, cache=str(tmp_path)
    )
    assert [prompts[n] for n in range(26)] == list(prompts) == prompts[:]
    by_prompt = {prompt.messages[0]["content"]: prompt.row for prompt in prompts}
    assert (by_prompt["q3"]["level"], by_prompt["q4"]["level"]) == (3, "4")
    assert by_prompt["last"] == {"prompt": "last", "reference": "r", "note": {"a": [None, 1.5]}, "level": None}


def test_a_cache_that_cannot_be_written(tmp_path, jsonl, tokenizer, monkeypatch):
    path = jsonl(conversations(3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"data.cache: cannot write to {tmp_path / 'file'}")):
        tokenised(path, tmp_path / "file", tokenizer)
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*ALIGN_CACHE"):
        tokenised(path, tmp_path / "full", tokenizer)


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_unused_entries_are_removed(tmp_path, jsonl, tokenizer):
    tokenised(jsonl(conversations(3)), tmp_path, tokenizer)
    (old,) = entries(tmp_path)
    long_ago = time.time() - (cache.UNUSED_DAYS + 1) * 86400
    for path in (old.parent, old.parent / "used"):
        os.utime(path, (long_ago, long_ago))
    tokenised(jsonl(conversations(4)), tmp_path, tokenizer)
    (new,) = entries(tmp_path)
    assert new != old


def test_the_fingerprint_of_a_tokenizer_ignores_what_a_call_sets(tokenizer):
    before = build.tokenizer_state(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert build.tokenizer_state(tokenizer) == before
    same = pickle.loads(pickle.dumps(tokenizer))
    assert build.tokenizer_state(same) == before
    same.add_tokens(["abc"])
    assert build.tokenizer_state(same) != before


def test_held_out_hash_and_origin_are_for_people_too(tmp_path, jsonl, tokenizer):
    path = jsonl(conversations(5))
    tokenised(path, tmp_path, tokenizer)
    (seal,) = entries(tmp_path)
    origin = json.loads(seal.read_text())["origin"]
    assert origin["source"] == path
    assert origin["encoding"] == ["sft", 1024]
    assert np.unique(open_entry(seal.parent).rows["key"]).size == 5


def test_each_row_may_have_a_reason_of_its_own(tmp_path, jsonl, tokenizer):
    """Names of characters as roles: more reasons than a 16-bit index can tell apart."""
    rows = [{"messages": [{"role": f"Elf {n}", "content": "Hi"}]} for n in range(33_000)]
    made = tokenised(jsonl([*rows, *conversations(3)]), tmp_path, tokenizer)
    assert len(made.report.dropped) == 33_000
    assert set(made.report.dropped.values()) == {1}
    assert "32,980 dropped for 32,980 other reasons" in made.report.summary()


def test_passes_over_a_held_out_row_are_counted(tmp_path, jsonl, tokenizer):
    """held_out_fraction holds a row out once, however often its source is read."""
    path = jsonl([*conversations(40), {"messages": [{"role": "user", "content": "Hi"}]}])
    data = Data(train=[FileSource(path=path, epochs=3)], held_out_fraction=0.25, cache=str(tmp_path))
    made = prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0)
    report, held_out = made.report, len(made.held_out)
    assert report.dropped == {"no assistant turn": 3, "repeats a held-out row": 2 * held_out}
    assert report.rows_read == 3 * 41 == len(made.train) + held_out + sum(report.dropped.values())
