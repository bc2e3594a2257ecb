"""Counts of rows and tokens of a stage's data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.data.store.entry import Entry
from align.data.store.tokenised import TokenisedRows

HELD_OUT_ONCE = "repeats a held-out row"
"""Reason of the further passes over a row that is held out."""
REASONS = 20
"""Most frequent reasons that are printed; names of roles or columns may give each row a reason of its own."""


@dataclass(frozen=True)
class DataReport:
    """Counts of rows and tokens.

    rows_read      all rows of the sources, in the order and with the repetitions of the mixture
    rows_train     rows in the training split; for pretraining, documents
    rows_held_out  rows in the held-out split; for pretraining, documents
    dropped        {reason: rows dropped}, over both splits; includes further passes over held-out rows
    truncated      rows truncated to the maximum length, over both splits
    split          conversations that became several rows, because the chat template renders earlier turns differently
                   once others follow; pairs that became two labelled rows; over both splits
    tokens         tokens of the training rows; prompts of reward-model pairs count twice
    loss_tokens    training tokens in the loss, without each row's first token; for pairs, the tokens of both answers
    fingerprint    SHA-256 over hashes of the ids and labels of all rows in order, training rows first
    sources        per training source: its name, and its training rows and tokens
    escaped        rows of the files with a text that would have become a control token
    unused_columns {column: rows that have it} of columns that the stage does not read
    unread_files   {source: files of its folder that are not read: of other formats, or of other splits}
    unmatched      {setting of a source: rows in which no column or role has the name that it has}
    too_short      {evaluation set: items with too few words to be found by the filter of contamination}
    desirable      desirable training rows, of rows with a label
    undesirable    undesirable training rows, of rows with a label
    held_out_seen  held-out rows among `rows_read` of a stream; `rows_held_out` are those of `held_out_from`
    held_out_from  rows of a stream among which `held_out_fraction` found `rows_held_out`
    notes          sentences about the training rows
    """

    rows_read: int
    rows_train: int
    rows_held_out: int
    dropped: dict[str, int]
    truncated: int
    tokens: int
    loss_tokens: int
    fingerprint: str
    split: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    escaped: int = 0
    unused_columns: dict[str, int] = field(default_factory=dict)
    unread_files: dict[str, list[str]] = field(default_factory=dict)
    unmatched: dict[str, int] = field(default_factory=dict)
    too_short: dict[str, int] = field(default_factory=dict)
    desirable: int = 0
    undesirable: int = 0
    held_out_seen: int = 0
    held_out_from: int = 0
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """True if the rows have a label."""
        return self.desirable + self.undesirable > 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    def summary(self) -> str:
        """One line for the terminal."""
        if self.loss_tokens:
            labels = f"{self.desirable:,} desirable, {self.undesirable:,} undesirable; " if self.labelled else ""
            tokens = f"{self.tokens:,} tokens, {self.loss_tokens:,} in the loss"
            parts = [f"{self.rows_train:,} training rows ({labels}{tokens})"]
        else:
            parts = [f"{self.rows_train:,} prompts ({self.tokens:,} tokens)"]
        if self.held_out_from:
            parts.append(f"{self.held_out_seen:,} held out")
        elif self.rows_held_out:
            parts.append(f"{self.rows_held_out:,} held out")
        if self.split:
            what = "pairs trained as two rows each" if self.labelled else "conversations trained as several rows"
            parts.append(f"{self.split:,} {what}")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        common = Counter(self.dropped).most_common(REASONS)
        parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(common)]
        if others := sum(self.dropped.values()) - sum(count for _, count in common):
            parts.append(f"{others:,} dropped for {len(self.dropped) - REASONS:,} other reasons")
        if self.escaped:
            parts.append(f"{self.escaped:,} with the name of a control token in a text")
        if self.unused_columns:
            parts.append(f"columns not used: {', '.join(sorted(self.unused_columns))}")
        parts += [f"{len(files):,} other files in {source}" for source, files in self.unread_files.items()]
        parts += [f"{setting}: no row has it" for setting in self.unmatched]
        parts += [f"{count:,} items of {name} are too short to be found" for name, count in self.too_short.items()]
        if len(self.sources) > 1 and self.tokens:
            shares = (f"{source['name']} {source['tokens'] / self.tokens:.1%}" for source in self.sources)
            parts.append(f"tokens from {', '.join(shares)}")
        apart = [self.held_out_apart()] if self.held_out_from else []
        return "; ".join([f"{self.rows_read:,} rows read: " + ", ".join(parts), *apart, *self.notes])

    def held_out_apart(self) -> str:
        """The held-out rows of a stream, with the rows that they come from."""
        return f"evaluated: {self.rows_held_out:,} held out of the first {self.held_out_from:,} rows"


def make_report(
    read: Sequence[TokenisedRows], train: TokenisedRows, held_out: TokenisedRows | None, *, all_columns: bool = False
) -> DataReport:
    """The report of a training and a held-out split.

    read: the rows before the split, and those of the held-out sources.
    all_columns: every column is used, as in prompts, whose rows reach the reward functions.
    """
    splits = [train] if held_out is None else [train, held_out]
    digest, labels = hashlib.sha256(), train.labels()
    for rows in splits:
        digest.update(rows.tokens["digest"].tobytes())
    dropped = sum((rows.dropped() for rows in read), Counter[str]())
    if repeated := sum(rows.used() for rows in read) - sum(rows.used() for rows in splits):
        dropped[HELD_OUT_ONCE] += repeated
    return DataReport(
        rows_read=sum(len(rows.order) for rows in read),
        rows_train=len(train.tokens),
        rows_held_out=0 if held_out is None else len(held_out.tokens),
        dropped=dict(sorted(dropped.items())),
        truncated=sum(int(rows.tokens["truncated"].sum()) for rows in splits),
        tokens=int(train.tokens["tokens"].sum()),
        loss_tokens=int(train.tokens["loss"].sum()),
        fingerprint=digest.hexdigest(),
        split=sum(int(rows.tokens["split"].sum()) for rows in splits),
        sources=_by_source(train),
        escaped=sum(entry.escaped for entry in _entries(read)),
        unused_columns={} if all_columns else _unused(read),
        unread_files={r.name: [file.name for file in r.others] for rows in read for r in rows.readings if r.others},
        unmatched=_unmatched(read),
        too_short={name: count for entry in _entries(read) for name, count in entry.too_short.items()},
        desirable=0 if labels is None else int(labels.sum()),
        undesirable=0 if labels is None else int((~labels).sum()),
    )


def _by_source(train: TokenisedRows) -> list[dict[str, Any]]:
    rows = np.bincount(train.sources(), minlength=len(train.names))
    tokens = np.bincount(train.sources(), train.tokens["tokens"], minlength=len(train.names))
    return [
        {"name": name, "rows": int(count), "tokens": int(total)}
        for name, count, total in zip(train.names, rows, tokens, strict=True)
    ]


def _entries(read: Sequence[TokenisedRows]) -> list[Entry]:
    return list({entry.folder: entry for rows in read for entry in rows.entries}.values())


def _unused(read: Sequence[TokenisedRows]) -> dict[str, int]:
    columns: Counter[str] = Counter()
    for entry in _entries(read):
        columns.update(entry.unused)
    return dict(sorted(columns.items()))


def _unmatched(read: Sequence[TokenisedRows]) -> dict[str, int]:
    """{setting of a source: its rows}, for the settings that name a column or role which none of its rows has."""
    found: dict[str, int] = {}
    for rows in read:
        for reading, entry in zip(rows.readings, rows.entries, strict=True):
            missing = [name for name in reading.names if not entry.names.get(name)]
            found |= {f"{name} ({reading.name})": len(entry.rows) for name in missing}
    return found
