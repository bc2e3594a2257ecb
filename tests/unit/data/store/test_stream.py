"""Streaming: the same rows from any position, in any process, with marks and without; bounded reading; counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from align.config.filters import ContaminationFilter, EvaluationSet
from align.config.parts import Data, FileSource, Mixture
from align.data import prepare
from align.data.store import stream
from align.errors import UserError

from .conftest import conversations, small_chunks  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Shuffle blocks of 20 rows, batches of 4, and a mark every 7 token rows."""
    for name, value in (("SHUFFLE_BUFFER", 20), ("BATCH", 4), ("MARK_EVERY", 7)):
        monkeypatch.setattr(stream, name, value)


def streamed(cache: Path, tokenizer, *sources: FileSource, kind: str = "sft", **options):
    data = Data(train=list(sources), cache=str(cache), **options)
    if kind == "text":
        return prepare.prepare_text(data, tokenizer, seed=3)
    return prepare.prepare_sft(data, tokenizer, assistant_only_loss=True, seed=3)


def read(made, first: int, last: int) -> list:
    return [made.train[number] for number in range(first, last)]


def answers(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"]).split("assistant\n")[1].removesuffix("<|im_end|>\n") for row in rows]


@pytest.mark.parametrize("kind", ["sft", "text"])
@pytest.mark.parametrize("marks", ["kept", "lost", "cut"])
@pytest.mark.parametrize("position", [1, 30, 65, 131])
def test_resuming_continues_the_same_rows(tmp_path, jsonl, tokenizer, kind, marks, position):
    """The first run reads ahead of the position, as a run that is killed after its last checkpoint does."""
    sources = [
        FileSource(path=jsonl(conversations(50), "a.jsonl"), streaming=True, weight=2),
        FileSource(path=jsonl(conversations(23, "no"), "b.jsonl"), weight=1),
    ]
    options = {"mixture": Mixture(stop="all_exhausted"), "max_length": 64}
    whole = read(streamed(tmp_path / "one", tokenizer, *sources, kind=kind, **options), 0, 160)
    read(streamed(tmp_path / "two", tokenizer, *sources, kind=kind, **options), 0, position + 9)
    (file,) = (tmp_path / "two").rglob("streams/*.jsonl")
    assert len(file.read_text().splitlines()) >= (position + 9) // 16
    if marks == "lost":
        file.unlink()
    elif marks == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    again = streamed(tmp_path / "two", tokenizer, *sources, kind=kind, **options)
    assert read(again, position, 160) == whole[position:]
    assert len({tuple(row["input_ids"]) for row in whole}) >= 40


def test_a_pass_has_each_row_once_and_the_next_has_another_order(tmp_path, jsonl, tokenizer):
    source = FileSource(path=jsonl(conversations(50)), streaming=True)
    made = streamed(tmp_path, tokenizer, source)
    first, second = (answers(read(made, start, start + 50), tokenizer) for start in (0, 50))
    assert sorted(first) == sorted(second) == [f"yes {n:03d}" for n in range(50)]
    assert first != second
    for start in (0, 20, 40):  # blocks of 20 rows, each shuffled
        block = first[start : start + 20]
        assert sorted(block) == [f"yes {n:03d}" for n in range(start, min(50, start + 20))]
        assert block != sorted(block)
    report = made.report.to_dict()
    assert (report["rows_read"], report["rows_train"], report["dropped"]) == (100, 100, {})
    assert report["tokens"] == sum(len(row["input_ids"]) for row in read(made, 0, 100))


def test_only_what_is_needed_is_read(tmp_path, jsonl, tokenizer, small_chunks, monkeypatch):  # noqa: F811
    parsed = []
    rows = stream.LazyChunk.rows

    def counted(self):
        parsed.append(id(self))
        return rows(self)

    monkeypatch.setattr(stream.LazyChunk, "rows", counted)
    source = FileSource(path=jsonl(conversations(600)), streaming=True)
    made = streamed(tmp_path, tokenizer, source)
    read(made, 0, 12)
    assert len(set(parsed)) <= 4  # chunks of ten rows
    parsed.clear()
    read(made, 0, 400)
    resumed = streamed(tmp_path, tokenizer, source)
    parsed.clear()
    assert read(resumed, 390, 400) == read(made, 390, 400)
    assert len(set(parsed)) <= 12


def test_held_out_prompts_are_never_trained_on(tmp_path, jsonl, tokenizer):
    rows = conversations(80) + conversations(80, "no")  # each prompt twice
    source = FileSource(path=jsonl(rows), streaming=True)
    made = streamed(tmp_path, tokenizer, source, held_out_fraction=0.3)

    def prompt(row):
        return tokenizer.decode(row["input_ids"]).split("assistant")[0]

    held, kept = {prompt(row) for row in made.held_out}, {prompt(row) for row in read(made, 0, 200)}
    assert len(held) >= 10
    assert not held & kept
    assert len(held | kept) == 80
    assert len(made.held_out) == 2 * len(held)


def test_documents_become_blocks_without_losing_a_token(tmp_path, jsonl, tokenizer):
    texts = ["a" * n + "." for n in range(1, 40)]
    source = FileSource(path=jsonl([{"text": text} for text in texts]), streaming=True)
    made = streamed(tmp_path, tokenizer, source, kind="text", max_length=32)
    tokens = sum(len(text) + 1 for text in texts)
    rows = read(made, 0, tokens // 32)
    assert {len(row["input_ids"]) for row in rows} == {32}
    assert all(sum(row["documents"]) == 32 and min(row["documents"]) > 0 for row in rows)
    end = tokenizer.eos_token_id
    for row in rows:
        ends = [place + 1 for place, token in enumerate(row["input_ids"]) if token == end and place < 31]
        assert [sum(row["documents"][: n + 1]) for n in range(len(row["documents"]) - 1)] == ends
    text = tokenizer.decode([token for row in rows for token in row["input_ids"]])
    found = Counter(text.split("<|im_end|>")[:-1])
    assert max(found.values()) == 1
    assert set(found) <= set(texts)


def test_limit_epochs_and_the_end_of_a_mixture(tmp_path, jsonl, tokenizer):
    a, b = jsonl(conversations(30), "a.jsonl"), jsonl(conversations(10, "no"), "b.jsonl")

    def counts(*sources, rows, **options):
        found = answers(read(streamed(tmp_path, tokenizer, *sources, **options), 0, rows), tokenizer)
        return Counter(answer.split()[0] for answer in found)

    limited = FileSource(path=a, streaming=True, limit=6)
    assert counts(limited, FileSource(path=b, epochs=2), rows=26) == {"yes": 6, "no": 20}
    assert counts(limited, FileSource(path=b, epochs=0.5), rows=11) == {"yes": 6, "no": 5}
    assert counts(FileSource(path=b, streaming=True, epochs=0.01), rows=3) == {"no": 3}  # three passes over one row
    even = [FileSource(path=a, streaming=True, weight=1), FileSource(path=b, weight=1)]
    once = counts(*even, rows=40, mixture=Mixture(stop="all_exhausted_without_replacement"))
    assert once == {"yes": 30, "no": 10}


def test_weights_are_shares_of_the_rows(tmp_path, jsonl, tokenizer):
    sources = [
        FileSource(path=jsonl(conversations(300), "a.jsonl"), streaming=True, weight=9),
        FileSource(path=jsonl(conversations(300, "no"), "b.jsonl"), weight=1),
    ]
    found = Counter(
        text.split()[0] for text in answers(read(streamed(tmp_path, tokenizer, *sources), 0, 300), tokenizer)
    )
    assert 255 <= found["yes"] <= 285  # three standard deviations around 270


def test_a_mixture_ends_with_its_first_source_or_starts_short_ones_again(tmp_path, jsonl, tokenizer):
    sources = [
        FileSource(path=jsonl(conversations(30), "a.jsonl"), streaming=True, weight=1),
        FileSource(path=jsonl(conversations(10, "no"), "b.jsonl"), weight=1),
    ]

    def read_of(name, stop):
        made = streamed(tmp_path, tokenizer, *sources, mixture=Mixture(stop=stop))
        return [text for text in answers(read(made, 0, 80), tokenizer) if text.startswith(name)]

    long, short = read_of("yes", "all_exhausted"), read_of("no", "all_exhausted")
    assert len(set(long[:25])) == 25
    assert sorted(short[:10]) == [f"no {n:03d}" for n in range(10)]
    assert len(set(short[10:18])) == 8  # the pass ends with the long source, before the short one ends again
    assert short[10:18] != short[:8]
    assert len(set(read_of("yes", "first_exhausted")[:25])) < 25  # the next pass began before all 30 were read


def test_sources_without_weights_are_read_in_turn_and_the_report_says_so(tmp_path, jsonl, tokenizer):
    sources = [
        FileSource(path=jsonl(conversations(8, name), f"{name}.jsonl"), streaming=True) for name in ("first", "second")
    ]
    made = streamed(tmp_path, tokenizer, *sources)
    assert [answer.split()[0] for answer in answers(read(made, 0, 16), tokenizer)] == ["first"] * 8 + ["second"] * 8
    assert "one after another" in made.report.summary()
    assert "one after another" not in streamed(tmp_path, tokenizer, sources[0]).report.summary()


def test_marks_after_damage_are_not_read(tmp_path, jsonl, tokenizer):
    source = FileSource(path=jsonl(conversations(40)), streaming=True)
    whole = read(streamed(tmp_path, tokenizer, source), 0, 60)
    (file,) = tmp_path.rglob("streams/*.jsonl")
    file.write_bytes(file.read_bytes() + b"\xff\x00\n")
    assert read(streamed(tmp_path, tokenizer, source), 50, 60) == whole[50:]


def test_marks_of_another_evaluation_set_are_not_read(tmp_path, jsonl, tokenizer):
    """A mark counts the rows that the filter has left before it."""
    text = "the quick brown fox jumps over the lazy dog near the quiet river"
    rows = [{"prompt": f"{text} {n}", "completion": "yes"} for n in range(20)] + conversations(40)
    source = FileSource(path=jsonl(rows), streaming=True)
    target = EvaluationSet(name="foxes", path=jsonl([{"question": "another text that no row contains"}], "test.jsonl"))
    filters = [ContaminationFilter(kind="contamination", against=[target])]
    read(streamed(tmp_path / "cache", tokenizer, source, filters=filters), 0, 30)
    jsonl([{"question": text}], "test.jsonl")
    resumed = read(streamed(tmp_path / "cache", tokenizer, source, filters=filters), 25, 35)
    assert resumed == read(streamed(tmp_path / "empty", tokenizer, source, filters=filters), 0, 35)[25:]


def test_a_stream_without_a_row(tmp_path, jsonl, tokenizer):
    source = FileSource(path=jsonl([{"messages": [{"role": "user", "content": "a"}]}] * 9), streaming=True)
    made = streamed(tmp_path, tokenizer, source)
    with pytest.raises(UserError, match=r"rows.jsonl: all rows of the stream were dropped \(no assistant turn: 9\)"):
        made.train[0]


PROGRAM = """
import hashlib, json, os, signal, sys
from align.config.parts import Data, FileSource
from align.data.prepare import prepare_sft
from align.data.store import stream
from align.data.tokenizer import train_tokenizer
stream.SHUFFLE_BUFFER, stream.BATCH, stream.MARK_EVERY = 20, 4, 7
data = Data(train=[FileSource(path=sys.argv[1], streaming=True)], cache=sys.argv[2])
made = prepare_sft(data, train_tokenizer(["a"], 259), assistant_only_loss=True, seed=3)
first, steps, killed = map(int, sys.argv[3:])
for step in range(first, steps):
    ids = [made.train[number]["input_ids"] for number in range(step * 8, step * 8 + 8)]
    print(step, hashlib.sha256(json.dumps(ids).encode()).hexdigest(), flush=True)
    if step == killed:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_ranks_continue_as_another_number_of_ranks(tmp_path, jsonl):
    """Each rank prints the hash of the ids of each step; a step is 8 rows."""
    path = jsonl(conversations(70))

    def ranks(count: int, cache: str, first: int, killed: int) -> list[list[str]]:
        command = [sys.executable, "-c", PROGRAM, path, str(tmp_path / cache), str(first), "20", str(killed)]
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        outputs = [process.communicate()[0].splitlines() for process in started]
        assert all(process.returncode == (-signal.SIGKILL if killed >= 0 else 0) for process in started)
        return outputs

    (whole,) = ranks(1, "one", 0, -1)
    assert len({line.split()[1] for line in whole}) == 20
    killed = ranks(2, "two", 0, 11)
    assert killed == [whole[:12]] * 2
    assert ranks(3, "two", 9, -1) == [whole[9:]] * 3
