"""Checkpoints that are stored as an adapter and a pointer to their base. Nothing here loads torch.

    model/adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    model/base.json                                        path of the base, a hash of its weights, and how they were
                                                           quantised during training, if they were
    model/config.json, tokenizer                           those of the model with the adapter

The base is a checkpoint of either kind, so adapters may be stacked. `with_base` turns a folder that PEFT saved, without
pointer and config.json, into such a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

from align.errors import UserError
from align.run.cache import cache_folder, hashed, writing
from align.run.folder import remove_folder, write_json
from align.run.inputs import checkpoint_files, content_digest
from align.run.peft_folder import local_base

POINTER = "base.json"
SOURCE = "adapter"
"""Key of a pointer that `with_base` writes: the folder that PEFT saved."""


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
    if weights_digest(with_base(base)) != _pointer(folder)["digest"]:
        raise UserError(
            f"{folder}: its base model {base} has changed since the adapter was trained, so together they are another "
            "model; restore the base, or train the adapter again."
        )
    return with_base(base)


def require_base(adapter: Path, base: Path) -> None:
    """Raise `UserError` if `adapter` has a pointer, and its base has other weights than `base`."""
    if (adapter / POINTER).is_file() and _pointer(adapter)["digest"] != weights_digest(base):
        raise UserError(
            f"{adapter}: it was trained on {_named_base(adapter)}, and {base} has other weights; pass the base that it "
            f"was trained on, or delete {adapter / POINTER} if only the division into files differs."
        )


def write_pointer(folder: Path, place: Path, base: Path, quantize: str | None = None) -> None:
    """Write the pointer to `base` into `folder`, which will be moved to `place`.

    The path is relative within a run, so that the run's folder can be moved.
    quantize: quantisation of the base in memory while the adapter was trained. The base's files are not quantised.
    """
    digest = weights_digest(base)
    if (base / POINTER).is_file():
        base = Path(_pointer(base).get(SOURCE, base))
    base, run = base.absolute(), place.absolute().parent.parent
    path = os.path.relpath(base, place.absolute()) if base.is_relative_to(run) else str(base)
    trained_on = {} if quantize is None else {"quantize": quantize}
    write_json(folder / POINTER, {"base": path, "digest": digest, **trained_on})


def with_base(folder: Path) -> Path:
    """Return the checkpoint of an adapter that PEFT saved, if its settings name a base on this machine.

    Other folders are returned unchanged. The checkpoint is a folder in the cache. It has links to the adapter's files,
    and to the configuration and the tokenizer of the base. A tokenizer in the adapter's folder takes precedence.
    """
    base = local_base(folder)
    if base is None:
        return folder
    folder, base = folder.resolve(), base.resolve()
    files = {name: file for name, file in checkpoint_files(base).items() if not _is_weight(name)}
    files |= checkpoint_files(folder)
    pointer = {"base": str(base), "digest": weights_digest(base), SOURCE: str(folder)}
    cache = cache_folder(None).parent / "adapters"
    target = cache / hashed([pointer, weights_digest(folder), sorted(map(str, files.values()))])[:16] / folder.name
    if not target.is_dir():
        with writing(cache):
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(mkdtemp(dir=target.parent, prefix=".new-"))
            for name, file in files.items():
                (made / name).symlink_to(file.resolve())
            write_json(made / POINTER, pointer)
            with suppress(OSError):  # another process has made it
                made.rename(target)
            remove_folder(made)
    return target


def _is_weight(name: str) -> bool:
    """True for files with weights, their index, an adapter's settings and its pointer."""
    return name.endswith((".safetensors", ".index.json")) or name in (POINTER, "adapter_config.json")


def trained_on(adapter: Path) -> str | None:
    """Quantisation of the base while the adapter was trained; None without one, or if it is not recorded."""
    return _pointer(adapter).get("quantize") if (adapter / POINTER).is_file() else None


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
