"""Run tests in a process of their own, apart from the program that they test, which they call through pipes.

The candidate sees neither the tests nor the channel of the verdict, and its values arrive as plain data. So it cannot
pass by ending the process, by printing the verdict, by patching a built-in, or with an object that equals everything.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from align.reward.sandbox import wire

MOST_ITEMS = 1_000_000
"""Limit on the items that are drawn from an iterator of the candidate."""
BUILT_IN_NAMES = frozenset(dir(builtins))


class CandidateError(Exception):
    """An exception of the candidate that is not a built-in one, or an answer that cannot be understood."""


class Candidate:
    """The other process, which has run the candidate's program.

    requests, replies: file descriptors.
    unsupported: the reason why a test could not be run against another process; empty if there is none.
    """

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = requests, replies
        self.unsupported = ""
        self._stand_ins: dict[int, StandIn] = {}

    def start(self) -> dict[str, str]:
        """Wait until the program has run; returns its global names, with the module's name for an imported module.

        Raises CandidateError if the program raises or ends its process.
        """
        status, content = self._receive()
        if status != "names" or not isinstance(content, dict):
            raise CandidateError(str(content))
        return content

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Have the candidate's process do something with its objects; returns the result or raises its exception."""
        try:
            encoded = [wire.encode(argument, self._handle) for argument in arguments]
        except wire.NotPlainError as error:
            self.unsupported = self.unsupported or str(error)
            raise
        try:
            wire.send(self.requests, [operation, *encoded])
        except OSError as error:
            raise CandidateError("the program ended its process") from error
        status, content = self._receive()
        if status == "raised":
            name, message = map(str, content)
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(message)
            raise CandidateError(f"{name}: {message}")
        return self._decode(content)

    def call(self, target: StandIn, arguments: list[Any], options: dict[str, Any]) -> Any:
        """Call an object of the candidate. Lists, dictionaries and sets that it changed in place are changed here."""
        result, changed = self.ask("call", target, arguments, options)
        for index, new in changed:
            old = arguments[index]
            if isinstance(old, list) and isinstance(new, list):
                old[:] = new
            elif isinstance(old, dict | set) and isinstance(new, dict | set):
                old.clear()
                old.update(new)
        return result

    def stand_in(self, number: int) -> StandIn:
        """The stand-in of an object of the candidate, always the same one for one object."""
        return self._stand_ins.setdefault(number, StandIn(self, number))

    def _receive(self) -> tuple[Any, Any]:
        try:
            status, content = wire.receive(self.replies)
        except (EOFError, OSError):
            raise CandidateError("the program ended its process") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise CandidateError(f"the program broke the protocol ({error})") from None
        return status, content

    def _decode(self, encoded: wire.Encoded) -> Any:
        try:
            return wire.decode(encoded, self.stand_in)
        except (ValueError, TypeError, RecursionError) as error:
            raise CandidateError(f"the program broke the protocol ({error})") from None

    def _handle(self, value: Any) -> int:
        if isinstance(value, StandIn):
            return int(value._number)
        raise wire.NotPlainError(f"a test passes an object of type {type(value).__name__}, which is not plain data")


class StandIn:
    """An object of the candidate's process that is not plain data: a function, a class, an instance, an iterator.

    It can be called, read, changed and iterated. It equals only itself and has no truth value, so that no method of
    the candidate decides a test.
    """

    def __init__(self, candidate: Candidate, number: int):
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._candidate.call(self, list(arguments), options)

    def __getattr__(self, name: str) -> Any:
        return self._candidate.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.ask("item", self, key)

    def __len__(self) -> int:
        return int(self._candidate.ask("length", self))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._candidate.ask("items", self, MOST_ITEMS))

    def __next__(self) -> Any:
        return self._candidate.ask("next", self)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program has no truth value here: it is not plain data")


def namespace(candidate: Candidate, names: dict[str, str], entry_points: list[str]) -> dict[str, Any]:
    """Globals of the tests: what the program defines and imports, by name.

    A name of a built-in function is the candidate's only if it is an entry point. A module is imported here.
    """
    found: dict[str, Any] = {"__name__": "tests"}
    for name, module in names.items():
        if name in BUILT_IN_NAMES and name not in entry_points:
            continue
        if module and module.partition(".")[0] in sys.stdlib_module_names:
            try:
                found[name] = importlib.import_module(module)
            except ImportError:
                continue
        else:
            found[name] = candidate.ask("lookup", name)
    return found


def run_tests(
    candidate: Candidate, setup: str, tests: list[str], entry_points: list[str]
) -> Iterator[tuple[bool, str]]:
    """Run the tests in order in one namespace; yields (passed, reason for failing) of each."""
    try:
        scope = namespace(candidate, candidate.start(), entry_points)
    except Exception as error:
        yield from [(False, describe(error))] * len(tests)
        return
    for number, test in enumerate(tests):
        try:
            if setup and number == 0:
                exec(compile(setup, "<setup>", "exec"), scope)
            exec(compile(test, "<test>", "exec"), scope)
        except BaseException as error:
            yield False, describe(error)
        else:
            yield True, ""


def describe(error: BaseException) -> str:
    """Type and message of an error on one short line."""
    message = " ".join(str(error).split())[:200]
    if isinstance(error, CandidateError):
        return message
    return f"{type(error).__name__}{': ' if message else ''}{message}"
