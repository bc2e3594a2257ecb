"""`align` in processes that are forked from one with all libraries loaded; loading them takes a rank over ten seconds.

Forked processes have one seed of Python's hashes, so a set of strings has the same order in all of them. A test that
compares runs therefore needs one run whose ranks were started the usual way, with `subprocess`.

There are two such processes: one with the libraries of training, `TRAINING`, and one that has also loaded vLLM, `VLLM`.
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
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from functools import cache, partial
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any, NoReturn
from unittest.mock import patch

from align.rollout.started_server import PARENT

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000
TRAINING, VLLM = "tests.integration.libraries", "tests.integration.vllm_libraries"
"""Modules that import the libraries."""
_STARTING = threading.Lock()


@cache
def _server(libraries: str) -> ForkServer:
    """A running fork server that has imported the module `libraries`."""
    server = ForkServer()
    server.set_forkserver_preload([libraries])
    with chdir(ROOT):  # the server finds `tests` in its working folder
        server.ensure_running()
    return server


class Forked:
    """A forked process that runs `call(*arguments)`; has the part of `subprocess.Popen` that the tests use.

    output: file for stdout and stderr; by default a temporary one.
    libraries: the libraries that the process has loaded, `TRAINING` or `VLLM`.
    """

    def __init__(
        self, call: Callable[..., None], *arguments: Any, output: Path | None = None, libraries: str = TRAINING
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="align-forked-")
        self._output = output or Path(self._folder.name) / "output"
        context = multiprocessing.get_context("forkserver")
        self._process: Any = context.Process(target=_enter, args=(libraries, call, arguments, self._output))
        with _STARTING:  # servers are restarted in threads
            connect = _server(libraries).connect_to_new_process
            with patch.object(multiprocessing.forkserver, "connect_to_new_process", connect):
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

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

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
    words: list[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    *,
    network: str | None = None,
    changes: Mapping[str, Any] | None = None,
    libraries: str = TRAINING,
) -> Forked:
    """Start `align WORDS` in a folder; its ranks, and the runs of a sweep, are forked too.

    network: name of the network namespace in which the processes run, as with `ip netns exec`.
    changes: {"module.attribute": its value in the process}.
    """
    given = (words, dict(environment), folder or Path.cwd(), network, dict(changes or {}))
    return Forked(_launch, *given, libraries=libraries)


def script(
    file: Path,
    arguments: list[str],
    environment: Mapping[str, str],
    output: Path | None = None,
    libraries: str = TRAINING,
) -> Forked:
    """Start `python FILE ARGUMENTS`, with stdout and stderr in `output`."""
    return Forked(_run_script, file, arguments, dict(environment), output=output, libraries=libraries)


def popen(command: list[str], *, env: Mapping[str, str], stdout: IO[Any], **streams: Any) -> Forked:
    """A forked process with vLLM in place of `subprocess.Popen` of `python -m MODULE WORDS`; its engine is forked too.

    A rollout server ends when the fork server does, that is, with this process.
    """
    assert command[:2] == [sys.executable, "-m"]
    environment = dict(env)
    if PARENT in environment:
        environment[PARENT] = str(_server(VLLM)._forkserver_pid)
    return Forked(_run_module, command[2:], environment, output=Path(stdout.name), libraries=VLLM)


def replace_popen(patched: Any, module: ModuleType, start: Callable[..., Any] = popen) -> None:
    """Let `start` take the place of `subprocess.Popen` in a module. patched: a pytest `MonkeyPatch`."""
    kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    patched.setattr(module, "subprocess", SimpleNamespace(Popen=start, **kept))


def _enter(libraries: str, call: Callable[..., None], arguments: tuple[Any, ...], output: Path) -> None:
    os.setsid()
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import_module(libraries)  # the fork server ignores an ImportError
    call(*arguments)


def _run_script(file: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def _run_module(words: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _launch(
    words: list[str], environment: dict[str, str], folder: Path, network: str | None, changes: dict[str, Any]
) -> None:
    """Run `align WORDS` in this process, which forks the ranks and runs that it would start."""
    from align.launch import processes
    from align.sweep import runner

    for name, value in changes.items():
        module, attribute = name.rsplit(".", 1)
        setattr(import_module(module), attribute, value)
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
