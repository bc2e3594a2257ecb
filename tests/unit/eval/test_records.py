"""Records on disk survive `kill -9`, and answers are found by their keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import UserError
from align.eval.records import Place, Record, RecordStore, answer, moved, request_key
from align.rollout.requests import Generation, Pair, Request, Scored

REQUEST = Request((1, 2, 3), 8, temperature=0.7, stop=("\n",), seed=5)
PAIR = Pair((1, 2), (3, 4))


def record(number: int = 0, **changes) -> Record:
    empty = Record("sums", "1", Place(f"d{number}"), "unscored", key=f"k{number}")
    done = answer(empty, REQUEST, Generation((7, 8), "a\u2028b\n", True))
    return replace(done, **changes)


def test_records_are_read_back(tmp_path: Path) -> None:
    written = [record(0), record(1, status="truncated", seconds=0.25)]
    written.append(
        answer(Record("mc", "2", Place("d", 3, 1, 2), "unscored", key="kk"), PAIR, Scored(-3.0, (-1.0, -2.0), True))
    )
    written.append(Record("mc", "2", Place("e"), "unscored", reason="too long"))
    store = RecordStore(tmp_path / "new" / "records.jsonl")
    store.add(written[:2])
    store.add(written[2:])
    store.close()
    again = RecordStore(tmp_path / "new" / "records.jsonl")
    assert list(again) == written
    assert again.find("kk") == written[2]
    assert again.find("") is None
    assert written[2].logprob == -3.0
    assert written[0].prompt_tokens == 3
    assert again.at("mc", Place("d", 3, 1, 2)) == written[2]
    assert again.of("mc", "2") == written[2:]
    assert again.of("mc", "1") == []


def test_an_incomplete_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    store = RecordStore(path)
    store.add([record(0), record(1)])
    store.close()
    whole = path.read_bytes()
    for cut in (1, 30, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        store = RecordStore(path)
        kept = len(store)
        assert kept == whole[:-cut].count(b"\n")
        store.add([record(i) for i in range(kept, 2)])
        store.close()
        assert path.read_bytes() == whole


def test_another_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"task": "x"}\n')
    with pytest.raises(UserError, match="line 1: this is not a record"):
        RecordStore(path)


def test_a_status_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    store = RecordStore(path)
    store.add([record(0, status="truncated")])
    store.close()
    path.write_text(path.read_text().replace('"truncated"', '"cut"'))
    with pytest.raises(UserError, match=r"line 1: this is not a record of this version of align .*status 'cut'"):
        RecordStore(path)


def test_batches_survive_kill_9(tmp_path: Path) -> None:
    """Every record that `add` returned from is in the file after the process was killed."""
    path = tmp_path / "records.jsonl"
    code = (
        "import sys\n"
        "from align.eval.records import Place, Record, RecordStore\n"
        f"store = RecordStore(__import__('pathlib').Path({str(path)!r}))\n"
        "for i in range(10**6):\n"
        "    store.add([Record('t', '1', Place(str(i), sample=j), 'unscored') for j in range(3)])\n"
        "    print(i, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 5:
            pass
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = 5 + sum(1 for _ in process.stdout)
    documents = [r.document for r in RecordStore(path)]
    assert len(documents) >= 3 * acknowledged
    assert documents[: 3 * acknowledged] == [str(i) for i in range(acknowledged) for _ in range(3)]


@pytest.mark.parametrize(
    "other",
    [
        ("ckpt2", "task", REQUEST),
        ("ckpt", "task, changed", REQUEST),
        ("ckpt", "task", replace(REQUEST, prompt_ids=(1, 2, 4))),
        ("ckpt", "task", replace(REQUEST, prompt_ids=(1, 23))),
        ("ckpt", "task", replace(REQUEST, max_new_tokens=9)),
        ("ckpt", "task", replace(REQUEST, stop=())),
        ("ckpt", "task", replace(REQUEST, seed=6)),
        ("ckpt", "task", replace(REQUEST, temperature=0.8)),
        ("ckpt", "task", replace(REQUEST, top_p=0.9)),
        ("ckpt", "task", replace(REQUEST, stop_token_ids=(9,))),
        ("ckpt", "task", PAIR),
    ],
)
def test_a_key_differs_with_whatever_changes_the_answer(other: tuple) -> None:
    """A cache that ignores one of these serves another model's or task's answer as this one's."""
    assert request_key(*other) != request_key("ckpt", "task", REQUEST)


def test_keys_of_pairs_and_of_greedy_requests() -> None:
    assert request_key("c", "t", PAIR) != request_key("c", "t", Pair((1,), (2, 3, 4)))
    greedy = replace(REQUEST, temperature=0.0)
    assert request_key("c", "t", greedy) == request_key("c", "t", replace(greedy, seed=99))


def test_an_answer_moves_to_an_equal_request() -> None:
    other = Record("sums", "1", Place("twin", sample=2), "unscored", key="k0")
    found = moved(record(0, seconds=3.0), other)
    assert (found.place, found.text, found.key, found.seconds) == (other.place, "a\u2028b\n", "k0", 0.0)
