"""Find tasks of lm-evaluation-harness by name, and their data on this machine, before any data is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError, missing_dependency

INSTALL = "pip install 'align-moe[eval]'"
LOADERS = {"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset"}
"""Values of dataset_path that name a file format; the files are in dataset_kwargs."""
GROUP_KEYS = {"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"}
"""Keys of a group that are not settings of its members."""


@dataclass(frozen=True)
class Leaf:
    """A task of the harness, without subtasks.

    name: its name. spec: name and settings for the harness. dataset: its dataset_path.
    """

    name: str
    spec: dict[str, Any]
    dataset: str | None


@dataclass(frozen=True)
class Group:
    """A task with subtasks whose scores are aggregated.

    leaves: names of the subtasks. metrics: settings of each aggregated metric.
    """

    name: str
    leaves: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)


class HarnessIndex:
    """The harness's tasks with some names, and those in some files of the user.

    Only the folders that define these names are read. Indexing all of the harness's tasks takes 18 s.
    """

    def __init__(self, names: Sequence[str], files: Sequence[Path] = ()):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise missing_dependency("lm_eval", "a task of lm-evaluation-harness", INSTALL) from error
        for file in files:
            check_yaml(file)
        own = sorted({str(file.parent) for file in files})
        wanted, folders = set(names), set(_folders(sorted(names)))
        while True:
            paths = [*sorted(map(str, folders)), *own]
            self.manager = TaskManager(include_path=paths, include_defaults=False)
            self._entries: dict[str, Any] = self.manager.task_index
            # A group may list tasks of other folders.
            absent = {member for name in wanted for member in self._absent(name)}
            found = set(_folders(sorted(absent))) - folders if absent else set()
            if not found:
                break
            wanted, folders = wanted | absent, folders | found

    def has(self, name: str) -> bool:
        return name in self._entries

    def leaves(self, name: str) -> list[Leaf]:
        """The tasks that `name` stands for: itself, or all subtasks of a group or tag."""
        return list(self._unfold(name, {}))

    def groups(self, name: str) -> list[Group]:
        """The group called `name` and the groups in it, if they aggregate metrics."""
        config = self._config(name)
        if "group" not in config:
            return []
        found = []
        if metrics := config.get("aggregate_metric_list"):
            listed = metrics if isinstance(metrics, list) else [metrics]
            found.append(Group(name, [leaf.name for leaf in self.leaves(name)], listed))
        for child in config.get("task") or []:
            if isinstance(child, str) and child in self._entries:
                found += self.groups(child)
        return found

    def _absent(self, name: str) -> Iterator[str]:
        """Names of tasks that `name`, or a group in it, lists and that are not indexed."""
        if name not in self._entries:
            return
        members = self._config(name).get("task")
        for member in members if isinstance(members, list) else []:
            listed = member if isinstance(member, str) else member.get("group", member.get("task"))
            if isinstance(listed, str) and listed not in self._entries:
                yield listed
            elif isinstance(listed, str):
                yield from self._absent(listed)

    def _config(self, name: str) -> dict[str, Any]:
        return dict(self._entries[name].cfg or {})

    def _unfold(self, name: str, settings: dict[str, Any]) -> Iterator[Leaf]:
        entry, config = self._entries[name], self._config(name)
        if entry.yaml_path is None and entry.tags:
            for member in sorted(entry.tags):
                yield from self._unfold(member, settings)
        elif isinstance(config.get("task"), list):
            yield from self._members(config["task"], {**_for_members(config), **settings})
        else:
            merged = {**config, **settings}
            yield Leaf(name, {**settings, "task": name}, merged.get("dataset_path"))

    def _members(self, members: list[str | dict[str, Any]], settings: dict[str, Any]) -> Iterator[Leaf]:
        for member in members:
            changes = {} if isinstance(member, str) else _for_members(member)
            name = member if isinstance(member, str) else member.get("group", member.get("task"))
            if isinstance(name, str) and name in self._entries:
                yield from self._unfold(name, {**settings, **changes})
            elif isinstance(member, dict) and isinstance(member.get("task"), list):
                yield from self._members(member["task"], {**settings, **changes})
            else:
                raise UserError(f"task '{name}': the harness has no such task, but a group lists it. Choose another.")


def _for_members(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a group that its members inherit."""
    return {key: value for key, value in group.items() if key not in GROUP_KEYS}


def check_yaml(file: Path) -> None:
    """Raise `UserError` for a file with a YAML error, which the harness would skip."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Accepts `!function`."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError:
        raise UserError(f"{file}: no such file. Pass a task's YAML file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file}{place}: not valid YAML ({error.problem}). Correct the file.") from None


def local_dataset(path: str | None, data: Path | None) -> tuple[str | None, str | None]:
    """(dataset_path to load, what is missing) of a task's dataset_path: with `data`, the folder DATA/dataset_path.

    What is missing is given as the command that downloads it. Without `data`, the path is kept, and the library
    for data sets looks in its own cache. The path of a task that makes its own data is None.
    """
    if path is None or path in LOADERS or Path(path).is_absolute() or data is None:
        return path, None
    folder = data / path
    if folder.is_dir():
        return str(folder), None
    return None, f"hf download --repo-type dataset {path} --local-dir {folder}"


def _folders(names: Sequence[str]) -> list[Path]:
    """Folders of the harness whose files define these names, or list them as members of a group or tag."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    wanted = "|".join(re.escape(name) for name in names) or "(?!)"
    # A name may stand alone, or in a list of tags.
    defines = re.compile(rf"^\s*(?:-\s*)?(?:(?:task|group|tag)\s*:\s*)?[\"']?(?:{wanted})[\"']?\s*$", re.MULTILINE)
    found = {file.relative_to(root).parts[0] for file in root.rglob("*.yaml") if defines.search(_text(file))}
    return [root / name for name in sorted(found) if (root / name).is_dir()]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
