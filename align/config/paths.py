"""Paths that a recipe or a command names."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from align.errors import UserError


def local_path(text: str | Path) -> Path:
    """The path on this machine; a leading `~` or `~user` is the home directory.

    Raises `UserError` for a path that the operating system refuses. The path need not exist.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(f"{path}/.")  # `/.` makes os.stat fail for a folder without permission
    except RuntimeError:
        user = str(text).partition("/")[0]
        raise UserError(f"{text}: this machine has no home directory for '{user}'; write the full path.") from None
    except OSError as error:
        raise UserError(f"{text}: cannot be read ({error.strerror}); check the path and its permissions.") from None
    return path
