"""The process in which users' functions run: started by `align.reward.process`, which can end it at any time.

A request is a `Call`, without completions to import its file alone. Replies are tuples, and the last is ("done",):

    ("score", index, number)             of one completion
    ("problem", index, what, mend)       of one completion; index None: of the whole call
    ("awaiting",)                        the rest is awaited, all at once

Nothing here imports torch: the process should start at once and stay small.
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

MEND = "mend the function"
FAILURES = (Exception, SystemExit)


@dataclass(frozen=True)
class Call:
    """A function of a user's file and what it is asked."""

    file: str
    name: str
    batched: bool
    timeout_s: float
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self) -> list[tuple[str, str, dict[str, Any]]]:
        return list(zip(self.prompts, self.completions, self.rows, strict=True))


class Problem(Exception):
    """What a user's file or function did wrong, as the rest of a sentence that begins with its name; how to mend it."""

    def __init__(self, what: str, mend: str = MEND):
        super().__init__(what, mend)


def main() -> None:
    """Answer calls until the other side closes its end. The command line has the number of our end."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # processes that a user's function starts have no part in it
    connection = Connection(descriptor)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    with asyncio.Runner() as runner:  # one loop for all rounds: a user's client may be bound to it
        while True:
            try:
                call: Call = connection.recv()
            except EOFError:
                return
            answer = Answer(call, connection.send, runner)
            try:
                function = load_function(call)
                if call.completions:
                    answer.batched(function) if call.batched else answer.in_turn(function)
            except Problem as problem:
                answer.problem(None, problem)
            connection.send(("done",))


def end_with_parent(parent: int) -> None:
    """No orphan stays behind a parent that was killed, even while a function runs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# --- the user's file -----------------------------------------------------------------------------------------


def load_function(call: Call) -> Callable:
    """The function, from a file that is imported once."""
    arguments = "prompts, completions, rows" if call.batched else "prompt, completion, row"
    if call.file:
        module = import_file(call.file)
    else:
        from align.reward import verifiers as module  # it takes a third of a second, and few runs have a pattern
    function: Callable | None = getattr(module, call.name, None)
    pattern = f"write `def {call.name}({arguments})`"
    if not callable(function):
        raise Problem(f"it defines no function '{call.name}'", pattern)
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError:
        raise Problem(f"'{call.name}' does not take three arguments", pattern) from None
    except ValueError:  # no signature to be had, of a function written in C
        pass
    return function


def import_file(file: str) -> ModuleType:
    module_name = f"align_user_{hashlib.sha256(file.encode()).hexdigest()[:8]}_{Path(file).stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise Problem("not a Python file", "name one that ends in .py")
    sys.path.insert(0, str(Path(file).parent))  # files beside it can be imported, as in a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        raise Problem(f"importing it raised {described(error, file)}", "mend the file") from error
    return module


def described(error: BaseException, file: str) -> str:
    """The error with the line of the user's file that led to it."""
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
class Answer:
    """Calls a function and sends what it returns."""

    call: Call
    send: Callable[[tuple], None]
    runner: asyncio.Runner

    def problem(self, index: int | None, problem: Problem) -> None:
        self.send(("problem", index, *problem.args))

    def raised(self, index: int | None, error: BaseException) -> None:
        self.problem(index, Problem(f"raised {described(error, self.call.file)}"))

    def score(self, index: int, value: Any) -> None:
        try:
            self.send(("score", index, to_score(value)))
        except Problem as problem:
            self.problem(index, problem)

    def batched(self, function: Callable) -> None:
        """One call for all completions."""
        call = self.call
        try:
            values = self._finished(function(call.prompts, call.completions, call.rows))
        except FAILURES as error:
            self.raised(None, error)
            self._find_culprit(function, type(error))
            return
        for index, value in enumerate(as_list(values, len(call.completions))):
            self.score(index, value)

    def _find_culprit(self, function: Callable, kind: type[BaseException]) -> None:
        """The exception does not say which completion it was; alone, the culprit raises again."""
        for index, arguments in enumerate(self.call.arguments()):
            try:
                self._finished(function(*([argument] for argument in arguments)))
            except FAILURES as error:
                if isinstance(error, kind):
                    self.raised(index, error)
                return

    def in_turn(self, function: Callable) -> None:
        """A call for each completion. Replies are sent at once, so that the other side sees which one hangs."""
        waiting: list[tuple[int, Any]] = []
        for index, arguments in enumerate(self.call.arguments()):
            try:
                value = function(*arguments)
            except FAILURES as error:
                self.raised(index, error)
                continue
            if inspect.isawaitable(value):
                waiting.append((index, value))
            else:
                self.score(index, value)
        if waiting:
            self.send(("awaiting",))
            self.runner.run(self._await_all(waiting))

    def _finished(self, value: Any) -> Any:
        async def awaited() -> Any:
            return await value

        return self.runner.run(awaited()) if inspect.isawaitable(value) else value

    async def _await_all(self, waiting: list[tuple[int, Any]]) -> None:
        async def one(index: int, value: Any) -> None:
            try:
                async with asyncio.timeout(self.call.timeout_s) as limit:
                    self.score(index, await value)
            except FAILURES as error:
                if isinstance(error, TimeoutError) and limit.expired():
                    self.problem(index, took_too_long(self.call.timeout_s))
                else:
                    self.raised(index, error)

        await asyncio.gather(*(one(index, value) for index, value in waiting))


def took_too_long(seconds: float) -> Problem:
    return Problem(f"took longer than {seconds:g} s", "mend the function, or raise its timeout_s")


def as_list(values: Any, count: int) -> list[Any]:
    """The batched function's values, one a completion."""
    try:
        scores: list[Any] = list(values)
    except TypeError:
        single = isinstance(values, int | float)
        raise Problem(
            f"must return a list of numbers, one for each completion, but returned {shown(values)}",
            "set `batched: false` for a function of one completion" if single else MEND,
        ) from None
    if len(scores) != count:
        raise Problem(f"returned {len(scores)} scores for {count} completions", "return one for each")
    return scores


def to_score(value: Any) -> float:
    """The finite number that a function returned for one completion."""
    problem = Problem(f"returned {shown(value)}", "return finite numbers")
    if isinstance(value, str | bytes):
        raise problem
    try:
        score = float(value)
    except Exception as error:  # arrays and tensors raise many types
        raise problem from error
    if not math.isfinite(score):
        raise problem
    return score


def shown(value: Any) -> str:
    return " ".join(repr(value).split())[:60]
