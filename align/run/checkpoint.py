"""Find and check a checkpoint that a command or a recipe names, without loading torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config.paths import local_path
from align.errors import UserError
from align.run.adapted import with_base
from align.run.folder import MODEL
from align.run.refusals import config_problem, path_problem


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint in a stage's folder, or the folder itself; for an adapter that PEFT saved, see `with_base`.

    Raises `UserError` for the folder of a whole run.
    """
    path = local_path(path)
    if (path / MODEL / "config.json").is_file():
        return path / MODEL
    if (path / "recipe.json").is_file():
        stages = sorted(model.parent.name for model in path.glob(f"*/{MODEL}"))
        made = (
            f"the folder of one of its stages: {', '.join(stages)}"
            if stages
            else "a stage's folder once one has finished"
        )
        raise UserError(f"{path}: this is the folder of a whole run; pass {made}.")
    return with_base(path)


def adapter_folder(path: Path) -> Path:
    """The adapter in a stage's folder, or the folder itself."""
    inside = (path / name for name in ("adapter", MODEL))
    return next((folder for folder in inside if (folder / "adapter_config.json").is_file()), path)


def require_checkpoint(path: Path) -> Path:
    """Return `checkpoint_folder(path)`; raise `UserError` if its config.json is missing, damaged or of another kind."""
    folder = checkpoint_folder(path)
    if problem := config_problem(read_config(folder)):
        raise UserError(f"{folder}: {problem}")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        if problem := path_problem(folder):
            raise UserError(f"{folder}: {problem}")
        raise UserError(f"{folder}: not a checkpoint folder ({path} does not exist); pass the folder of a checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not valid JSON, so the checkpoint is damaged; copy or download it again.")
    return config
