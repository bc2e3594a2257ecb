"""Rows and files."""

from __future__ import annotations

import json

from .here import ANSWERS, Here, wrong


@wrong("bad-line")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + '\n{"messages": [\n')
    return here.run()


@wrong("line-without-columns")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + "\n[1, 2]\n")
    return here.run()


@wrong("missing-column")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.run()


@wrong("renamed-column-missing")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "columns": {"messages": "talk"}}]})


@wrong("empty-data")
def _(here: Here) -> str:
    here.write("rows.jsonl", "\n")
    return here.run()


@wrong("all-truncated")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 8})


@wrong("missing-data-file")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("missing-data-file-checked")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("unknown-data-format")
def _(here: Here) -> str:
    here.write("rows.csv", "a,b\n")
    return here.run(data={"train": [{"kind": "file", "path": "rows.csv"}]})


@wrong("data-set-offline")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "hub", "id": "nobody/nothing"}]})


@wrong("nothing-held-out")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.001})
