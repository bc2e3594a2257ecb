"""Documents of multiple choice whose two best choices are almost equally likely."""

from __future__ import annotations

from collections.abc import Sequence

from align.eval.records import Record

NEAR = 0.01
"""In nats: for a smaller difference, another batch size, dtype or engine may choose the other answer."""


def near_ties(records: Sequence[Record]) -> dict[str, float]:
    """{document: difference of the two best choices' log-probabilities}, if it is less than `NEAR`."""
    choices: dict[str, dict[int, float]] = {}
    for record in records:
        if record.status == "scored":
            of_document = choices.setdefault(record.document, {})
            of_document[record.place.number] = of_document.get(record.place.number, 0.0) + record.logprob
    found = {}
    for document, logprobs in choices.items():
        best = sorted(logprobs.values())[-2:]
        if len(best) == 2 and best[1] - best[0] < NEAR:
            found[document] = best[1] - best[0]
    return found


def near_tie_notes(records: Sequence[Record], documents: int) -> list[str]:
    """A sentence that names near ties, if any. documents: evaluated documents."""
    found = sorted(near_ties(records).items(), key=lambda item: item[1])
    if not found:
        return []
    names = ", ".join(document for document, _ in found[:5]) + (", ..." if len(found) > 5 else "")
    return [
        f"near ties in {len(found)} of {documents} documents ({names}): the two best choices differ by less than "
        f"{NEAR:g} nats, {found[0][1]:.2g} at least; another batch size, dtype or engine may choose otherwise"
    ]
