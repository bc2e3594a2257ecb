"""Find the data files of a path: a file, a folder with all its subfolders, or a glob pattern; and their splits."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.dataset_card import Configuration, choose, configurations, files_of
from align.config.paths import local_path
from align.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
BINARY_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather")
SUFFIXES = (*TEXT_SUFFIXES, *BINARY_SUFFIXES)
"""Suffixes of the formats that are read; those of text may be followed by one of `COMPRESSED`."""
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe a data set and have no rows."""
_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_SHARD = re.compile(r"(?P<split>\w+?)-\d{4,5}-of-\d{4,5}")
_PLAIN = {"data", "part", "shard", "chunk", "file"}
"""Beginnings of shards' names that name no split."""
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Listing:
    """The files of a path.

    files   data files that are read, in order
    others  files beside them that are not read: of other formats, or of other splits
    """

    files: tuple[Path, ...]
    others: tuple[Path, ...] = ()


def suffix_of(path: Path) -> str:
    """The suffix that tells the format of a file, in lower case and without that of the compression."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        if name.endswith(suffix) and Path(name.removesuffix(suffix)).suffix in TEXT_SUFFIXES:
            name = name.removesuffix(suffix)
    return Path(name).suffix


def list_files(path: str | Path, splits: Sequence[str] = (), name: str | None = None) -> Listing:
    """The data files of a path, or of those of its splits that are named.

    name: configuration of a data set whose README.md lists several; see `align.config.dataset_card`.

    Raises `UserError` if the path has no data file, and if it has several splits but none is named: test rows must not
    end up in the training data.
    """
    where, text = local_path(path), str(path)
    configured = configurations(where) if where.is_dir() else []
    if name is not None and not configured:
        raise UserError(f"{where}: `name` is '{name}', but no README.md there lists configurations. Remove `name`.")
    if configured:
        chosen = choose(where, configured, name)
        if chosen.splits:
            return _of_card(where, chosen, splits)
        where = where / chosen.folder
    root = where
    if where.is_dir():
        files, others = _walk(where)
    elif where.is_file():
        return _one(where)
    elif any(mark in text for mark in "*?["):
        files, others, root = *_matches(where), _fixed_part(where)
    else:
        raise UserError(f"{where}: does not exist (paths are relative to {Path.cwd()}). Correct the path.")
    if not files:
        beside = f"; it has {', '.join(p.name for p in others[:5])}" if others else ""
        raise UserError(
            f"{where}: no data file{beside}. Set a path with files of one of these formats: {', '.join(SUFFIXES)}."
        )
    return _of_splits(where, root, files, others, splits)


def _one(file: Path) -> Listing:
    if suffix_of(file) not in SUFFIXES:
        raise UserError(
            f"{file}: its format is none of {', '.join(SUFFIXES)}; text may be compressed "
            f"({', '.join(COMPRESSED)}). Convert it to one of them."
        )
    return Listing((file,))


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """(data files, other files) below a folder, except hidden ones. Links are followed, each folder once."""
    files, others, seen = list[Path](), list[Path](), set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        shards = _saved_shards(Path(folder)) if "state.json" in names else None
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = Path(folder, name)
            is_data = suffix_of(path) in SUFFIXES and name not in _DESCRIPTIONS
            if shards is not None:
                is_data = name in shards
            (files if is_data and path.is_file() else others).append(path)
    return sorted(files), sorted(others)


def _saved_shards(folder: Path) -> set[str] | None:
    """Names of the data files that `datasets.Dataset.save_to_disk` wrote; it may leave caches beside them."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(entry["filename"]) for entry in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _matches(pattern: Path) -> tuple[list[Path], list[Path]]:
    files, others = set[Path](), set[Path]()
    for name in glob.glob(str(pattern), recursive=True):
        path = Path(name)
        if path.is_dir():
            more, rest = _walk(path)
            files.update(more)
            others.update(rest)
        else:
            (files if suffix_of(path) in SUFFIXES and path.name not in _DESCRIPTIONS else others).add(path)
    return sorted(files), sorted(others)


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts:
        if any(mark in part for mark in "*?["):
            break
        parts.append(part)
    return Path(*parts)


# --- splits -----------------------------------------------------------------------------------------------


def split_of(path: Path) -> str | None:
    """The split that a relative path names, by the conventions of the Hugging Face hub, if any.

    `data/train_sft-00000-of-00001.parquet` is of the split `train_sft`. Otherwise a word of the file's name or of its
    folders decides: `dev.jsonl` and `validation/a.jsonl` are of the split `validation`.
    """
    shard = _SHARD.match(path.name)
    if shard and shard["split"] not in _PLAIN:
        return _WORDS.get(shard["split"].lower(), shard["split"])
    for part in reversed(path.parts):
        for word in _WORD.findall(part.partition(".")[0]):
            if word.lower() in _WORDS:
                return _WORDS[word.lower()]
    return None


def _of_card(where: Path, chosen: Configuration, wanted: Sequence[str]) -> Listing:
    """The files that a data set's README.md names."""
    found = files_of(where, chosen)
    for file in found:
        _one(file)
    every, others = _walk(where)
    return _chosen(where, found, [file for file in (*every, *others) if file not in found], wanted)


def _of_splits(
    where: Path, root: Path, files: Sequence[Path], others: Sequence[Path], wanted: Sequence[str]
) -> Listing:
    return _chosen(where, {file: split_of(file.relative_to(root)) for file in files}, others, wanted)


def _chosen(where: Path, found: Mapping[Path, str | None], others: Sequence[Path], wanted: Sequence[str]) -> Listing:
    """The files of the wanted splits. found: {file: its split, if any}."""
    files = list(found)
    names = sorted({name for name in found.values() if name is not None})
    if not wanted:
        if len(names) > 1:
            raise UserError(
                f"{where}: it has the splits {', '.join(names)}. Name those to read, for example "
                f"`split: {'train' if 'train' in names else names[0]}`."
            )
        return Listing(tuple(files), tuple(others))
    exact = [name if name in names else _WORDS.get(name.lower(), name) for name in wanted]
    for name, known in zip(wanted, exact):
        if known not in names:
            raise UserError(
                f"{where}: no files of the split '{name}'; its splits are {', '.join(names) or 'not named'}. "
                "Correct or remove `split`."
            )
    chosen = tuple(file for file in files if found[file] in exact)
    return Listing(chosen, tuple(sorted([*others, *(file for file in files if found[file] not in exact)])))
