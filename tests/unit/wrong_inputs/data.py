"""Rows and files."""

from __future__ import annotations

import json

from .here import ANSWERS, Here, wrong


@wrong("bad-line", "A line that is not JSON")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + '\n{"messages": [\n')
    return here.run()


@wrong("line-without-columns", "A line that is not an object")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + "\n[1, 2]\n")
    return here.run()


@wrong("missing-column", "The columns have other names")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.run()


@wrong("renamed-column-missing", "`columns` names a column that is not there")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "columns": {"messages": "talk"}}]})


@wrong("empty-data", "A file without rows")
def _(here: Here) -> str:
    here.write("rows.jsonl", "\n")
    return here.run()


@wrong("all-truncated", "Every row is cut off before its answer")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 8})


@wrong("missing-data-file", "No such file")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("missing-data-file-checked", "The same, from `align check`")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("unknown-data-format", "A file of another format")
def _(here: Here) -> str:
    here.write("rows.csv", "a,b\n")
    return here.run(data={"train": [{"kind": "file", "path": "rows.csv"}]})


@wrong("data-set-offline", "A hub's data set that cannot be reached", varies=r"(?<=hub: ).+(?=\. Check)")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "hub", "id": "nobody/nothing"}]})


@wrong("nothing-held-out", "Too few rows to hold some back")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.001})
