"""Run a program in this process, or tests in this process against a program in a forked one, after confining both.

Started by `Sandbox` with Python's options -I and -S. Standard input has frames (see `wire`): first the program and its
limits, then, for tests, the tests. The process is confined before the program runs, and the program runs before
the tests are read, so its process never contains them.
"""

from __future__ import annotations

import itertools
import os
import sys
from types import ModuleType
from typing import Any

from align.reward.sandbox import wire
from align.reward.sandbox.confine import confine, end_with_parent, limit_resources
from align.reward.sandbox.tester import Candidate, describe, run_tests


class Job:
    """The first frame of standard input.

    code: the program.
    mark: printed once the process is confined.
    tests: run the tests of the second frame against the program; otherwise the rest of standard input is the program's.
    confined: confine the processes; false sets the limits only.
    cpu_s, memory_bytes: limits of each process.
    """

    def __init__(self, code: str, mark: str, tests: bool, confined: bool, cpu_s: int, memory_bytes: int):
        self.code, self.mark, self.tests = code, mark, tests
        self.confined, self.cpu_s, self.memory_bytes = confined, cpu_s, memory_bytes

    def restrict(self) -> None:
        limit_resources(cpu_s=self.cpu_s, memory_bytes=self.memory_bytes)
        if self.confined:
            confine()


def main() -> None:
    end_with_parent()
    job = Job(**wire.receive(0))
    sys.path.pop(0)  # where this package is
    sys.set_int_max_str_digits(0)
    if job.tests:
        _run_tests(job)
    else:
        job.restrict()
        _say(job.mark)
        sys.argv = ["program.py"]
        module = ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(job.code, "program.py", "exec"), module.__dict__)


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


# --- tests ---------------------------------------------------------------------------------------------------


def _run_tests(job: Job) -> None:
    requests, replies = os.pipe(), os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        end_with_parent()
        if os.getppid() == parent:
            _serve(job, requests[0], replies[1])
        os._exit(0)
    os.close(requests[0])
    os.close(replies[1])
    job.restrict()
    _say(job.mark)
    rest: dict[str, Any] = wire.receive(0)
    mark = rest.pop("mark")
    candidate = Candidate(requests[1], replies[0])
    out = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a test prints is not a verdict
    for passed, reason in run_tests(candidate, **rest):
        line = f"{mark} {'passed' if passed else 'unsupported' if candidate.unsupported else 'failed'} "
        os.write(out, (line + (candidate.unsupported or reason)).encode(errors="replace")[:400] + b"\n")
        candidate.unsupported = ""
    os._exit(0)


def _serve(job: Job, requests: int, replies: int) -> None:
    """Run the program and answer requests about its objects, until the tests' process closes its end."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):  # neither the tests nor the channel of the verdict
        os.dup2(null, descriptor)
    kept = sorted((requests, replies))
    for low, high in itertools.pairwise([2, *kept, 4096]):
        os.closerange(low + 1, high)
    job.restrict()
    server = _Server()
    try:
        exec(compile(job.code, "<program>", "exec"), server.scope)
    except BaseException as error:
        wire.send(replies, ["failed", f"the program raised {describe(error)}"])
        return
    wire.send(replies, ["names", server.names()])
    while True:
        try:
            operation, *encoded = wire.receive(requests)
        except EOFError:
            return
        try:
            arguments = [wire.decode(argument, server.objects.__getitem__) for argument in encoded]
            reply = ["returned", wire.encode(getattr(server, operation)(*arguments), server.number)]
        except BaseException as error:
            reply = ["raised", [type(error).__name__, str(error)[:500]]]
        try:
            wire.send(replies, reply)
        except ValueError as error:
            wire.send(replies, ["raised", ["ValueError", str(error)]])


class _Server:
    """The candidate's objects and what a test can do with them.

    scope: globals of the program. objects: those that the tests hold by their number.
    """

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {"__name__": "program"}
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def number(self, value: Any) -> int:
        """Number of an object, which stays alive as long as this process."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]

    def names(self) -> dict[str, str]:
        names = {name: value for name, value in self.scope.items() if not name.startswith("__")}
        return {name: value.__name__ if isinstance(value, ModuleType) else "" for name, value in names.items()}

    def lookup(self, name: str) -> Any:
        return self.scope[name]

    def call(self, target: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        """(result, arguments that the call changed in place as pairs of index and new value)."""
        before = [wire.encode(argument, self.number) for argument in arguments]
        result = target(*arguments, **options)
        after = [wire.encode(argument, self.number) for argument in arguments]
        return result, [(i, arguments[i]) for i, (old, new) in enumerate(zip(before, after)) if old != new]

    def get(self, target: Any, name: str) -> Any:
        return getattr(target, name)

    def set(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)

    def item(self, target: Any, key: Any) -> Any:
        return target[key]

    def length(self, target: Any) -> int:
        return len(target)

    def items(self, target: Any, most: int) -> list[Any]:
        return list(itertools.islice(target, most))

    def next(self, target: Any) -> Any:
        return next(target)
