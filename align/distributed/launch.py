"""Start a run's processes on this machine and end them together. Nothing here imports torch or DeepSpeed.

A process finds its place in the variables that torchrun, `accelerate launch` and this module set: RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Under `srun` they are made from Slurm's.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from align.config.parallel import Parallel
from align.errors import UserError

PORT = 29500
"""Where rank 0 listens when there are several machines; on one machine a free port is taken."""
GRACE = 5.0
"""Seconds between asking the other ranks to end and killing them."""


PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of_its_own() -> dict[str, str]:
    """For a process that a rank starts and that must not take itself for that rank."""
    return {key: value for key, value in os.environ.items() if key not in PLACE and not key.startswith("SLURM_")}


def is_rank() -> bool:
    """True in a process that something has started as one of several (torchrun, accelerate, Slurm, this module)."""
    # In a batch script Slurm sets SLURM_PROCID and SLURM_NTASKS too; only srun's tasks are in a step.
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(slurm_place(dict(os.environ)))
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def slurm_place(slurm: dict[str, str]) -> dict[str, str]:
    """torchrun's variables from those that `srun` sets for a task."""
    first = first_host(slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost")
    job = int(slurm.get("SLURM_JOB_ID", "0"))
    machines = int(slurm.get("SLURM_STEP_NUM_NODES") or slurm.get("SLURM_NNODES") or "1")
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        # Offloading asks how many ranks share a machine's memory.
        "LOCAL_WORLD_SIZE": str(max(1, int(slurm["SLURM_STEP_NUM_TASKS"]) // machines)),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", first),
        # Two jobs on a machine must not meet: each has a port of its own.
        "MASTER_PORT": slurm.get("MASTER_PORT", str(20000 + job % 10000)),
    }


def first_host(nodes: str) -> str:
    """First host of Slurm's short form: `gpu[07-09,12],login` is gpu07."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each machine, in the file's order; lines are `host slots=N`, `#` begins a comment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"parallel.hostfile: {path} cannot be read ({error}); check the path.") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None
        if match is None or words[0] in hosts:
            raise UserError(f"{path}: line {number}: write each machine once, as 'host slots=N'.")
        hosts[words[0]] = int(match[1])
    if not hosts:
        raise UserError(f"{path}: no machine in it; write lines 'host slots=N'.")
    return hosts


def local_places(parallel: Parallel) -> tuple[list[dict[str, str]], str, int]:
    """(variables of each rank of this machine, address of rank 0, its port)."""
    if parallel.hostfile is None:
        hosts, here, address, port = {"localhost": parallel.processes}, "localhost", "127.0.0.1", free_port()
    else:
        hosts = read_hostfile(Path(parallel.hostfile))
        total = sum(hosts.values())
        if total != parallel.processes:
            raise UserError(
                f"{parallel.hostfile}: {total} slots for {parallel.processes} processes; make parallel.processes and "
                "the sum of the slots equal."
            )
        for host in hosts:
            resolve(host, parallel.hostfile)
        here = this_machine(hosts, parallel.hostfile)
        address, port = next(iter(hosts)), int(os.environ.get("MASTER_PORT", PORT))
        if here == address:
            require_free(port)
    first = 0
    for host, slots in hosts.items():
        if host == here:
            break
        first += slots
    places = [
        {
            "RANK": str(first + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(parallel.processes),
            "LOCAL_WORLD_SIZE": str(hosts[here]),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        for local in range(hosts[here])
    ]
    return places, address, port


def resolve(host: str, where: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise UserError(f"{where}: the machine '{host}' cannot be found; check its name.") from None


def this_machine(hosts: dict[str, int], where: str) -> str:
    own = {socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()}
    addresses = {"127.0.0.1", "::1"}
    for name in own:
        try:
            addresses |= resolve(name, where)
        except UserError:
            continue
    for host in hosts:
        if host in own or resolve(host, where) & addresses:
            return host
    raise UserError(
        f"{where}: this machine ({socket.gethostname()}) is not among {', '.join(hosts)}; start `align run` on those."
    )


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(port: int) -> None:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UserError(
                f"port {port} is in use on this machine; end what uses it, or set MASTER_PORT to another everywhere."
            ) from None


def start(arguments: list[str], parallel: Parallel, logs: Path) -> None:
    """Run `align ARGUMENTS` as this machine's ranks; returns when all have finished.

    Rank 0 prints. What a rank writes to stderr goes to logs/rank-N.log. When one fails the others are ended, its
    error is printed and the process exits with its code.
    """
    places, _, _ = local_places(parallel)
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    files: dict[int, Path] = {}
    # A launcher that is asked to end must not leave its ranks behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for place in places:
            rank = int(place["RANK"])
            files[rank] = logs / f"rank-{rank}.log"
            threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share_of_cores(len(places)))}
            with open(files[rank], "wb") as log:
                processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "align.cli", *arguments],
                    env={**os.environ, **threads, **place},
                    stdout=None if rank == 0 else log,
                    stderr=log,
                )
        failed = wait(processes)
    finally:
        end(processes)
        signal.signal(signal.SIGTERM, before)
    if failed is None:
        return
    rank = failed
    text = files[rank].read_text(encoding="utf-8", errors="replace").strip()
    code = processes[rank].returncode
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"rank {rank} was ended by {name} (see {files[rank]}); continue with --resume.")
    sentence = re.search(r"error:(?:\x1b\[0m)? (.*)", text, re.DOTALL)
    if code == 2 and sentence:
        raise UserError(sentence[1])
    print(text, file=sys.stderr)
    print(f"rank {rank} failed; the whole of its log is {files[rank]}", file=sys.stderr)
    sys.exit(code)


def share_of_cores(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def wait(processes: dict[int, subprocess.Popen[bytes]]) -> int | None:
    """The first rank that failed, or None when all have finished well.

    Ranks that meet the same error end within moments of each other; the lowest one speaks for all. One that was
    killed, or that failed alone, drags the others along with errors about their connection: it comes before them.
    """
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        bad = [rank for rank, code in sorted(codes.items()) if code not in (None, 0)]
        if bad:
            return min(bad, key=lambda rank: (codes[rank] not in (2, -signal.SIGKILL), rank))
        if all(code == 0 for code in codes.values()):
            return None
        time.sleep(0.1)


def end(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    """End what still runs: first asked, then killed."""
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
