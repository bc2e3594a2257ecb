"""Run programs that a model wrote, and tests against them, in a process without access to the rest of the machine.

    sandbox = Sandbox()
    sandbox.run_program("print(int(input()) + 1)", "41").output             # "42\\n"
    sandbox.run_tests("def f(x): return x + 1", ["assert f(1) == 2"]).passed   # [True]

A call may come from any thread. Each run starts one process (about 30 ms) and leaves none behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from align.errors import UserError
from align.reward.sandbox import wire
from align.reward.sandbox.confine import missing_wall, readable_paths
from align.reward.sandbox.launcher import Job

BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from align.reward.sandbox.launcher import main; main()"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
"""The whole environment of a program: no secrets of this process, and sets in the same order in every run."""
KEPT_ERRORS = 4096
"""Bytes kept of the end of standard error."""
INSIDE = "/sandbox"
"""Path of this package inside bubblewrap."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    wall_s: seconds until the run is killed.
    cpu_s: processor seconds of each process.
    memory_bytes: address space of each process.
    output_bytes: bytes of standard output, after which the run is killed.
    """

    wall_s: float = 20.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class ProgramRun:
    """Result of a program.

    output: standard output.
    ended: the program ended by itself with exit status 0.
    problem: the reason why it did not; empty otherwise.
    seconds: duration, including the start of the process.
    """

    output: str
    ended: bool
    problem: str
    seconds: float


@dataclass(frozen=True)
class TestRun:
    """Result of tests, one entry per test.

    passed: None for a test that passes something to the program that is not plain data, so that it cannot be run.
    reasons: why a test failed; empty if it passed.
    seconds: duration of all tests, including the start of the process.
    """

    passed: list[bool | None]
    reasons: list[str]
    seconds: float


class Sandbox:
    """Runs programs and tests in confined processes with limits.

    limits: limits of each run.
    unsafe: run without confinement, under the limits only.
    python: interpreter; default: the one that runs this process.
    bubblewrap: path of bwrap as an additional layer, or "" for none. Default: bwrap on the PATH, if it works.

    Raises UserError if this machine cannot confine processes and `unsafe` is false.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        unsafe: bool = False,
        python: str | None = None,
        bubblewrap: str | None = None,
    ):
        self.limits = limits or Limits()
        self.confined = not unsafe
        self.python = python or os.path.realpath(sys.executable)
        self.bubblewrap = ""
        if not unsafe:
            if reason := missing_wall():
                raise UserError(
                    f"sandbox: this machine cannot confine a program that a model wrote: {reason}. Run it on Linux "
                    "5.13 or later, or set `unsafe: true` to run such programs with this user's rights."
                )
            self.bubblewrap = find_bubblewrap(self.python) if bubblewrap is None else bubblewrap

    def run_program(self, code: str, stdin: str = "") -> ProgramRun:
        """Run a whole program with `stdin` as its standard input."""
        job, mark = self._job(code, tests=False)
        ran = self._run([job], stdin.encode(errors="surrogateescape"), mark)
        problem = ran.stopped
        if not problem and ran.status:
            problem = ran.errors.strip().rpartition("\n")[2] or _describe_status(ran.status)
        return ProgramRun(ran.output.decode(errors="replace"), not problem, problem[:300], ran.seconds)

    def run_tests(
        self, code: str, tests: list[str], *, setup: str = "", entry_points: list[str] | None = None
    ) -> TestRun:
        """Run a program, then tests in a process of their own, which calls what the program defines.

        tests: Python statements, run in order; a test passes if it does not raise.
        setup: statements that run before the first test.
        entry_points: names that are the program's even if a built-in function has the same name.
        """
        job, mark = self._job(code, tests=True)
        verdict = secrets.token_hex(16)
        frame = {"mark": verdict, "setup": setup, "tests": tests, "entry_points": entry_points or []}
        ran = self._run([job, frame], b"", mark)
        passed: list[bool | None] = []
        reasons = []
        for line in ran.output.decode(errors="replace").splitlines():
            found, _, rest = line.partition(" ")
            if found == verdict and len(passed) < len(tests):
                word, _, reason = rest.partition(" ")
                passed.append({"passed": True, "unsupported": None}.get(word, False))
                reasons.append(reason)
        missing = len(tests) - len(passed)
        reason = ran.stopped or f"the tests' process ended: {_describe_status(ran.status)}"
        return TestRun(passed + [False] * missing, reasons + [reason] * missing, ran.seconds)

    def _job(self, code: str, *, tests: bool) -> tuple[dict, str]:
        mark, limits = secrets.token_hex(16), self.limits
        job = Job(code, mark, tests=tests, confined=self.confined, cpu_s=limits.cpu_s, memory_bytes=limits.memory_bytes)
        return vars(job), mark

    def _run(self, frames: list[dict], stdin: bytes, mark: str) -> _Run:
        """Start the launcher, feed it and read what it prints after the mark. Raises UserError without the mark."""
        start = time.monotonic()
        root = INSIDE if self.bubblewrap else str(_package_root())
        command = [self.python, "-s", "-P", "-S", "-c", BOOT, root]
        if self.bubblewrap:
            command = [self.bubblewrap, *bubblewrap_options(self.python), *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # a process group, which can be killed as a whole
        )
        assert process.stdin is not None
        data = b"".join(map(wire.frame, frames)) + stdin
        output_bytes = self.limits.output_bytes + len(mark) + 1
        try:
            output, errors, stopped = _exchange(process, data, start + self.limits.wall_s, output_bytes)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if self.bubblewrap and status > 128:  # as a shell, bwrap reports the signal that ended its child
            status = 128 - status
        first, _, rest = output.partition(b"\n")
        text = errors.decode(errors="replace")
        if first != mark.encode():
            if stopped != TIMEOUT:
                last = text.strip().rpartition("\n")[2] or _describe_status(status)
                raise UserError(
                    f"sandbox: the launcher failed before the program was run: {last}. Run `align doctor`, which says "
                    "what this machine lacks."
                )
            rest = b""
        return _Run(rest, text, stopped, status, time.monotonic() - start)


@dataclass(frozen=True)
class _Run:
    """output: after the mark. errors: end of standard error. stopped: the limit that ended the run, if any.
    status: as of `Popen.wait`."""

    output: bytes
    errors: str
    stopped: str
    status: int
    seconds: float


TIMEOUT = "it took longer than the time limit"
TOO_MUCH = "it printed more than the limit"


def _exchange(
    process: subprocess.Popen[bytes], data: bytes, deadline: float, output_bytes: int
) -> tuple[bytes, bytes, str]:
    """Write `data` to a process and read its output until it ends; returns (output, end of errors, limit reached)."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors, view = bytearray(), bytearray(), memoryview(data)
    stdin, stdout, stderr = process.stdin.fileno(), process.stdout.fileno(), process.stderr.fileno()
    os.set_blocking(stdin, False)
    with selectors.DefaultSelector() as selector, process.stdout, process.stderr:
        selector.register(stdin, selectors.EVENT_WRITE)
        reading = {stdout, stderr}
        for descriptor in reading:
            selector.register(descriptor, selectors.EVENT_READ)
        while reading:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return bytes(output), bytes(errors), TIMEOUT
            for key, _ in selector.select(remaining):
                if key.fd == stdin:
                    view = _write_some(stdin, view)
                    if not view:
                        selector.unregister(stdin)
                        process.stdin.close()
                    continue
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fd)
                    reading.discard(key.fd)
                elif key.fd == stdout:
                    output += part
                    if len(output) > output_bytes:
                        return bytes(output[:output_bytes]), bytes(errors), TOO_MUCH
                else:
                    errors = (errors + part)[-KEPT_ERRORS:]
    # It is reaped by the caller, after its process group has been killed: until then its number is not reused.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return bytes(output), bytes(errors), TIMEOUT
        time.sleep(0.0005)
    return bytes(output), bytes(errors), ""


def _write_some(descriptor: int, view: memoryview) -> memoryview:
    """Write what a pipe takes; returns the rest, empty if the reader is gone."""
    try:
        return view[os.write(descriptor, view[: 1 << 16]) :]
    except BlockingIOError:
        return view
    except BrokenPipeError:
        return view[:0]


def _describe_status(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed at a limit of processor time or memory"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


# --- bubblewrap ----------------------------------------------------------------------------------------------


def _package_root() -> Path:
    """Folder that has the package `align`."""
    import align

    assert align.__file__ is not None
    return Path(align.__file__).parent.parent


def bubblewrap_options(python: str) -> list[str]:
    """Options of bwrap: own namespaces, without network, and only Python, its libraries and this package visible."""
    package = Path(__file__).parent
    options = ["--unshare-all", "--die-with-parent", "--dev", "/dev"]
    for path in [python, *(path for path in readable_paths() if not path.startswith("/dev/"))]:
        options += ["--ro-bind", path, path]
    for source, name in (
        (_package_root() / "align" / "__init__.py", "align/__init__.py"),
        (_package_root() / "align" / "errors.py", "align/errors.py"),
        (package.parent / "__init__.py", "align/reward/__init__.py"),
        (package, "align/reward/sandbox"),
    ):
        options += ["--ro-bind", str(source), f"{INSIDE}/{name}"]
    return [*options, "--chdir", "/"]


@cache
def find_bubblewrap(python: str) -> str:
    """Path of bwrap if it is on the PATH and may create namespaces; otherwise ""."""
    path = shutil.which("bwrap")
    if path is None:
        return ""
    command = [path, *bubblewrap_options(python), python, "-s", "-P", "-S", "-c", "pass"]
    try:
        ran = subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return path if ran.returncode == 0 else ""


def layers(sandbox: Sandbox) -> str:
    """The layers of a sandbox, for a message."""
    if not sandbox.confined:
        return "none, limits only"
    inner = "Landlock, seccomp and limits"
    return f"{inner}, inside bubblewrap" if sandbox.bubblewrap else inner
