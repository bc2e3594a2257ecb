"""Run users' reward functions in a separate process, which is killed when a function hangs.

A thread cannot be stopped, and a signal does not interrupt a loop in C, so only a process can enforce a timeout. It
also isolates the training from a function's crash, memory and threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from align.errors import UserError
from align.reward.text import Row
from align.reward.worker import FIX, Call, took_too_long

IMPORT_TIMEOUT_S = 600.0
"""Time limit of an import; a user's file may load a model."""
GRACE_S = 5.0
"""Extra seconds before the process is killed, in which it may report the timeout of an async function itself, and
seconds to wait for the exit status of a process that has closed its connection."""
MAX_RESTARTS = 3
"""Restarts per call after a tolerant function has hung or crashed."""


@dataclass(frozen=True)
class UserFunction:
    """A reward function to run in the process.

    label: name in messages.
    file: the user's file; empty for a function of `align.reward.verifiers`.
    name: the function's name in that file.
    batched: called once for all completions, not once per completion.
    timeout_s: seconds that a call may take.
    tolerant: a completion for which the function fails gets no score, instead of ending the run.
    """

    label: str
    file: str
    name: str
    batched: bool
    timeout_s: float
    tolerant: bool = False


@dataclass
class Scored:
    """Scores of some completions by one reward.

    scores: one per completion; None for a completion that could not be scored.
    problem: the reason why one of these completions has no score, if it is known.
    """

    scores: list[float | None]
    problem: str = ""


@dataclass
class _Outcome:
    """Outcome of one call.

    scores: score of each completion by its index; None for a completion with a problem.
    what, fix: the last problem and what the user can do about it; empty if there was none.
    culprit: index of the completion that caused it, if known.
    whole: the problem concerns the whole call.
    ended: the process has ended or must be killed.
    """

    scores: dict[int, float | None] = field(default_factory=dict)
    what: str = ""
    fix: str = ""
    culprit: int | None = None
    whole: bool = False
    ended: bool = False


class FunctionProcess:
    """One process for all functions of a run. It starts at the first call, and at the next call after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._finalizer: weakref.finalize | None = None

    def __enter__(self) -> FunctionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, function: UserFunction) -> None:
        """Import the function's file, so that a fault in it ends the run before anything else is loaded."""
        outcome = self._call(_to_call(function, IMPORT_TIMEOUT_S))
        if outcome.what:
            self.close()
            what = f"importing it {outcome.what}" if outcome.ended else outcome.what
            raise UserError(f"{function.file}: {what}. {_sentence('fix the file' if outcome.ended else outcome.fix)}")

    def score(
        self,
        function: UserFunction,
        prompts: Sequence[str],
        completions: Sequence[str],
        rows: Sequence[Row],
    ) -> Scored:
        """Call the function; the result has a finite score per completion, or None if the function is tolerant.

        Raises UserError with the function, the reason and, if it is known, the completion.
        """
        scored = Scored([None] * len(completions))
        waiting = list(range(len(completions)))
        for restarts in range(MAX_RESTARTS + 1):
            if self._process is None:
                self.load(function)  # the time limit of a call does not include the import
            picked = [[values[i] for i in waiting] for values in (prompts, completions, rows)]
            outcome = self._call(_to_call(function, function.timeout_s, *picked), patient=function.tolerant)
            for index, score in outcome.scores.items():
                scored.scores[waiting[index]] = score
            scored.problem = outcome.what or scored.problem
            if not outcome.what or (function.tolerant and not outcome.whole and not outcome.ended):
                return scored
            if outcome.culprit is None or not function.tolerant or restarts == MAX_RESTARTS or outcome.whole:
                self.close()  # otherwise late replies to this call would be read as replies to the next one
                where = "" if outcome.culprit is None else _place(waiting[outcome.culprit], completions)
                raise UserError(f"reward function '{function.label}' {outcome.what}{where}. {_sentence(outcome.fix)}")
            self.close()
            waiting = [row for i, row in enumerate(waiting) if i not in outcome.scores and i != outcome.culprit]
            if not waiting:
                return scored
        raise AssertionError("the last restart returns or raises")

    def close(self) -> None:
        """Kill the process and the processes that it has started."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._connection = self._finalizer = None

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONUNBUFFERED": "1",  # shows the function's prints at once
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from align.reward.worker import main; main()", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # a process group, so that its children can be killed with it
            )
        self._connection = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours, os.getpid())
        return ours

    def _call(self, call: Call, patient: bool = False) -> _Outcome:
        """Send a call and collect its replies, until the first problem or, if `patient`, until the last reply.

        With `batched` false, the time limit applies to each completion.
        """
        outcome = _Outcome()
        connection = self._connection or self._start()
        awaiting = False
        try:
            connection.send(call)
            deadline = time.monotonic() + call.timeout_s
            while True:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    if not outcome.whole:  # otherwise only the search for the culprit took too long
                        outcome.what, outcome.fix = took_too_long(call.timeout_s).args
                    break
                match connection.recv():
                    case ("score", index, score):
                        outcome.scores[index] = score
                    case ("problem", index, what, fix):
                        outcome.what, outcome.fix, outcome.culprit = what, fix, index
                        outcome.whole = outcome.whole or index is None
                        if index is not None:
                            outcome.scores[index] = None
                            if outcome.whole or not patient:
                                return outcome
                    case ("awaiting",):
                        awaiting = True
                    case _:
                        return outcome
                if not call.batched:
                    deadline = time.monotonic() + call.timeout_s + (GRACE_S if awaiting else 0.0)
        except (EOFError, OSError):
            outcome.what, outcome.fix = f"ended its process ({self._exit_status()})", FIX
        outcome.ended, outcome.culprit = True, None
        if not call.batched and not awaiting and call.completions:
            # Completions are scored in order, so the first one without a reply hangs or crashes.
            outcome.culprit = next((i for i in range(len(call.completions)) if i not in outcome.scores), None)
        return outcome

    def _exit_status(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _end(process: subprocess.Popen, connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # called when a fork of the owner exits
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def _to_call(function: UserFunction, timeout_s: float, *arguments: list[Any]) -> Call:
    file = os.path.abspath(function.file) if function.file else ""
    return Call(file, function.name, function.batched, timeout_s, *arguments)


def _sentence(fix: str) -> str:
    return f"{fix[:1].upper()}{fix[1:]}."


def _place(index: int, completions: Sequence[str]) -> str:
    return f" for completion {index} ({completions[index][:60]!r})"
