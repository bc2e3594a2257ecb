"""The configurations that the README.md of a data set names, as the Hugging Face hub writes them:

---
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/train-*.parquet
  - split: test
    path: chat/test.jsonl
---
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError

CARD = "README.md"
DEFAULT = "default"


@dataclass(frozen=True)
class Configuration:
    """One configuration of a data set.

    name     its name
    folder   the folder of its files, if it names no files
    splits   {split: patterns of its files, relative to the folder of the data set}; empty if it names no files
    default  True if it is used unless another one is named
    """

    name: str
    folder: str
    splits: Mapping[str, tuple[str, ...]]
    default: bool


def configurations(folder: Path) -> list[Configuration]:
    """The configurations of the data set in a folder; none if its README.md names none, or there is no README.md.

    Raises `UserError` for a README.md whose `configs` cannot be read.
    """
    listed = _front_matter(folder / CARD).get("configs")
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise _wrong(folder, "is not a list of configurations")
    return [_configuration(entry, folder) for entry in listed]


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines `---`; empty if there is none."""
    try:
        lines = card.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"), 0)
    text = "\n".join(lines[1:end])
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        if not any(line.startswith("configs:") for line in lines[1:end]):
            return {}
        raise _wrong(card.parent, "is not valid YAML") from None
    return found if isinstance(found, Mapping) else {}


def _configuration(entry: Mapping[str, Any], folder: Path) -> Configuration:
    name, inner, files = entry.get("config_name", DEFAULT), entry.get("data_dir", ""), entry.get("data_files")
    if not isinstance(name, str) or not isinstance(inner, str):
        raise _wrong(folder, "has a configuration whose name or folder is not text")
    splits: dict[str, tuple[str, ...]] = {}
    if isinstance(files, Mapping):
        files = [{"split": split, "path": path} for split, path in files.items()]
    elif files is not None and not (isinstance(files, list) and all(isinstance(part, Mapping) for part in files)):
        files = [{"split": "train", "path": files}]
    for part in files or ():
        split, paths = part.get("split", "train"), part.get("path")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(split, str) or not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            raise _wrong(folder, f"has data files of '{name}' that are not a split and its paths")
        splits[split] = (*splits.get(split, ()), *(str(Path(inner) / path) for path in paths))
    return Configuration(name, inner, splits, bool(entry.get("default")) or name == DEFAULT)


def _wrong(folder: Path, problem: str) -> UserError:
    return UserError(f"{folder / CARD}: `configs` {problem}. Correct it, or name the files with `path`.")


def choose(folder: Path, found: list[Configuration], name: str | None) -> Configuration:
    """The configuration `name`; without a name, the only one or the default. Raises `UserError` if there is none."""
    names = ", ".join(configuration.name for configuration in found)
    if name is not None:
        chosen = next((configuration for configuration in found if configuration.name == name), None)
        if chosen is None:
            raise UserError(f"{folder}: it has no configuration '{name}'; those it has are {names}. Correct `name`.")
        return chosen
    if len(found) == 1:
        return found[0]
    chosen = next((configuration for configuration in found if configuration.default), None)
    if chosen is None:
        raise UserError(f"{folder}: it has the configurations {names}. Set `name` to one of them.")
    return chosen


def files_of(folder: Path, configuration: Configuration) -> dict[Path, str]:
    """{file: its split} of a configuration that names files. Raises `UserError` for a pattern without a file."""
    found: dict[Path, str] = {}
    for split, patterns in configuration.splits.items():
        for pattern in patterns:
            matches = [folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)]
            files = [path for match in matches for path in ([match] if match.is_file() else match.rglob("*"))]
            new = {path: split for path in sorted(files) if path.is_file() and not path.name.startswith(".")}
            if not new:
                raise UserError(
                    f"{folder}: no file matches '{pattern}', which {CARD} names for the split '{split}'. Download the "
                    "files, or name others with `path`."
                )
            found.update(new)
    return found
