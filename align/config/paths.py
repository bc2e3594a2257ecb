"""Paths that a recipe or a command names."""

from __future__ import annotations

from pathlib import Path

from align.errors import UserError


def local_path(text: str | Path) -> Path:
    """The path on this machine; a leading `~` or `~user` is the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = str(text).partition("/")[0]
        raise UserError(f"{text}: this machine has no home directory for '{user}'; write the full path.") from None
