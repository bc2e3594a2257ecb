"""`align` in processes that are forked from one with all libraries loaded; loading them takes a rank over ten seconds.

Forked processes have one seed of Python's hashes, so a set of strings has the same order in all of them. A test that
compares runs therefore needs one run whose ranks were started the usual way, with `subprocess`.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from functools import cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000


@cache
def _context() -> Any:
    """multiprocessing's context, with a running fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.libraries"])
    with chdir(ROOT):  # the server finds `tests` in its working folder
        multiprocessing.forkserver.ensure_running()
    return context


class Forked:
    """A forked process that runs `call(*arguments)`; has the part of `subprocess.Popen` that the tests use.

    output: file for stdout and stderr; by default a temporary one.
    """

    def __init__(self, call: Callable[..., None], *arguments: Any, output: Path | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="align-forked-")
        self._output = output or Path(self._folder.name) / "output"
        self._process = _context().Process(target=_enter, args=(call, arguments, self._output))
        self._process.start()
        self.pid: int = self._process.pid
        atexit.register(self.kill)  # runs before multiprocessing waits for all processes

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the number of the signal that ended the process; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the process and its ranks, if the process still runs."""
        if self._process.is_alive():
            with suppress(ProcessLookupError):  # the process has not created its group yet
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.returncode

    def output(self) -> str:
        """The text of stdout and stderr so far, also of processes that this one has started."""
        return self._output.read_text(encoding="utf-8") if self._output.is_file() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; returns the text of stdout and stderr, and None."""
        self.wait(timeout)
        return self.output(), None


def align(
    words: list[str], environment: Mapping[str, str], folder: Path | None = None, network: str | None = None
) -> Forked:
    """Start `align WORDS` in a folder; its ranks, and the runs of a sweep, are forked too.

    network: name of the network namespace in which the processes run, as with `ip netns exec`.
    """
    return Forked(_launch, words, dict(environment), folder or Path.cwd(), network)


def script(file: Path, arguments: list[str], environment: Mapping[str, str], output: Path) -> Forked:
    """Start `python FILE ARGUMENTS`, with stdout and stderr in `output`."""
    return Forked(_run_script, file, arguments, dict(environment), output=output)


def _enter(call: Callable[..., None], arguments: tuple[Any, ...], output: Path) -> None:
    os.setsid()
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    call(*arguments)


def _run_script(file: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def _launch(words: list[str], environment: dict[str, str], folder: Path, network: str | None) -> None:
    """Run `align WORDS` in this process, which forks the ranks and runs that it would start."""
    from align.launch import processes
    from align.sweep import runner

    if network is not None:
        with open(f"/var/run/netns/{network}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    os.chdir(folder)
    forking: Any = SimpleNamespace(Popen=_fork_align, TimeoutExpired=subprocess.TimeoutExpired)
    processes.subprocess = runner.subprocess = forking
    _align(words, environment)


def _fork_align(
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    preexec_fn: Callable[[], None] = lambda: None,
    **streams: Any,
) -> subprocess.Popen[bytes]:
    """A forked process in place of `python -m align.cli WORDS`."""
    assert command[:3] == [sys.executable, "-m", "align.cli"]
    sys.stdout.flush()
    be_align = partial(_be_align, command[3:], dict(os.environ if env is None else env), preexec_fn)
    return subprocess.Popen(command, preexec_fn=be_align, **streams)


def _be_align(words: list[str], environment: dict[str, str], first: Callable[[], None]) -> NoReturn:
    """Call `first`, run `align WORDS` instead of the program that `Popen` would start now, and exit."""
    first()
    tracker = resource_tracker.getfd()  # multiprocessing knows this descriptor by its number
    os.closerange(3, tracker)
    os.closerange(tracker + 1, 4096)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    code: Any = 1
    try:
        _align(words, environment)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _align(words: list[str], environment: dict[str, str]) -> None:
    from align import cli

    os.environ.clear()
    os.environ.update(environment)
    cli.main(words)
