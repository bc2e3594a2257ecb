"""sweep.json: swept settings, and the points so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import UserError

STATE = "sweep.json"


def is_sweep(folder: Path) -> bool:
    return (folder / STATE).is_file()


def read_state(folder: Path) -> dict[str, Any]:
    """The content of sweep.json. Raises `UserError` if it is damaged."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("points"), list):
        raise UserError(f"{folder / STATE}: not the file of a sweep; restore it, or remove {folder}.")
    return content
