"""Several processes and several machines."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import torch

from align.config.parallel import Offload, Parallel
from align.launch import machines
from align.launch import processes as launch
from align.launch.devices import own_gpu
from align.parallel import async_io, offload
from align.parallel import group as processes

from .here import IN_PARENTHESES, NUMBER, PORT, Here, wrong

MEETING = rf"{PORT}|{IN_PARENTHESES}|\d+(?= minutes)"
TWICE = "127.0.0.1 slots=1\n127.0.0.1 slots=1\n"
TWO = "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"


def started(here: Here, hosts: str | None, *words: str, where: str = "hosts") -> str:
    """Run `align run` with a hostfile, outside any launcher."""
    for name in launch.PLACE:
        here.monkeypatch.delenv(name, raising=False)
    if hosts is not None:
        here.write("hosts", hosts)
    here.recipe(micro_batch_size=2)
    return here.align("run", "recipe.yaml", "--run-dir", "run", "--hostfile", where, *words)


def checked(here: Here, hosts: str, *words: str) -> str:
    here.write("hosts", hosts)
    here.recipe(micro_batch_size=2)
    return here.align("check", "recipe.yaml", "--hostfile", "hosts", *words)


def in_place(here: Here, **variables: str) -> str:
    """Run `align run --nproc 2` with these variables of a launcher."""
    for name in launch.PLACE:
        here.monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        here.monkeypatch.setenv(name, value)
    here.recipe(micro_batch_size=2)
    return here.align("run", "recipe.yaml", "--run-dir", "run", "--nproc", "2")


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


def together(here: Here, port: int, name: str) -> None:
    """Connect to the other machine of a two-machine hostfile, as the machine `name`."""
    here.monkeypatch.setenv("MASTER_PORT", str(port))
    here.monkeypatch.setattr(machines, "MEETING", 0.6)
    launch.meet_others({"127.0.0.1": 1, "127.0.0.2": 1}, name)


@wrong("hostfile-missing", "A missing hostfile")
def _(here: Here) -> str:
    return started(here, None, where="nowhere")


@wrong("hostfile-not-text", "A hostfile that is not text")
def _(here: Here) -> str:
    (here.folder / "hosts").write_bytes(b"\x7fELF\x80")
    return started(here, None)


@wrong("hostfile-no-slots", "A line of a hostfile without slots")
def _(here: Here) -> str:
    return started(here, "127.0.0.1\n")


@wrong("hostfile-slots-not-a-number", "Slots that are not a number")
def _(here: Here) -> str:
    return started(here, "127.0.0.1 slots=two\n")


@wrong("hostfile-no-machine", "Slots without a machine")
def _(here: Here) -> str:
    return started(here, "slots=2\n")


@wrong("hostfile-line", "A hostfile line with an unknown entry")
def _(here: Here) -> str:
    return started(here, "127.0.0.1 max_slots=4\n")


@wrong("hostfile-machine-twice", "A machine listed twice")
def _(here: Here) -> str:
    return started(here, TWICE)


@wrong("hostfile-machine-twice-checked", "A machine listed twice, in `align check`")
def _(here: Here) -> str:
    return checked(here, TWICE)


@wrong("hostfile-empty", "A hostfile without a machine")
def _(here: Here) -> str:
    return started(here, "# none yet\n")


@wrong("hostfile-slots", "A sum of slots other than the number of processes")
def _(here: Here) -> str:
    return started(here, "127.0.0.1 slots=3\n", "parallel.processes=2")


@wrong("hostfile-slots-checked", "A sum of slots other than the number of processes, in `align check`")
def _(here: Here) -> str:
    return checked(here, "127.0.0.1 slots=3\n", "parallel.processes=2")


@wrong("hostfile-slots-do-not-divide", "A batch that the slots cannot divide evenly")
def _(here: Here) -> str:
    return checked(here, "127.0.0.1 slots=400\n")


@wrong("hostfile-unknown-machine", "A machine that cannot be resolved")
def _(here: Here) -> str:
    return started(here, "no-such-machine.invalid slots=1\n")


@wrong("hostfile-without-this-machine", "A hostfile without this machine", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    return started(here, "192.0.2.7 slots=1\n")  # an address that no machine has


@wrong("master-port", "A `MASTER_PORT` that is not a port")
def _(here: Here) -> str:
    here.monkeypatch.setenv("MASTER_PORT", "http")
    here.write("hosts", TWO)
    here.recipe(micro_batch_size=2)
    return here.align("run", "recipe.yaml", "--hostfile", "hosts", "parallel.processes=2")


@wrong("port-in-use", "A port in use on the first machine", varies=PORT)
def _(here: Here) -> None:
    with socket.create_server(("", 0)) as holder:
        together(here, holder.getsockname()[1], "127.0.0.1")


@wrong("port-of-something-else", "Another program on the first machine's port", varies=PORT)
def _(here: Here) -> None:
    with socket.create_server(("", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        together(here, server.getsockname()[1], "127.0.0.2")


@wrong("machine-not-there", "A machine that does not connect in time", varies=MEETING)
def _(here: Here) -> None:
    together(here, launch.free_port(), "127.0.0.1")


@wrong("first-machine-not-there", "A first machine that does not respond in time", varies=MEETING)
def _(here: Here) -> None:
    together(here, launch.free_port(), "127.0.0.2")


@wrong("rank-alone", "Ranks of another launcher that cannot connect to each other", varies=MEETING)
def _(here: Here) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    for name, value in place.items():
        here.monkeypatch.setenv(name, value)
    here.monkeypatch.setattr(machines, "MEETING", 1.0)
    processes.connect({})


@wrong("other-number-of-processes", "A number of ranks that differs from the recipe's")
def _(here: Here) -> str:
    return in_place(here, **PLACE | {"WORLD_SIZE": "3"})


@wrong("world-without-rank", "`WORLD_SIZE` without `RANK`")
def _(here: Here) -> str:
    return in_place(here, WORLD_SIZE="2")


@wrong("rank-without-world", "`RANK` without `WORLD_SIZE`")
def _(here: Here) -> str:
    return in_place(here, RANK="0")


@wrong("rank-not-a-number", "A `RANK` that is not a number")
def _(here: Here) -> str:
    return in_place(here, **PLACE | {"RANK": "zero"})


@wrong("rank-beyond-the-last", "A `RANK` that is not below `WORLD_SIZE`")
def _(here: Here) -> str:
    return in_place(here, **PLACE | {"RANK": "5"})


@wrong("slurm-rank-beyond-the-last", "A Slurm rank that is not below the number of tasks")
def _(here: Here) -> str:
    return in_place(here, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="9")


@wrong("rank-master-port", "A `MASTER_PORT` that is not a port, for a started rank")
def _(here: Here) -> str:
    return in_place(here, **PLACE | {"MASTER_PORT": "abc"})


@wrong("rank-without-address", "A rank without `MASTER_ADDR`")
def _(here: Here) -> str:
    return in_place(here, RANK="0", WORLD_SIZE="2")


@wrong("local-rank-without-gpu", "More ranks on a machine than it has GPUs")
def _(here: Here) -> None:
    here.monkeypatch.setenv("LOCAL_RANK", "3")
    own_gpu(visible=2)


@wrong("gpu-of-two-ranks", "Two ranks that see the same GPU")
def _(here: Here) -> None:
    here.monkeypatch.setattr(processes, "exchange", lambda own: [own, own])
    here.monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    here.monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    processes.check_gpus("GPU-8f1c2a of gpu-01")


@wrong("offload-does-not-fit", "Offloaded state that does not fit in memory", varies=NUMBER)
def _(here: Here) -> None:
    offload.require_space(Parallel(offload=Offload(optimizer="cpu")), 10**15, "float32", machines=1)


@wrong("offload-without-folder", "A missing folder for nvme")
def _(here: Here) -> None:
    nvme = Offload(optimizer="nvme", path=str(Path("nowhere")))
    offload.require_space(Parallel(offload=nvme), 1, "float32", machines=1)


@wrong("offload-without-folder-checked", "A file instead of a folder for nvme, in `align check`")
def _(here: Here) -> str:
    here.recipe()
    return here.align("check", "recipe.yaml", "parallel.offload={optimizer: nvme, path: rows.jsonl}")


@wrong("nvme-without-libaio", "Offloading to nvme without libaio")
def _(here: Here) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    here.monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    async_io.require_async_io()


@wrong("nvme-without-compiler", "Offloading to nvme without a compiler", varies=IN_PARENTHESES)
def _(here: Here) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def load(self, verbose=False):
        raise RuntimeError("Error building extension 'async_io'")

    here.monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    here.monkeypatch.setattr(AsyncIOBuilder, "load", load)
    async_io.require_async_io()
