"""Fingerprints of the files that a stage reads: data, reward functions, and checkpoints given by path.

A result is kept, and an interrupted stage resumed, only if these files are unchanged. Contents are hashed in full; a
large file is read again only if its size, times or inode have changed. Safetensors files larger than `SAMPLED_ABOVE`
are an exception: only the size, the header and evenly spaced blocks are hashed. A checkpoint of hundreds of gigabytes
then takes seconds, but a change between two blocks is missed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from align.config.own_task import DATA, read_own_task
from align.config.parts import FileSource, HotStartModel, PretrainedModel, ScratchModel
from align.config.paths import local_path
from align.config.recipe import BASE, Recipe, is_path
from align.config.rewards import FunctionReward
from align.config.section import Section
from align.config.stage import find
from align.config.stages import TrainingStage
from align.errors import UserError
from align.run.cache import cache_folder, content_hash
from align.run.folder import MODEL
from align.run.peft_folder import local_base

SAMPLED_ABOVE = 64 * 2**20
"""Size in bytes above which a safetensors file is sampled."""
BLOCK_BYTES = 2**16
BLOCKS = 256
CHECKPOINT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Suffixes of the files that a stage reads in a checkpoint."""
Files = dict[str, Path]
"""Files of an input by their names within it; the name is "" if the input is a single file."""
Digests = dict[str, str]
"""Hash of each file by its name within the input; the name is "" if the input is a single file."""


def fingerprints(recipe: Recipe, name: str) -> dict[str, Digests]:
    """The hashes of every input of a stage that exists on this machine, by the input's path in the recipe."""
    cache = _cache(recipe, name)
    return {text: digests(files, cache) for text, files in inputs(recipe, name).items() if files}


def changed_input(recipe: Recipe, name: str, before: dict[str, Digests]) -> str | None:
    """The first file whose hash differs from the one in `before`; None if no hash differs.

    An input that no longer exists is not a change: a finished stage does not need it, and a stage that runs reports it
    as missing. Inputs that `before` lacks are not compared.
    """
    cache = _cache(recipe, name)
    for text, files in inputs(recipe, name).items():
        if text not in before or not files:
            continue
        now = digests(files, cache)
        for file in sorted({*now, *before[text]}):
            if now.get(file) != before[text].get(file):
                return f"{text}/{file}" if file else text
    return None


def inputs(recipe: Recipe, name: str) -> dict[str, Files]:
    """The files of every input of a stage, by its path in the recipe. A missing input has no files."""
    found: dict[str, Files] = {}
    for text, files in _inputs(recipe, name):
        found.setdefault(text, {}).update(files)  # two sources may be splits of one folder
    return found


def _inputs(recipe: Recipe, name: str) -> Iterator[tuple[str, Files]]:
    if name == BASE:
        match recipe.model:
            case ScratchModel(tokenizer=str(path)) | PretrainedModel(path=path) | HotStartModel(source=path):
                yield path, _checkpoint(path)
            case ScratchModel():
                yield from _data(recipe.model)
        return
    stage = recipe.stages[name]
    yield from _data(stage)
    for _, reference, _ in stage.checkpoints():
        if is_path(reference):
            yield reference, _checkpoint(reference)
    for _, names, options in stage.benchmarks():
        for task in names:
            yield from _task(task, options.data)
    for _, reward in find(stage, FunctionReward):
        if ":" in reward.path:
            file = reward.path.rpartition(":")[0]
            yield file, _single(local_path(file))


def _data(section: Section) -> Iterator[tuple[str, Files]]:
    for source in [section] if isinstance(section, FileSource) else [found for _, found in find(section, FileSource)]:
        root = local_path(source.path)
        try:
            files = source.files().files
        except UserError:  # reported when the stage reads its data
            files = ()
        yield source.path, _single(root) if root.is_file() else {_within(root, file): file for file in files}


def _task(name: str, data: str | None) -> Iterator[tuple[str, Files]]:
    """The file of a user-defined task, and its data. Data sets of tasks that a library defines are not compared."""
    file = Path(name.removeprefix("suite:"))
    if file.suffix not in (".yaml", ".yml", ".py"):
        return
    yield str(file), _single(file)
    if name != str(file) or file.suffix == ".py" or not file.is_file():
        return
    try:
        task = read_own_task(file)
    except UserError:  # a task of another format, or reported when the stage runs
        return
    for rows in (task.data, task.shots.data if task.shots else None):
        if rows is not None:
            inside = rows.path.removeprefix(DATA)
            place = file.parent / rows.path if inside == rows.path else Path(data or ".") / inside
            yield from _data(FileSource(path=str(place), name=rows.name, split=rows.split))


def _within(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if root.is_dir() else str(file)


def _single(path: Path) -> Files:
    return {"": path} if path.exists() else {}


def _checkpoint(text: str) -> Files:
    folder = local_path(text)
    if (folder / MODEL / "config.json").is_file():
        folder = folder / MODEL
    base = local_base(folder)
    of_base = {f"base/{name}": file for name, file in checkpoint_files(base).items()} if base is not None else {}
    return checkpoint_files(folder) | of_base if folder.is_dir() else _single(folder)


def checkpoint_files(folder: Path) -> Files:
    """The files of a checkpoint."""
    return {file.name: file for file in sorted(folder.iterdir()) if file.suffix in CHECKPOINT and file.is_file()}


def checkpoint_digest(folder: Path) -> str:
    """One hash of all files of a checkpoint."""
    found = digests(checkpoint_files(folder), cache_folder(None))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def digests(files: Files, cache: Path) -> Digests:
    """The hash of each file. cache: folder that keeps the hashes of large files."""
    return {name: content_digest(file, cache) for name, file in files.items()}


def _cache(recipe: Recipe, name: str) -> Path:
    """The folder of a stage's tokenised rows, where the tokenisation keeps the hashes of the same files."""
    stage = recipe.stages.get(name)
    return cache_folder(stage.data.cache if isinstance(stage, TrainingStage) else None)


def content_digest(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content; of a large safetensors file, of its size, header and sampled blocks."""
    size = file.stat().st_size
    if file.suffix != ".safetensors" or size <= SAMPLED_ABOVE:
        return "sha256:" + content_hash(file, cache)
    with open(file, "rb") as content:
        found = hashlib.sha256(str(size).encode())
        header = int.from_bytes(content.read(8), "little")
        found.update(content.read(min(header, SAMPLED_ABOVE)))
        for block in range(BLOCKS):
            content.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            found.update(content.read(BLOCK_BYTES))
    return f"sha256 of {BLOCKS} blocks:{found.hexdigest()}"
