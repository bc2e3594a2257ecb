"""A rollout server that the trainer starts on this machine, restarts if it dies, and stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from align.config.rollout import Rollout
from align.launch.processes import environment_of_its_own
from align.rollout.placement import Placement
from align.rollout.server import Server

PARENT = "ALIGN_ROLLOUT_PARENT"
"""Environment variable with the process id of the trainer; the server ends when that process does."""
STOP_SECONDS = 10
"""Seconds to wait for the server to end after SIGTERM, and again after SIGKILL."""


class StartedServer(Server):
    """A server in a process group of its own, with its output in a log file.

    placement: the GPUs that it may use.
    starts: number of times that it has been started.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, port: int, placement: Placement):
        super().__init__(f"http://127.0.0.1:{port}")
        self._command = server_command(checkpoint, rollout, dtype=dtype, seed=seed, port=port, nccl=placement.nccl)
        self._environment = {**environment_of_its_own(), PARENT: str(os.getpid())}
        # The in-process engine sets this variable; a server runs its front end and its engine in two processes.
        self._environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        if placement.devices is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        descriptor, log = tempfile.mkstemp(prefix="align-server-", suffix=".log")
        os.close(descriptor)
        self._log = Path(log)

    def start(self) -> None:
        """Start the server, or stop and start it again."""
        self.stop()
        self.starts += 1
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seconds_since_start(self) -> float:
        return time.monotonic() - self._started

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def last_log_line(self) -> str:
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "its log is empty")[:500]

    def stop(self) -> None:
        """End the process group, even if the server itself is dead: its engine process may have outlived it."""
        if self.process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_SECONDS)
        self.process = None

    def close(self) -> None:
        """Stop the server and delete its log."""
        self.stop()
        self._log.unlink(missing_ok=True)


def server_command(checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, port: int, nccl: bool) -> list[str]:
    """Command line of `align serve-rollout` for these settings. nccl: False if NCCL cannot reach the server."""
    flags: dict[str, object] = {
        "port": port,
        "dtype": dtype,
        "seed": seed,
        "max-model-length": rollout.max_model_length,
        "max-sequences": rollout.max_sequences,
        "tensor-parallel-size": rollout.tensor_parallel_size,
    }
    if rollout.cache_gib is not None:
        flags["cache-gib"] = rollout.cache_gib
    transfer = rollout.weight_transfer
    if transfer == "auto" and not nccl:
        transfer = "shared_memory"
    if transfer != "auto":
        flags["weight-transfer"] = "host" if transfer in ("shared_memory", "http") else transfer
    command = [sys.executable, "-m", "align.cli", "serve-rollout", str(checkpoint)]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command += ["--no-prefix-caching"] * (not rollout.prefix_caching)
    command += ["--return-routing"] * rollout.return_routing
    command += ["--sleep"] * rollout.sleep
    return command
