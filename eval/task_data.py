"""Rows of a task in YAML: files beside it, or a data set in the folder of `--data`."""

from __future__ import annotations

from pathlib import Path

from align.config.own_task import DATA, TaskData
from align.config.parts import FileSource
from align.data.files import file_chunks
from align.errors import UserError
from align.eval.harness_index import local_dataset
from align.reward.text import Row


def data_place(data: TaskData, task: Path, folder: Path | None) -> tuple[str, str | None]:
    """(path, the command that downloads it if it is missing).

    task: the task's file, to which other paths are relative. folder: of `--data`.
    """
    if not data.path.startswith(DATA):
        return str(task.parent / Path(data.path).expanduser()), None
    if folder is None:
        raise UserError(f"{task}: data.path is '{data.path}', but --data is not set. Pass --data DIR.")
    owner, _, inside = data.path.removeprefix(DATA).partition("/")
    name, _, rest = inside.partition("/")
    found, missing = local_dataset(f"{owner}/{name}", folder)
    if missing is not None and data.download is not None:
        missing = data.download.replace("{folder}", str(folder / owner / name))
    return str(Path(found or "") / rest), missing


def read_rows(data: TaskData, task: Path, folder: Path | None) -> list[Row]:
    """All rows. Raises `UserError` if there are none."""
    source = FileSource(path=data_place(data, task, folder)[0], name=data.name, split=data.split)
    rows = [row for file in source.files().files for chunk in file_chunks(file) for row in chunk.rows()]
    if not rows:
        raise UserError(f"{task}: {source.path} has no rows. Correct data.path.")
    return [dict(row) for row in rows]
