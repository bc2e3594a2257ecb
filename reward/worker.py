"""The process that runs users' functions. `align.reward.process` starts it and can kill it at any time.

A request is a `Call`; one without completions only imports the file. Replies are tuples, the last is ("done",):

    ("score", index, number)             score of one completion
    ("problem", index, what, fix)        problem with one completion, or with the whole call if index is None
    ("awaiting",)                        the remaining completions are awaited concurrently

Nothing here imports torch: the process must start quickly and stay small.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from align.reward.text import Row

FIX = "fix the function"
FAILURES = (Exception, SystemExit)
"""Exceptions of a user's code that become a problem; others end the process."""


@dataclass(frozen=True)
class Call:
    """One request: a function and its arguments.

    file: absolute path of the user's file; empty for a function of `align.reward.verifiers`.
    name: the function's name.
    batched: called once for all completions, not once per completion.
    timeout_s: seconds that the call, or with `batched` false the call for one completion, may take.
    prompts, completions, rows: the arguments, one entry per completion.
    """

    file: str
    name: str
    batched: bool
    timeout_s: float
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def arguments(self) -> list[tuple[str, str, Row]]:
        """Arguments for each completion."""
        return list(zip(self.prompts, self.completions, self.rows, strict=True))


class Problem(Exception):
    """A fault of a user's file or function.

    what: predicate of the sentence whose subject is the function. fix: instruction for the user.
    """

    def __init__(self, what: str, fix: str = FIX):
        super().__init__(what, fix)


def main() -> None:
    """Handle calls until the parent closes the connection, whose file descriptor is the command line's argument."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # processes that a user's function starts must not keep it open
    connection = Connection(descriptor)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    with asyncio.Runner() as runner:  # one event loop for all calls: a user's client may be bound to it
        while True:
            try:
                call: Call = connection.recv()
            except EOFError:
                return
            run = CallRun(call, connection.send, runner)
            try:
                function = load_function(call)
                if call.completions:
                    run.batched(function) if call.batched else run.one_by_one(function)
            except Problem as problem:
                run.report(None, problem)
            connection.send(("done",))


def end_with_parent(parent: int) -> None:
    """Exit as soon as the parent has ended, even while a function runs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# --- the user's file -----------------------------------------------------------------------------------------


def load_function(call: Call) -> Callable:
    """Find the function of a call; its file is imported once per process. Raises Problem if it cannot be called."""
    arguments = "prompts, completions, rows" if call.batched else "prompt, completion, row"
    if call.file:
        module = import_file(call.file)
    else:
        from align.reward import verifiers as module  # importing it takes a third of a second
    function: Callable | None = getattr(module, call.name, None)
    pattern = f"write `def {call.name}({arguments})`"
    if not callable(function):
        raise Problem(f"it defines no function '{call.name}'", pattern)
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError:
        raise Problem(f"'{call.name}' does not take three arguments", pattern) from None
    except ValueError:  # a function written in C may have no signature
        pass
    return function


def import_file(file: str) -> ModuleType:
    """Import a user's file, or return the module if it is imported already."""
    module_name = f"align_user_{hashlib.sha256(file.encode()).hexdigest()[:8]}_{Path(file).stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise Problem("it is not a Python file", "set a path that ends in .py")
    sys.path.insert(0, str(Path(file).parent))  # as in a script, the file may import files beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        raise Problem(f"importing it raised {describe_error(error, file)}", "fix the file") from error
    return module


def describe_error(error: BaseException, file: str) -> str:
    """Type and message of an error, with the line of the user's file that raised it."""
    if isinstance(error, SyntaxError) and error.filename == file:
        line, name = error.lineno, file
    else:
        frames = traceback.extract_tb(error.__traceback__)
        frame = ([frame for frame in frames if frame.filename == file] or frames)[-1]
        line, name = frame.lineno, frame.filename
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' if message else ''}{message} ({Path(name).name} line {line})"


# --- calls ---------------------------------------------------------------------------------------------------


@dataclass
class CallRun:
    """Runs one call and sends the replies.

    call: the request. send: sends one reply. runner: event loop for async functions.
    """

    call: Call
    send: Callable[[tuple], None]
    runner: asyncio.Runner

    def report(self, index: int | None, problem: Problem) -> None:
        self.send(("problem", index, *problem.args))

    def report_error(self, index: int | None, error: BaseException) -> None:
        self.report(index, Problem(f"raised {describe_error(error, self.call.file)}"))

    def send_score(self, index: int, value: Any) -> None:
        try:
            self.send(("score", index, to_score(value)))
        except Problem as problem:
            self.report(index, problem)

    def batched(self, function: Callable) -> None:
        """Call the function once for all completions."""
        call = self.call
        try:
            values = self._awaited(function(call.prompts, call.completions, call.rows))
        except FAILURES as error:
            self.report_error(None, error)
            self._find_culprit(function, type(error))
            return
        for index, value in enumerate(as_list(values, len(call.completions))):
            self.send_score(index, value)

    def _find_culprit(self, function: Callable, kind: type[BaseException]) -> None:
        """Call the function again for one completion at a time, to find the completion that raises the same error."""
        for index, arguments in enumerate(self.call.arguments()):
            try:
                self._awaited(function(*([argument] for argument in arguments)))
            except FAILURES as error:
                if isinstance(error, kind):
                    self.report_error(index, error)
                return

    def one_by_one(self, function: Callable) -> None:
        """Call the function for each completion. Each reply is sent at once, so the parent sees which call hangs."""
        waiting: list[tuple[int, Any]] = []
        for index, arguments in enumerate(self.call.arguments()):
            try:
                value = function(*arguments)
            except FAILURES as error:
                self.report_error(index, error)
                continue
            if inspect.isawaitable(value):
                waiting.append((index, value))
            else:
                self.send_score(index, value)
        if waiting:
            self.send(("awaiting",))
            self.runner.run(self._await_all(waiting))

    def _awaited(self, value: Any) -> Any:
        """The value itself, or the result of an awaitable."""

        async def result() -> Any:
            return await value

        return self.runner.run(result()) if inspect.isawaitable(value) else value

    async def _await_all(self, waiting: list[tuple[int, Any]]) -> None:
        async def one(index: int, value: Any) -> None:
            try:
                async with asyncio.timeout(self.call.timeout_s) as limit:
                    self.send_score(index, await value)
            except FAILURES as error:
                if isinstance(error, TimeoutError) and limit.expired():
                    self.report(index, took_too_long(self.call.timeout_s))
                else:
                    self.report_error(index, error)

        await asyncio.gather(*(one(index, value) for index, value in waiting))


def took_too_long(seconds: float) -> Problem:
    return Problem(f"took longer than {seconds:g} s", "fix the function, or raise its timeout_s")


def as_list(values: Any, count: int) -> list[Any]:
    """Return values of a batched function as a list, one per completion; raises Problem for another count."""
    try:
        scores: list[Any] = list(values)
    except TypeError:
        single = isinstance(values, int | float)
        raise Problem(
            f"must return a list of numbers, one per completion, but returned {shown(values)}",
            "set `batched: false` for a function of one completion" if single else FIX,
        ) from None
    if len(scores) != count:
        raise Problem(f"returned {len(scores)} instead of {count} scores", "return one score per completion")
    return scores


def to_score(value: Any) -> float:
    """Return value of a function for one completion as a float; raises Problem if it is not a finite number."""
    problem = Problem(f"returned {shown(value)}", "return finite numbers")
    if isinstance(value, str | bytes):
        raise problem
    try:
        score = float(value)
    except Exception as error:  # arrays and tensors raise exceptions of many types
        raise problem from error
    if not math.isfinite(score):
        raise problem
    return score


def shown(value: Any) -> str:
    """The value on one short line, for a message."""
    return " ".join(repr(value).split())[:60]
