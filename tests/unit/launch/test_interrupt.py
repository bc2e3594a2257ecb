"""SIGTERM and Ctrl-C stop a training loop after a checkpoint, other code at once; `align` prints how to resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align.errors import Stopped
from align.run import interrupt

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _listening():
    with interrupt.listening():
        yield
    interrupt._Request.number, interrupt._Request.polled = 0, False


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two bytecodes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_does_not_poll_is_interrupted_at_once(number: int) -> None:
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.number == number


def test_a_loop_that_polls_sees_the_request_and_ignores_repeated_signals(capfd) -> None:
    assert not interrupt.stop_requested()
    send()
    send()  # a launcher and Slurm each send one
    assert interrupt.stop_requested()
    assert (
        capfd.readouterr().err
        == "SIGTERM: stopping with a checkpoint after this step, within 300 s; send it again to stop at once\n"
    )
    with pytest.raises(Stopped):
        interrupt.stop()


def test_a_second_request_interrupts_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "REPEATED", 0.0)
    interrupt.stop_requested()
    send()
    with pytest.raises(Stopped):
        send(signal.SIGINT)


def test_a_loop_that_stops_polling_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    monkeypatch.setattr(interrupt, "REPEATED", 0.1)
    interrupt.stop_requested()
    send()
    with pytest.raises(Stopped):
        time.sleep(10)


def test_after_the_loop_a_signal_interrupts_at_once_again() -> None:
    interrupt.stop_requested()
    interrupt.stop_polling()
    with pytest.raises(Stopped):
        send()


RUN = """
import os, signal, sys, time
from align import cli, pipeline
from align.run import interrupt

def run(recipe, run_dir, **_):
    if in_loop:
        interrupt.stop_requested()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    interrupt.stop()

in_loop = sys.argv.pop() == "loop"
pipeline.run = run
cli.main()
"""


@pytest.mark.parametrize("where", ["loop", "elsewhere"])
def test_the_command_exits_with_the_signals_status_and_prints_how_to_resume(where: str, tmp_path: Path) -> None:
    words = ["run", "tiny", "seed=3", "--run-dir", "a run", "--from", "sft", where]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    last = done.stderr.splitlines()[-1]
    assert last == "stopped by Ctrl-C; continue with `align run tiny seed=3 --run-dir 'a run' --resume`"


def test_no_timer_outlives_the_block() -> None:
    """A timer left by a finished run would interrupt the process that called `run` when the grace period is over."""
    with interrupt.listening():
        interrupt.stop_requested()
        send()
        assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    deadline = time.monotonic() + 5
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
