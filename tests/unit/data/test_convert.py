"""`align data convert`, and every example and table of docs/data.md."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from align import cli
from align.config.data_files import COMPRESSED, SUFFIXES
from align.config.filters import Filter
from align.config.parts import Data, FileSource
from align.data import shapes
from align.data.convert import canonical
from align.data.shapes.adapt import FORMATS
from align.data.shapes.messages import ROLES

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```\n\nbecomes\n\n```json\n(.*?)```", PAGE, re.DOTALL)


def values(text: str) -> list[Any]:
    """The JSON values of a text, one after another."""
    found, decoder = [], json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def table(heading: str) -> list[list[str]]:
    """Cells of the first table after a text of the page, without its head."""
    lines = PAGE[PAGE.index(heading) :].split("\n|", 1)[1].split("\n\n")[0]
    rows = [line.strip().strip("|").split("|") for line in lines.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize(("given", "expected"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_becomes_what_the_page_says(tmp_path: Path, given: str, expected: str) -> None:
    rows, (form,) = values(given), values(expected)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cli.main(["data", "convert", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found == [form] * len(rows)
    assert canonical(form)[1] == form  # the canonical form stays as it is


def test_the_page_has_an_example_of_every_shape() -> None:
    assert {shapes.shape_of(row) for given, _ in EXAMPLES for row in values(given)} == set(shapes.SHAPES) - {"text"}


def test_the_table_of_roles() -> None:
    names = {
        alias: re.findall(r"`(\w+)`", role)[0]
        for role, others in table("Roles in any case:")
        for alias in re.findall(r"`(\w+)`", role + others)
    }
    assert names == ROLES


def test_the_tables_of_formats_and_files() -> None:
    named = {name for row in table("## Shapes") for name in re.findall(r"`(\w+)`", row[2])}
    assert named == set(FORMATS)
    assert {suffix for row in table("## Files") for suffix in re.findall(r"`(\.\w+)`", row[1])} == set(SUFFIXES)
    assert all(f"`{suffix}`" in PAGE for suffix in COMPRESSED)


@pytest.mark.parametrize(("row", "reason"), table("## What is dropped"))
def test_reasons(row: str, reason: str) -> None:
    with pytest.raises(shapes.DropRow) as dropped:
        canonical(json.loads(row.strip("`")))
    assert str(dropped.value) == reason


def test_settings_of_the_page() -> None:
    recipes = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    assert {key for recipe in recipes for key in recipe["data"]} == {"train", "mixture", "filters"}
    for recipe in recipes:
        Data.model_validate(recipe["data"])
    keys = {key for row in table("## Settings of a source") for key in re.findall(r"`(\w+)`", row[0])}
    assert keys <= set(FileSource.model_fields)


# --- the command ------------------------------------------------------------------------------------------


def test_the_page_lists_every_filter() -> None:
    kinds = {kind for row in table("## Filters") for kind in re.findall(r"`(\w+)`", row[0])}
    assert kinds == {get_args(model.model_fields["kind"].annotation)[0] for model in get_args(get_args(Filter)[0])}


def test_a_folder_of_several_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    talk = [{"from": "human", "value": "Hi"}, {"from": "Doctor", "value": "Hello.", "id": 3}]
    with (tmp_path / "in" / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["conversations", "note", "drop"], [json.dumps(talk), "n", "x"]])
    pq.write_table(pa.table({"q": ["Hi"], "a": [3]}), tmp_path / "in" / "b.parquet")
    bad = {"q": "Hi", "a": " "}
    (tmp_path / "in" / "more" / "c.json").write_text(json.dumps([bad, bad]), encoding="utf-8")
    command = ["data", "convert", str(tmp_path / "in"), str(tmp_path / "out.jsonl"), "--ignore", "drop"]
    cli.main([*command, "--columns", "prompt=q", "completion=a", "--roles", "Doctor=assistant"])
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"messages": [user, assistant], "note": "n"},
        {"prompt": [user], "completion": [{"role": "assistant", "content": "3"}]},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "4 rows read, 2 written (1 messages, 1 prompt_completion)",
        f"2 dropped: empty assistant turn (first: {tmp_path}/in/more/c.json line 1)",
        "columns that no shape reads, by rows: conversations[].id (1), note (1)",
    ]


def test_nothing_is_written_if_a_line_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{', encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["data", "convert", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
