"""Near ties of multiple choice are found and named."""

from __future__ import annotations

import pytest

from align.eval.near_ties import near_tie_notes, near_ties
from align.eval.records import Place, Record


def record(document: str, number: int, *logprobs: float, part: int = 0) -> Record:
    return Record("t", "1", Place(document, number, part), "scored", logprobs=logprobs)


RECORDS = [
    *(record("clear", number, -1.0 - number) for number in range(4)),
    *(record("tie", number, logprob) for number, logprob in enumerate((-3.0, -1.0, -2.0, -1.0))),
    *(record("near", number, -0.5, logprob) for number, logprob in enumerate((-0.5, -0.504))),
    record("text", 0, -1.0),
    record("text", 0, -1.0, part=1),  # windows of one text are no choices
]


def test_near_ties_are_named() -> None:
    assert near_ties(RECORDS) == {"tie": 0.0, "near": pytest.approx(0.004)}
    (note,) = near_tie_notes(RECORDS, 4)
    assert note.startswith(
        "near ties in 2 of 4 documents (tie, near): the two best choices differ by less than 0.01 nats"
    )
    assert near_tie_notes(RECORDS[:4], 1) == []
