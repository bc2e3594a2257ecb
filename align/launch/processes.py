"""Start a run's ranks on this machine and end them together. Imports neither torch nor DeepSpeed.

A rank is described by the environment variables that torchrun, `accelerate launch` and this module set: RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Under `srun` they are derived from Slurm's variables.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType

from align.config.parallel import Parallel
from align.config.paths import local_path
from align.errors import Stopped, UserError, signal_name
from align.launch.ending import STOPPED
from align.launch.machines import LOG_SENT, Alone, Failure, Follower, Leader, Others

PORT = 29500
"""Default of MASTER_PORT, the port on which the launcher on the first of several machines listens."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for ranks that still run when the run has failed or is stopped."""
STOP = 600.0
"""Seconds that the ranks have to save a checkpoint after a request to stop; after that they are ended."""


PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of_its_own() -> dict[str, str]:
    """Environment without the launchers' variables, for a process that a rank starts and that is not itself a rank."""
    return {key: value for key, value in os.environ.items() if key not in PLACE and not key.startswith("SLURM_")}


def is_rank() -> bool:
    """True in a process that a launcher (torchrun, accelerate, Slurm, this module) has started as a rank.

    Under `srun`, sets torchrun's variables. Raises `UserError` if only one of RANK and WORLD_SIZE is set.
    """
    # Slurm sets SLURM_PROCID and SLURM_NTASKS in batch scripts too, but SLURM_STEP_NUM_TASKS only in tasks of srun.
    if "RANK" not in os.environ and whole_number(os.environ, "SLURM_STEP_NUM_TASKS", "1") > 1:
        os.environ.update(slurm_place(dict(os.environ)))
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        (missing,) = {"RANK", "WORLD_SIZE"} - set(given)
        raise UserError(
            f"{given[0]} is set but {missing} is not, so it is unclear whether this process is a rank; set both, as "
            f"torchrun does, or unset {given[0]}."
        )
    return bool(given)


def whole_number(variables: Mapping[str, str], name: str, default: str = "") -> int:
    text = variables.get(name, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(f"{name} is '{text}', but must be a whole number; start align with a launcher that sets it.")
    return int(text)


def require_place(parallel: Parallel) -> None:
    """Raise `UserError` if the launcher's variables do not describe a rank of `parallel`."""
    world = whole_number(os.environ, "WORLD_SIZE")
    if world != parallel.processes:
        raise UserError(
            f"parallel.processes is {parallel.processes}, but {world} processes were started; set "
            f"parallel.processes={world}, or start {parallel.processes}."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {missing[0]} is not set; start align with torchrun, or unset WORLD_SIZE and "
            "RANK and pass --nproc."
        )
    _require_below(whole_number(os.environ, "RANK"), "RANK", world, "WORLD_SIZE")
    whole_number(os.environ, "LOCAL_RANK")
    master_port()


def _require_below(number: int, name: str, limit: int, total: str) -> None:
    if number >= limit:
        raise UserError(
            f"{name} is {number}, but {total} is {limit}; use each number from 0 to {limit - 1} for one process."
        )


def slurm_place(slurm: dict[str, str]) -> dict[str, str]:
    """torchrun's variables, derived from the variables that `srun` sets for a task."""
    first = first_host(slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost")
    job = whole_number(slurm, "SLURM_JOB_ID", "0")
    tasks = whole_number(slurm, "SLURM_STEP_NUM_TASKS")
    _require_below(whole_number(slurm, "SLURM_PROCID"), "SLURM_PROCID", tasks, "SLURM_STEP_NUM_TASKS")
    machines = int(slurm.get("SLURM_STEP_NUM_NODES") or slurm.get("SLURM_NNODES") or "1")
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        # The preflight check of offloading needs the number of ranks that share a machine's memory.
        "LOCAL_WORLD_SIZE": str(max(1, tasks // machines)),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", first),
        # Two jobs on the same machine need different ports.
        "MASTER_PORT": slurm.get("MASTER_PORT", str(20000 + job % 10000)),
    }


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: gpu07 for `gpu[07-09,12],login`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each machine, in the file's order. A line is `host slots=N`; `#` starts a comment."""
    try:
        text = local_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"parallel.hostfile: {path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"parallel.hostfile: {path} is not a text file; write lines 'host slots=N'.") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if problem := _line_problem(words, hosts):
            raise UserError(f"{path}: line {number}: {problem}.")
        hosts[words[0]] = int(words[1].removeprefix("slots="))
    if not hosts:
        raise UserError(f"{path}: it lists no machine; write lines 'host slots=N'.")
    return hosts


def _line_problem(words: list[str], hosts: dict[str, int]) -> str | None:
    """Description of the error in a hostfile's line, if any. hosts: the machines in the lines before."""
    host, *rest = words
    unknown = [word for word in rest if not word.startswith("slots=")] or rest[1:]
    if host.startswith("slots="):
        return f"'{host}' has no machine before it; write 'host {host}'"
    if host in hosts:
        return f"the machine '{host}' is listed twice; list it once, with all its slots"
    if unknown:
        return f"'{unknown[0]}' is not valid here; write 'host slots=N' and nothing else"
    if not rest:
        return f"'{host}' has no slots; write '{host} slots=N', with N processes"
    if not re.fullmatch("slots=[1-9][0-9]{0,5}", rest[0]):
        return f"'{rest[0]}' is not a valid number of processes; write slots=1 or more"
    return None


def slots_of(parallel: Parallel) -> dict[str, int]:
    """Slots of each machine of a run; raises `UserError` unless their sum is parallel.processes."""
    if parallel.hostfile is None:
        return {"localhost": parallel.processes}
    hosts = read_hostfile(Path(parallel.hostfile))
    total = sum(hosts.values())
    if total != parallel.processes:
        raise UserError(
            f"{parallel.hostfile}: it has {total} slots, but parallel.processes is {parallel.processes}; set "
            f"parallel.processes={total}, or change the slots."
        )
    return hosts


def machines_of(parallel: Parallel) -> tuple[dict[str, int], str]:
    """(slots of each machine of a run, name of this machine)."""
    hosts = slots_of(parallel)
    if parallel.hostfile is None:
        return hosts, "localhost"
    for host in hosts:
        resolve_host(host, parallel.hostfile)
    return hosts, this_machine(hosts, parallel.hostfile)


def meet_others(hosts: dict[str, int], here: str) -> tuple[Others, str, int]:
    """Wait for all machines; return (connection to the other machines, MASTER_ADDR and MASTER_PORT for the ranks)."""
    if len(hosts) == 1:
        return Alone(), "127.0.0.1", free_port()
    first, port = next(iter(hosts)), master_port()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    others: Leader | Follower
    if here == first:
        others = Leader(hosts, here, port)
        meeting_port = partial(others.gather, say, free_port(""))
    else:
        others = Follower(hosts, here, port)
        meeting_port = partial(others.gather, say)
    try:
        return others, first, meeting_port()
    except BaseException:
        others.close()
        raise


def master_port() -> int:
    text = os.environ.get("MASTER_PORT", str(PORT))
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) < 65536):
        raise UserError(f"MASTER_PORT is '{text}', but must be a port from 1 to 65535.")
    return int(text)


def local_places(hosts: dict[str, int], here: str, address: str, port: int) -> list[dict[str, str]]:
    """Environment variables of each rank on this machine. Ranks are numbered in the hostfile's order of machines."""
    names = list(hosts)
    first = sum(hosts[name] for name in names[: names.index(here)])
    return [
        {
            "RANK": str(first + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(sum(hosts.values())),
            "LOCAL_WORLD_SIZE": str(hosts[here]),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        for local in range(hosts[here])
    ]


def resolve_host(host: str, where: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise UserError(f"{where}: the machine '{host}' cannot be resolved; check its name.") from None


def this_machine(hosts: dict[str, int], where: str) -> str:
    """The entry of `hosts` that is this machine: by host name, otherwise by address."""
    own = {socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()}
    for host in hosts:
        if host in own:
            return host
    for host in hosts:
        if any(is_own(address) for address in resolve_host(host, where)):
            return host
    raise UserError(
        f"{where}: this machine ({socket.gethostname()}) is not listed; run align on {', '.join(hosts)}, or list it."
    )


def is_own(address: str) -> bool:
    """True for an address of this machine; a socket can only be bound to such an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_port(address: str = "127.0.0.1") -> int:
    with closing(socket.socket()) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def start(arguments: list[str], parallel: Parallel, logs: Path) -> None:
    """Run `align ARGUMENTS` as this machine's ranks; returns when the ranks of all machines have finished.

    Rank 0 prints to stdout; all other output of a rank goes to logs/rank-N.log. If a rank fails on any machine, all
    other ranks are ended. This process then prints the failed rank's error and exits with its exit status. SIGTERM and
    SIGINT are forwarded to the ranks.
    """
    hosts, here = machines_of(parallel)
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    files: dict[int, Path] = {}
    others: Others = Alone()
    stop = StopRequest(processes)
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        others, address, port = meet_others(hosts, here)
        for place in local_places(hosts, here, address, port):
            rank = int(place["RANK"])
            files[rank] = logs / f"rank-{rank}.log"
            threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share_of_cores(hosts[here]))}
            with open(files[rank], "wb") as log:
                processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "align.cli", *arguments],
                    env={**os.environ, **threads, **place},
                    stdout=None if rank == 0 else log,
                    stderr=log,
                )
        failure = wait(processes, files, others, f" on {here}" if len(hosts) > 1 else "", stop)
    finally:
        end(processes)
        others.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failure is None:
        return
    if failure.code in STOPPED:
        raise Stopped(failure.code - 128)
    if failure.sentence is not None:
        raise UserError(failure.sentence)
    print(failure.log, file=sys.stderr)
    print(failure.where, file=sys.stderr)
    sys.exit(failure.code)


class StopRequest:
    """Forwards SIGTERM and SIGINT to the ranks, which stop after the same step; a second signal ends them at once."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]):
        self.processes = processes
        self.number, self.since = 0, 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number or not self.processes:
            raise Stopped(self.number or number)
        self.number, self.since = number, time.monotonic()
        os.write(2, f"{signal_name(number)}: the ranks stop, with a checkpoint if they train\n".encode())
        for process in self.processes.values():
            process.send_signal(number)

    def is_over(self) -> bool:
        """True when all ranks have ended after a request, or `STOP` seconds have passed."""
        return bool(self.number) and (
            all(process.poll() is not None for process in self.processes.values())
            or time.monotonic() - self.since > STOP
        )


def failure_of(rank: int, code: int, file: Path, on: str) -> Failure:
    """The failure of a rank that exited with `code`. on: " on HOST" in a run on several machines, otherwise empty."""
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if code in STOPPED:
        return Failure(code, None, cause=True)
    if code < 0:
        name = signal.Signals(-code).name
        sentence = f"rank {rank}{on} was ended by {name} (see {file}); continue with --resume."
        return Failure(2, sentence, cause=code == -signal.SIGKILL)
    said = re.search(r"error:(?:\x1b\[0m)? (.*)", text, re.DOTALL)
    if code == 2 and said:
        return Failure(2, said[1], cause=True)
    where = f"rank {rank}{on} failed; the whole of its log is {file}"
    return Failure(code, None, log=text[-LOG_SENT:], where=where)


def share_of_cores(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def wait(
    processes: dict[int, subprocess.Popen[bytes]],
    files: dict[int, Path],
    others: Others,
    on: str,
    stop: StopRequest,
) -> Failure | None:
    """Wait for all ranks of all machines; return the failure to report, or None if all ranks have succeeded.

    If several ranks have failed, a rank with a user's error or SIGKILL is reported rather than a rank with a traceback,
    which may only have lost its connection. Otherwise the lowest failed rank is reported.
    """
    own: Failure | None = None
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        # After a request to stop, ranks exit with a status in `STOPPED`; the signal ends ranks that are still starting.
        expected = (None, 0, *STOPPED, -stop.number) if stop.number else (None, 0)
        bad = {rank: code for rank, code in codes.items() if code not in expected}
        if bad and own is None:
            rank = min(bad, key=lambda rank: (bad[rank] not in (2, -signal.SIGKILL), rank))
            own = failure_of(rank, bad[rank] or 0, files[rank], on)
        finished = all(code == 0 for code in codes.values())
        if own is None and stop.is_over() and not finished:
            own = Failure(128 + stop.number, None, cause=True)
        over, failure = others.turn(own, finished)
        if over:
            return failure


def end(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run: SIGTERM, then SIGKILL after `GRACE` seconds."""
    running = [process for process in processes.values() if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
