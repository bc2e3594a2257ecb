"""Data files and their rows."""

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


@wrong("missing-column", "Columns with other names")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.run()


@wrong("renamed-column-missing", "`columns` with a column that does not exist")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "columns": {"messages": "talk"}}]})


@wrong("empty-data", "A file without rows")
def _(here: Here) -> str:
    here.write("rows.jsonl", "\n")
    return here.run()


@wrong("all-truncated", "Rows whose answers all begin after `data.max_length`")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 8})


@wrong("missing-data-file", "A missing data file")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("missing-data-file-checked", "A missing data file, in `align check`")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("unknown-data-format", "A data file of another format")
def _(here: Here) -> str:
    here.write("rows.csv", "a,b\n")
    return here.run(data={"train": [{"kind": "file", "path": "rows.csv"}]})


@wrong("data-set-offline", "A data set on an unreachable hub", varies=r"(?<=hub: ).+(?=\. Check)")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "hub", "id": "nobody/nothing"}]})


@wrong("nothing-held-out", "Too few rows for a held-out split")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.001})
