"""Read the sources of a recipe into one data set.

Rows are checked when they are read, so that a bad line is reported before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from align.config.parts import FileSource, HubSource, PythonDocsSource, Source, StageSource
from align.config.paths import local_path
from align.data.formats import STANDARD_COLUMNS, TEMPLATE_COLUMNS, Format, require_format
from align.data.python_docs import python_docs_rows
from align.errors import UserError

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
SHUFFLE_BUFFER = 10_000
"""Rows in the shuffle buffer of a streaming source."""


def load_rows(
    sources: Sequence[Source],
    *,
    seed: int,
    stage_dirs: Mapping[str, Path] | None = None,
    accepted: Sequence[Format] | None = None,
) -> Rows:
    """The mixture of `sources`, shuffled with `seed`; an IterableDataset if every source streams.

    `limit` applies after the source is shuffled. If no source sets a weight, sources are concatenated and each row
    occurs once. If any source sets a weight, rows are drawn with probabilities proportional to the weights (default 1)
    until one source is exhausted. The shares are then exact in expectation and no row is repeated, but rows of the
    other sources may be unused. Formats may be mixed; columns that a source lacks are None.

    accepted: each source must have the columns of one of these formats. Raises `UserError` if a source is unreadable.
    """
    loaded = [_prepared_source(source, seed, stage_dirs or {}, accepted) for source in sources]
    if not all(isinstance(rows, datasets.IterableDataset) for rows in loaded):
        loaded = [_in_memory(rows) for rows in loaded]
    if len(loaded) == 1:
        return loaded[0]
    try:
        if any("weight" in source.model_fields_set for source in sources):
            total = sum(source.weight for source in sources)
            shares = [source.weight / total for source in sources]
            mixed = datasets.interleave_datasets(
                loaded, probabilities=shares, seed=seed, stopping_strategy="first_exhausted"
            )
        else:
            mixed = _shuffled(datasets.concatenate_datasets(loaded), seed)
    except (ValueError, pa.ArrowException) as error:
        names = ", ".join(describe_source(source) for source in sources)
        raise UserError(
            f"{names}: these sources cannot be mixed, because a column is text in one and messages in another "
            f"({error}). Convert one of them."
        ) from error
    return mixed


def describe_source(source: Source) -> str:
    """Short name of a source for messages: its path, hub id or kind."""
    match source:
        case FileSource():
            return source.path
        case HubSource():
            return source.id
        case PythonDocsSource():
            return f"python_docs ({source.view}, {source.split})"
        case StageSource():
            return f"stage {source.stage} ({source.split})"


def _prepared_source(source: Source, seed: int, stage_dirs: Mapping[str, Path], accepted: Any) -> Rows:
    rows, name = _read_source(source, stage_dirs), describe_source(source)
    if isinstance(source, FileSource | HubSource) and source.columns:
        rows = _rename(rows, source.columns, name)
    columns = rows.column_names or list(next(iter(rows), {}))
    if not columns or (isinstance(rows, datasets.Dataset) and len(rows) == 0):
        raise UserError(f"{name}: the source has no rows; set another source.")
    if "messages" not in columns and "conversations" in columns:  # ShareGPT's name for the column
        rows = rows.rename_column("conversations", "messages")
        columns = ["messages" if column == "conversations" else column for column in columns]
    if accepted is not None:
        require_format(columns, accepted, name)
    rows = _shuffled(rows, seed)
    if source.limit is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(source.limit)
    return rows.select(range(min(source.limit, len(rows))))


def _read_source(source: Source, stage_dirs: Mapping[str, Path]) -> Rows:
    match source:
        case FileSource():
            return _read_files(local_path(source.path), source.streaming)
        case HubSource():
            return _read_hub(source)
        case PythonDocsSource():
            return rows_to_dataset(python_docs_rows(source.view, source.split, source.max_answer_chars), "python_docs")
        case StageSource():
            if source.stage not in stage_dirs:
                known = ", ".join(sorted(stage_dirs)) or "none"
                raise UserError(f"stage '{source.stage}': it has no rows yet; the stages with rows are {known}.")
            path = Path(stage_dirs[source.stage]) / "data" / f"{source.split}.jsonl"
            if not path.is_file():
                raise UserError(f"stage '{source.stage}': {path} does not exist; run that stage first.")
            return _read_files(path, streaming=False)


def _read_hub(source: HubSource) -> Rows:
    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, unknown configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"data set '{source.id}', split '{source.split}': cannot be loaded from the Hugging Face hub: {reason}. "
            "Check the id and the network, or download the data set and use a `file` source."
        ) from error


# --- files ------------------------------------------------------------------------------------------------


def _read_files(path: Path, streaming: bool) -> Rows:
    files = _data_files(path)
    jsonl = [file for file in files if file.suffix != ".parquet"]
    if jsonl and len(jsonl) < len(files):
        raise UserError(
            f"{path}: the folder has both JSONL and Parquet files; set path to one file, or use two sources."
        )
    if jsonl:
        if streaming:
            return datasets.IterableDataset.from_generator(read_jsonl, gen_kwargs={"files": jsonl})
        return rows_to_dataset(list(read_jsonl(jsonl)), str(path))
    try:
        if streaming:
            names = [str(file) for file in files]
            return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        tables = [datasets.Dataset(InMemoryTable(pq.read_table(file))) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); write it again.") from error
    return datasets.concatenate_datasets(tables)


def _data_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet") and p.is_file())
        if not files:
            raise UserError(f"{path}: the folder has no *.jsonl or *.parquet file; set another path.")
        return files
    if not path.is_file():
        raise UserError(f"{path}: does not exist (paths are relative to {Path.cwd()}); correct the path.")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise UserError(f"{path}: neither .jsonl nor .parquet; convert it to one of them.")
    return [path]


def read_jsonl(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSONL files; blank lines are skipped. Raises `UserError` with file and line number for an
    invalid line, and for one whose standard columns differ from those of the first."""
    expected: set[str] | None = None
    first = ""
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file} line {number}"
                row = _parsed_line(line, where)
                standard = STANDARD_COLUMNS.intersection(row)
                if expected is None:
                    expected, first = set(standard), where
                elif standard != expected:
                    raise UserError(
                        f"{where}: the columns {', '.join(sorted(row))} differ from those of {first}: "
                        f"{', '.join(sorted(expected ^ standard))} is in one of them only. Give both the same columns."
                    )
                yield row


def _parsed_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); correct or remove the line."
        ) from error
    if not isinstance(row, dict) or not row:
        kind = "an empty object" if row == {} else f"a {type(row).__name__}"
        raise UserError(
            f"{where}: {kind}, but each line must be a JSON object with named columns; correct or remove it."
        )
    return row


def rows_to_dataset(rows: Sequence[Mapping[str, Any]], name: str) -> datasets.Dataset:
    """Dataset in memory with the union of the rows' columns. Raises `UserError` if there are no rows or a standard
    column mixes types."""
    if not rows:
        raise UserError(f"{name}: the source has no rows; set another source.")
    columns = dict.fromkeys(column for row in rows for column in row)
    arrays = {}
    for column in columns:
        values = [_portable(row.get(column), column) for row in rows]
        try:
            arrays[column] = pa.array(values)
        except pa.ArrowException as error:
            if column in STANDARD_COLUMNS:
                raise UserError(f"{name}: the column '{column}' mixes types ({error}); write one type.") from error
            # No data format needs the other columns, so one with mixed types is stored as JSON text.
            arrays[column] = pa.array([json.dumps(value) for value in values])
    return datasets.Dataset(InMemoryTable(pa.table(arrays)))


def _portable(value: Any, column: str) -> Any:
    """The value with objects of free form as JSON text: template variables, tools, and the arguments of tool calls.

    In Arrow every object of a column has the same keys and types.
    """
    if column in TEMPLATE_COLUMNS:
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list) or not any(isinstance(m, dict) and m.get("tool_calls") for m in value):
        return value
    return [_portable_message(message) for message in value]


def _portable_message(message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_portable_call(call) for call in calls]}


def _portable_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _portable_call(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call


# --- shaping ----------------------------------------------------------------------------------------------


def _rename(rows: Rows, columns: Mapping[str, str], name: str) -> Rows:
    present = rows.column_names or list(next(iter(rows), {}))
    missing = sorted(set(columns.values()) - set(present))
    if missing:
        raise UserError(
            f"{name}: `columns` refers to {', '.join(missing)}, but the source's columns are "
            f"{', '.join(sorted(present))}; correct `columns`."
        )
    moved = {old: new for new, old in columns.items() if old != new}
    hidden = [new for new in moved.values() if new in present and new not in moved]  # replaced by a renamed column
    return rows.remove_columns(hidden).rename_columns(moved)


def _shuffled(rows: Rows, seed: int) -> Rows:
    if isinstance(rows, datasets.IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return rows.shuffle(seed=seed, keep_in_memory=True)


def _in_memory(rows: Rows) -> datasets.Dataset:
    """The rows in memory. A streaming source is read completely, so that it can be mixed with sources in memory."""
    return rows if isinstance(rows, datasets.Dataset) else rows_to_dataset(list(rows), "streaming source")
