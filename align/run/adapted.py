"""Checkpoints that are stored as an adapter and a pointer to their base. Nothing here loads torch.

    model/adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    model/base.json                                        path of the base, and a hash of its weights
    model/config.json, tokenizer                           those of the model with the adapter

The base is a checkpoint of either kind, so adapters may be stacked.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from align.errors import UserError
from align.run.cache import cache_folder
from align.run.folder import write_json
from align.run.inputs import content_digest

POINTER = "base.json"


class Weights(NamedTuple):
    """The weights of a checkpoint: files of whole weights, and folders of adapters that are added in this order."""

    base: Path
    adapters: tuple[Path, ...]


def weights_of(folder: Path) -> Weights:
    """Find the weights of a checkpoint of either kind.

    Raises `UserError` if a base does not exist or has changed since its adapter was trained.
    """
    adapters: list[Path] = []
    while (folder / POINTER).is_file():
        if folder in adapters:
            raise UserError(f"{folder / POINTER}: it names an adapter that is based on this one; restore the file.")
        adapters.insert(0, folder)
        folder = base_of(folder)
    return Weights(folder, tuple(adapters))


def base_of(folder: Path) -> Path:
    """The base that the pointer in `folder` names."""
    base = _named_base(folder)
    if not base.is_dir():
        raise UserError(
            f"{folder}: its base model {base} does not exist; restore it, or write its folder into {folder / POINTER}."
        )
    if weights_digest(base) != _pointer(folder)["digest"]:
        raise UserError(
            f"{folder}: its base model {base} has changed since the adapter was trained, so together they are another "
            "model; restore the base, or train the adapter again."
        )
    return base


def require_base(adapter: Path, base: Path) -> None:
    """Raise `UserError` if `adapter` has a pointer, and its base has other weights than `base`."""
    if (adapter / POINTER).is_file() and _pointer(adapter)["digest"] != weights_digest(base):
        raise UserError(
            f"{adapter}: it was trained on {_named_base(adapter)}, and {base} has other weights; pass the base that it "
            f"was trained on, or delete {adapter / POINTER} if only the division into files differs."
        )


def write_pointer(folder: Path, place: Path, base: Path) -> None:
    """Write the pointer to `base` into `folder`, which will be moved to `place`.

    The path is relative within a run, so that the run's folder can be moved.
    """
    base, run = base.absolute(), place.absolute().parent.parent
    path = os.path.relpath(base, place.absolute()) if base.is_relative_to(run) else str(base)
    write_json(folder / POINTER, {"base": path, "digest": weights_digest(base)})


def weights_digest(folder: Path) -> str:
    """One hash of a checkpoint's weights: of its safetensors files, its adapter's settings and its pointer."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix == ".safetensors" or file.name in (POINTER, "adapter_config.json")
    ]
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    cache = cache_folder(None)
    found = [(Path(file).name, content_digest(Path(file), cache)) for file, _, _ in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _named_base(folder: Path) -> Path:
    return Path(os.path.normpath(folder.absolute() / _pointer(folder)["base"]))


def _pointer(folder: Path) -> dict[str, str]:
    try:
        values = json.loads((folder / POINTER).read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("base", "digest")):
        raise UserError(f"{folder / POINTER}: it does not name the base model and its hash; restore the file.")
    return values
