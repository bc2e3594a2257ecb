"""Reading files. Witnesses: the `json` and `csv` modules, pyarrow's and `datasets`' own readers."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config.data_files import list_files, split_of
from align.data.files import CHUNK_BYTES, MAX_ROW_BYTES, chunks
from align.data.rows import Unreadable
from align.errors import UserError

NESTED = [
    {"messages": [{"role": "user", "content": "Zürich 🌧"}], "n": 2**70, "x": {"a": None, "b": [1, 2.5, "1"]}},
    {"messages": [{"role": "user", "content": "b", "extra": {"n": "one"}}], "other": True},
]
FLAT = [{"prompt": 'He said "1,\n2"', "completion": "ü; \t|"}, {"prompt": " b ", "completion": ""}]


def read(path: Path, *splits: str) -> list[dict[str, Any]]:
    """All rows of a path, each chunk through pickle as for a worker process."""
    return [row for chunk in chunks(path, splits) for row in pickle.loads(pickle.dumps(chunk)).rows()]


def lines(rows: list[Any], **options: Any) -> bytes:
    return b"".join(json.dumps(row, **options).encode() + b"\n" for row in rows)


# --- JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(NESTED)),
        ("a.jsonl", lines(NESTED, ensure_ascii=False).rstrip()),
        ("a.ndjson", b"\n \n" + lines(NESTED).replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(NESTED)),
        ("a.jsonl", lines(NESTED, ensure_ascii=False).decode().encode("utf-16")),
        ("a.jsonl", lines(NESTED, ensure_ascii=False).decode().encode("utf-32")),
        ("a.json", json.dumps(NESTED).encode()),
        ("a.json", json.dumps(NESTED, indent=2, ensure_ascii=False).encode()),
        ("a.jsonl", json.dumps(NESTED).encode()),
        ("a.json", lines(NESTED)),
        ("a.json", lines(NESTED, indent=1)),
        ("a.jsonl.gz", gzip.compress(lines(NESTED[:1])) + gzip.compress(lines(NESTED[1:]))),
        ("a.json.bz2", bz2.compress(json.dumps(NESTED).encode())),
        ("A.JSONL.XZ", lzma.compress(lines(NESTED))),
        ("a.jsonl.zst", pa.compress(lines(NESTED), codec="zstd", asbytes=True)),
        ("a.jsonl", gzip.compress(lines(NESTED))),
    ],
)
def test_json_files_give_the_objects_as_they_are_written(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == NESTED
    assert read(tmp_path) == NESTED


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_across_blocks_and_large_rows(tmp_path: Path, indent: int | None) -> None:
    rows = [{"text": chr(97 + n % 26) * (n * 997 % 5000) + '"\\[{é', "n": n} for n in range(1500)]
    rows.insert(700, {"text": "[" * (3 * CHUNK_BYTES), "n": -1})
    (tmp_path / "a.jsonl").write_bytes(lines(rows, ensure_ascii=False))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    for name in ("a.jsonl", "b.json"):
        parts = list(chunks(tmp_path / name))
        assert [row for part in parts for row in part.rows()] == rows
        assert len(parts) > 3
        assert sorted(len(pickle.dumps(part)) for part in parts)[-2] < 1.1 * CHUNK_BYTES
    number = next(i for i, row in enumerate(parts[1].rows()) if row)
    assert parts[0].where(0) == f"{tmp_path / 'b.json'} line {1 if indent is None else 2}"
    assert parts[1].where(number).startswith(f"{tmp_path / 'b.json'} line ")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    row = lines([{"text": "x" * 10_000}])
    (tmp_path / "a.jsonl").write_bytes(row * 2000)
    (tmp_path / "b.json").write_bytes(b"[" + row.strip() + (b"," + row.strip()) * 1999 + b"]")
    for name in ("a.jsonl", "b.json"):
        tracemalloc.start()
        assert sum(1 for _ in chunks(tmp_path / name)) > 15
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * CHUNK_BYTES  # the files have 20 MB


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"text": "a", "u": "\\ud83d"}', "has half of a surrogate pair"),
        (b'{"text": "a", "u": {"\\ud83d": 1}}', "has half of a surrogate pair"),
        (b'{"text": "a", "u": "\xe9"}', "is not UTF-8"),
        (b'{"text": "a", "u": ' + b"[" * 5000 + b"]" * 5000 + b"}", "is nested too deeply"),
        (b'{"text": "a", "u": {"k": 1, "k": 2}}', "has an object with the same key twice"),
        (b'{"u": 1, "text": "a", "u": 2}', "occurs twice"),
        (b'{"text": "a", "u": ' + b"9" * 5000 + b"}", "has a number of more than 4,300 digits"),
    ],
)
def test_a_column_that_cannot_be_read_leaves_the_others(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + data + b"\n")
    (row,) = read(tmp_path)
    assert row["text"] == "a"
    assert isinstance(row["u"], Unreadable)
    assert str(row["u"].refusal("u")).startswith(f"{tmp_path / 'a.jsonl'} line 2: the column 'u' {problem}")


def test_numbers_are_exact(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 18446744073709551616, "b": -0.0, "c": 1e3, "d": NaN, "e": 1.10}')
    (row,) = read(tmp_path)
    assert (row["a"], str(row["b"]), row["c"], str(row["d"]), row["e"]) == (2**64, "-0.0", 1000.0, "nan", 1.1)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "line 2: not valid JSON (Expecting value at column 7)"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2: a list, but a row must be a JSON object"),
        ("a.jsonl", b"{}\n", "line 1: an empty object"),
        ("a.jsonl", b'{"\xe9": 1}', "line 1: not UTF-8 (invalid continuation byte at byte 2)"),
        ("a.jsonl", b'\xff\xfe{\x00"', "line 1: not valid UTF-16"),
        ("a.jsonl", b'{"a": 1} {"b": 2}', "line 1: not valid JSON (Extra data at column 10)"),
        ("a.json", b'[{"a": 1},\n {"a": 2}\n', "line 3: not valid JSON (the array has no end)"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "line 2: not valid JSON (Expecting ',' or ']' after an element)"),
        ("a.json", b'[{"a": 1},\n {"a": "', "line 2: not valid JSON (the file ends inside a value)"),
        ("a.json", b'[{"a": 1},\n]', "line 2: not valid JSON (Expecting value, found ']')"),
        ("a.json", b'[{"a": 1}]\n[', "line 2: not valid JSON (text after the array)"),
        ("a.json", b'[{"a": 1},\n 3]', "line 2: a int, but a row must be"),
        ("a.jsonl.gz", gzip.compress(lines(NESTED) * 1000)[:-20], "the compressed data is damaged or truncated"),
        ("a.jsonl.zst", pa.compress(lines(NESTED) * 1000, "zstd", asbytes=True)[:-9], "damaged or truncated"),
        ("a.csv", b"a,b\n1\n", "line 2: 1 values, but the first line names 2 columns"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', "line 3: not valid CSV (unexpected end of data)"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.arrow", b"ARROW1", "not a readable Arrow file"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert sentence in str(error.value)


def test_a_row_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(4 * MAX_ROW_BYTES)  # zeros that take no disk space
    with pytest.raises(UserError, match="line 1: a row of more than 64 MiB"):
        read(tmp_path / "a.jsonl")


# --- CSV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_csv_files_are_read_as_by_the_csv_module(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = FLAT * 20_000
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    parts = list(chunks(tmp_path / name))
    assert [row for part in parts for row in part.rows()] == rows
    assert len(parts) > 1
    assert parts[0].where(1) == f"{tmp_path / name} line 4"  # the first record has a line break


def test_csv_columns_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b",a,b,b\n0,x,1,2\n1,\xe9,1,2\n")
    first, second = read(tmp_path)
    assert (first["column 1"], first["a"], type(first["b"])) == ("0", "x", Unreadable)
    assert str(second["a"].refusal("a")).startswith(f"{tmp_path / 'a.csv'} line 3: the column 'a' is not UTF-8")


# --- Parquet and Arrow ------------------------------------------------------------------------------------


@pytest.fixture
def table() -> pa.Table:
    """A table in which Arrow gives every tool call the arguments of all others."""
    calls = [{"city": "Rome"}, {"a": 1, "b": 2}]
    rows = [{"text": f"{n}" * 200, "calls": [{"args": calls[n % 2], "json": '{"x": null}'}]} for n in range(6000)]
    return pa.Table.from_pylist([{**row, "empty": None} for row in rows])


def _expected(number: int) -> dict[str, Any]:
    arguments = {"city": "Rome"} if number % 2 == 0 else {"a": 1, "b": 2}
    return {"text": f"{number}" * 200, "calls": [{"args": arguments, "json": '{"x": null}'}], "empty": None}


def test_parquet_and_arrow_files_without_the_keys_that_arrow_adds(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2500)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2000)
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        parts = list(chunks(tmp_path / name))
        rows = [row for part in parts for row in part.rows()]
        assert rows == [_expected(number) for number in range(6000)]
        assert max(len(pickle.dumps(part)) for part in parts) < 2 * CHUNK_BYTES
        assert parts[1].where(0) == f"{tmp_path / name} row {len(parts[0].rows()) + 1}"


def test_a_folder_that_datasets_saved(tmp_path: Path, table: pa.Table) -> None:
    saved = datasets.Dataset(table.slice(0, 100))
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-1234.arrow").write_bytes(b"not read")
    assert [row["text"] for row in read(tmp_path / "one")] == datasets.load_from_disk(tmp_path / "one")["text"][:]
    datasets.DatasetDict({"train": saved, "test": saved.select(range(2))}).save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both", "train")) == 100
    assert len(read(tmp_path / "both", "test")) == 2
    assert len(read(tmp_path / "both", "train", "test")) == 102


def test_values_that_arrow_has_and_json_lacks(tmp_path: Path) -> None:
    wide = pa.array([2**62, 1], pa.timestamp("s"))  # a year that Python does not have
    maps = pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string()))
    table = pa.table({"text": ["a", "b"], "when": wide, "map": maps})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    first, second = read(tmp_path)
    assert (first["text"], first["map"], second["map"]) == ("a", {"k": "v"}, {})
    assert isinstance(first["when"], Unreadable)
    assert second["when"].year == 1970


# --- folders, patterns, splits ----------------------------------------------------------------------------


def _files(root: Path, names: str) -> None:
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(lines([{"text": name}]))


def test_folders_are_read_with_their_subfolders_and_other_files_are_listed(tmp_path: Path) -> None:
    _files(tmp_path, "b.jsonl a/2.jsonl a/1.json.gz a/deep/x.csv README.md a/run.sh .git/x.jsonl dataset_info.json")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = list_files(tmp_path)
    relative = [[str(file.relative_to(tmp_path)) for file in files] for files in (found.files, found.others)]
    assert relative == [
        ["a/1.json.gz", "a/2.jsonl", "a/deep/x.csv", "b.jsonl"],
        ["README.md", "a/run.sh", "dataset_info.json"],
    ]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _files(tmp_path, "x/1.jsonl x/2.jsonl x/y/3.jsonl z/4.jsonl z/n.txt [1].jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern, expected in [
        (f"{tmp_path}/x/*.jsonl", ["x/1.jsonl", "x/2.jsonl"]),
        (f"{tmp_path}/**/*.jsonl", ["[1].jsonl", "x/1.jsonl", "x/2.jsonl", "x/y/3.jsonl", "z/4.jsonl"]),
        ("~/z*", ["z/4.jsonl"]),
        ("~/x/?.jsonl", ["x/1.jsonl", "x/2.jsonl"]),
        (f"{tmp_path}/[1].jsonl", ["[1].jsonl"]),  # a file with this name comes first
    ]:
        assert [str(file.relative_to(tmp_path)) for file in list_files(pattern).files] == expected
    with pytest.raises(UserError, match=r"nothing\*: no data file"):
        list_files(f"{tmp_path}/nothing*")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00001-a1b2.parquet", "train_sft"),
        ("dev.jsonl", "validation"),
        ("my-test-set.csv", "test"),
        ("validation/part1.jsonl", "validation"),
        ("data_eval.json", "test"),
        ("rows.jsonl", None),
        ("latest.jsonl", None),
        ("training_data/a.jsonl", "train"),
    ],
)
def test_the_split_of_a_file(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_splits_are_never_mixed_silently(tmp_path: Path) -> None:
    _files(tmp_path, "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl data/test-00000-of-00001.jsonl")
    with pytest.raises(UserError, match=r"it has the splits test, train. Name those to read, .*`split: train`"):
        read(tmp_path)
    assert [row["text"][5:10] for row in read(tmp_path, "train")] == ["train", "train"]
    assert len(read(tmp_path, "train", "test")) == 3
    with pytest.raises(UserError, match="no files of the split 'dev'; its splits are test, train"):
        read(tmp_path, "dev")
    found = list_files(tmp_path, ["test"])
    assert [len(found.files), len(found.others)] == [1, 2]


# --- configurations that README.md names ------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/part-*.jsonl
  - split: test
    path: [chat/extra.jsonl]
- config_name: code
  data_files: "code/**/*.jsonl"
- config_name: plain
  data_dir: other
---
# A data set
"""


def _named(root: Path, *splits: str, name: str | None = None) -> list[str]:
    return [str(file.relative_to(root)) for file in list_files(root, splits, name).files]


def test_the_configurations_of_a_data_set_are_read_by_its_readme(tmp_path: Path) -> None:
    _files(tmp_path, "chat/part-1.jsonl chat/part-2.jsonl chat/extra.jsonl code/a/b.jsonl other/test.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert _named(tmp_path, "train", name="chat") == ["chat/part-1.jsonl", "chat/part-2.jsonl"]
    assert _named(tmp_path, "test", name="chat") == ["chat/extra.jsonl"]  # the file's name says otherwise
    assert _named(tmp_path, name="code") == ["code/a/b.jsonl"]
    assert _named(tmp_path, "train", name="code") == ["code/a/b.jsonl"]  # files without a split are of `train`
    assert _named(tmp_path, name="plain") == ["other/test.jsonl"]
    assert len(list_files(tmp_path, ["test"], "chat").others) == 5
    for arguments, message in (
        (((), None), "it has the configurations chat, code, plain. Set `name` to one of them."),
        (((), "chart"), "it has no configuration 'chart'; those it has are chat, code, plain. Correct `name`."),
        (((), "chat"), "it has the splits test, train. Name those to read"),
        ((("dev",), "chat"), "no files of the split 'dev'; its splits are test, train."),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            list_files(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("configs", "read"),
    [
        ("[{data_files: a.jsonl}]", ["a.jsonl"]),
        ("[{config_name: x, data_files: [a.jsonl, b.jsonl]}]", ["a.jsonl", "b.jsonl"]),
        ("[{config_name: x, data_files: {train: b.jsonl}}]", ["b.jsonl"]),
        ("[{config_name: x, data_files: a.jsonl}, {config_name: default, data_files: b.jsonl}]", ["b.jsonl"]),
        ("[{config_name: x, data_files: a.jsonl, default: true}, {config_name: y, data_files: b.jsonl}]", ["a.jsonl"]),
        ("[{config_name: x, data_dir: d, data_files: '*.jsonl'}]", ["d/c.jsonl"]),
    ],
)
def test_forms_of_configurations(tmp_path: Path, configs: str, read: list[str]) -> None:
    _files(tmp_path, "a.jsonl b.jsonl d/c.jsonl")
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    assert _named(tmp_path) == read


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nconfigs: [\n---\n", "README.md: `configs` is not valid YAML"),
        ("---\nconfigs: 3\n---\n", "`configs` is not a list of configurations"),
        ("---\nconfigs: [{config_name: 3}]\n---\n", "a configuration whose name or folder is not text"),
        (
            "---\nconfigs: [{data_files: [{split: 3}]}]\n---\n",
            "data files of 'default' that are not a split and its paths",
        ),
        ("---\nconfigs: [{data_files: gone.jsonl}]\n---\n", "no file matches 'gone.jsonl', which README.md names"),
        ("---\nconfigs: [{data_files: notes.md}]\n---\n", "notes.md: its format is none of"),
    ],
)
def test_damaged_configurations(tmp_path: Path, card: str, message: str) -> None:
    _files(tmp_path, "a.jsonl notes.md")
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(UserError, match=re.escape(message)):
        list_files(tmp_path)


def test_a_readme_without_configurations_changes_nothing(tmp_path: Path) -> None:
    _files(tmp_path, "a.jsonl")
    for text in ("# Title", "---\nlicense: [\n---\n", "---\nlicense: mit\n---\n", "---\nno end"):
        (tmp_path / "README.md").write_text(text)
        assert _named(tmp_path) == ["a.jsonl"]
    with pytest.raises(UserError, match=re.escape("`name` is 'x', but no README.md there lists configurations")):
        list_files(tmp_path, name="x")
