"""What a user can mend, said in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and how to mend it.

    The command line prints the message without a traceback and exits with status 2. Raise it only for
    things the user controls (recipe, data, files, installed packages); a bug must keep its traceback.
    """


def missing_dependency(package: str, purpose: str, install: str) -> UserError:
    """The error for an optional package that is not installed: `purpose` is a noun phrase, `install` a command."""
    return UserError(f"{purpose} needs the package '{package}', which is not installed: run `{install}`.")
