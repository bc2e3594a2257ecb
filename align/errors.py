"""Exceptions that end a command without a traceback."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Bad input: the message says where, what is wrong, and how to fix it.

    The command line prints the message without a traceback and exits with status 2. Raise it only for things that the
    user controls (recipe, data, files, installed packages); a bug must keep its traceback.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop. The command line exits with 128 + its number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal_name(number)}")
        self.number = number


def signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def missing_dependency(package: str, purpose: str, install: str) -> UserError:
    """The error for an optional package that is not installed: `purpose` is a noun phrase, `install` a command."""
    return UserError(f"{purpose} needs the package '{package}', which is not installed: run `{install}`.")
