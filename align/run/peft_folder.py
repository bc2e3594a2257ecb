"""An adapter's folder as PEFT saves it: without the base model's configuration. Nothing here loads torch."""

from __future__ import annotations

import json
from pathlib import Path

from align.config.paths import local_path
from align.errors import UserError
from align.run.folder import MODEL

CONFIG = "adapter_config.json"


def is_peft_folder(folder: Path) -> bool:
    """True for the folder of an adapter without config.json, and without a model inside."""
    return (folder / CONFIG).is_file() and not any(
        (inner / "config.json").is_file() for inner in (folder, folder / MODEL)
    )


def named_base(folder: Path) -> str | None:
    """The base model that the adapter's settings name, if any."""
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def local_base(folder: Path) -> Path | None:
    """The base's checkpoint if PEFT saved `folder` and its settings name a base on this machine; otherwise None."""
    name = named_base(folder) if is_peft_folder(folder) else None
    try:
        base = None if name is None else local_path(name)
    except UserError:
        return None
    inside = () if base is None else (base / MODEL, base)
    return next((inner for inner in inside if (inner / "config.json").is_file()), None)
