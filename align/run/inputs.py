"""Fingerprints of the files that a stage reads: data, reward functions, and checkpoints given by path.

A result is kept, and an interrupted stage resumed, only if these files are unchanged. Contents are hashed in full,
except those of safetensors files larger than `SAMPLED_ABOVE`. Of these, only the size, the header and evenly spaced
blocks are hashed. A checkpoint of hundreds of gigabytes then takes seconds, but a change between two blocks is missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from align.config.parts import FileSource, HotStartModel, PretrainedModel, ScratchModel
from align.config.paths import local_path
from align.config.recipe import BASE, Recipe, is_path
from align.config.rewards import FunctionReward
from align.config.section import Section
from align.config.stage import find
from align.run.folder import MODEL

SAMPLED_ABOVE = 64 * 2**20
"""Size in bytes above which a safetensors file is sampled."""
BLOCK_BYTES = 2**16
BLOCKS = 256
DATA = (".jsonl", ".json", ".parquet")
CHECKPOINT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Suffixes of the files that a stage reads in a data folder, and in a checkpoint."""
Digests = dict[str, str]
"""Hash of each file by its name within the input; the name is "" if the input is a single file."""


def fingerprints(recipe: Recipe, name: str) -> dict[str, Digests]:
    """The hashes of every input of a stage that exists on this machine, by the input's path in the recipe."""
    return {text: digests(path, suffixes) for text, path, suffixes in inputs(recipe, name) if path.exists()}


def changed_input(recipe: Recipe, name: str, before: dict[str, Digests]) -> str | None:
    """The first file whose hash differs from the one in `before`; None if no hash differs.

    An input that no longer exists is not a change: a finished stage does not need it, and a stage that runs reports it
    as missing. Inputs that `before` lacks are not compared.
    """
    for text, path, suffixes in inputs(recipe, name):
        if text not in before or not path.exists():
            continue
        now = digests(path, suffixes)
        for file in sorted({*now, *before[text]}):
            if now.get(file) != before[text].get(file):
                return f"{text}/{file}" if file else text
    return None


def inputs(recipe: Recipe, name: str) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """Inputs of a stage: (path in the recipe, path on this machine, suffixes of the files read in a folder)."""
    if name == BASE:
        match recipe.model:
            case ScratchModel(tokenizer=str(path)) | PretrainedModel(path=path) | HotStartModel(source=path):
                yield path, _checkpoint(path), CHECKPOINT
            case ScratchModel():
                yield from _files(recipe.model)
        return
    stage = recipe.stages[name]
    yield from _files(stage)
    for _, reference, _ in stage.checkpoints():
        if is_path(reference):
            yield reference, _checkpoint(reference), CHECKPOINT
    for _, reward in find(stage, FunctionReward):
        if ":" in reward.path:
            file = reward.path.rpartition(":")[0]
            yield file, local_path(file), ()


def _files(section: Section) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    for _, source in find(section, FileSource):
        yield source.path, local_path(source.path), DATA


def _checkpoint(text: str) -> Path:
    folder = local_path(text)
    return folder / MODEL if (folder / MODEL / "config.json").is_file() else folder


def digests(path: Path, suffixes: tuple[str, ...]) -> Digests:
    """The hash of a file, or of each file with one of the suffixes that is directly in a folder."""
    if not path.is_dir():
        return {"": content_digest(path)}
    return {
        file.name: content_digest(file) for file in sorted(path.iterdir()) if file.suffix in suffixes and file.is_file()
    }


def content_digest(file: Path) -> str:
    """SHA-256 of a file's content; of a large safetensors file, of its size, header and sampled blocks."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        if file.suffix != ".safetensors" or size <= SAMPLED_ABOVE:
            return "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        header = int.from_bytes(content.read(8), "little")
        found.update(content.read(min(header, SAMPLED_ABOVE)))
        for block in range(BLOCKS):
            content.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            found.update(content.read(BLOCK_BYTES))
    return f"sha256 of {BLOCKS} blocks:{found.hexdigest()}"
