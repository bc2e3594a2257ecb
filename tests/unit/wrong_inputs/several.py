"""Several processes and several machines."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from align.config.parallel import Offload, Parallel
from align.config.recipe import Recipe
from align.distributed import async_io, launch, machines, processes, room

from .here import Here, wrong

TWO = "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"


def started(here: Here, hosts: str | None, *words: str, where: str = "hosts") -> str:
    """`align run` with a hostfile, in a process that nothing has started as a rank."""
    for name in launch.PLACE:
        here.monkeypatch.delenv(name, raising=False)
    if hosts is not None:
        here.write("hosts", hosts)
    here.recipe(micro_batch_size=2)
    return here.align("run", "recipe.yaml", "--run-dir", "run", "--hostfile", where, *words)


def together(here: Here, port: int, name: str) -> None:
    """The machines of the hostfile meet, and this is the one of that name."""
    here.monkeypatch.setenv("MASTER_PORT", str(port))
    here.monkeypatch.setattr(machines, "MEETING", 0.6)
    launch.meet_others({"127.0.0.1": 1, "127.0.0.2": 1}, name)


@wrong("hostfile-missing")
def _(here: Here) -> str:
    return started(here, None, where="nowhere")


@wrong("hostfile-line")
def _(here: Here) -> str:
    return started(here, "127.0.0.1\n")


@wrong("hostfile-empty")
def _(here: Here) -> str:
    return started(here, "# none yet\n")


@wrong("hostfile-slots")
def _(here: Here) -> str:
    return started(here, "127.0.0.1 slots=3\n", "parallel.processes=2")


@wrong("hostfile-slots-checked")
def _(here: Here) -> str:
    here.write("hosts", "127.0.0.1 slots=3\n")
    here.recipe(micro_batch_size=2)
    return here.align("check", "recipe.yaml", "parallel.processes=2", "--hostfile", "hosts")


@wrong("hostfile-unknown-machine")
def _(here: Here) -> str:
    return started(here, "no-such-machine.invalid slots=1\n")


@wrong("hostfile-of-others")
def _(here: Here) -> str:
    return started(here, "192.0.2.7 slots=1\n")  # an address that nobody has


@wrong("master-port")
def _(here: Here) -> str:
    here.monkeypatch.setenv("MASTER_PORT", "http")
    here.write("hosts", TWO)
    here.recipe(micro_batch_size=2)
    return here.align("run", "recipe.yaml", "--hostfile", "hosts", "parallel.processes=2")


@wrong("port-in-use")
def _(here: Here) -> None:
    with socket.create_server(("", 0)) as holder:
        together(here, holder.getsockname()[1], "127.0.0.1")


@wrong("port-of-something-else")
def _(here: Here) -> None:
    with socket.create_server(("", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        together(here, server.getsockname()[1], "127.0.0.2")


@wrong("machine-not-there")
def _(here: Here) -> None:
    together(here, launch.free_port(), "127.0.0.1")


@wrong("first-machine-not-there")
def _(here: Here) -> None:
    together(here, launch.free_port(), "127.0.0.2")


@wrong("rank-alone")
def _(here: Here) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    for name, value in place.items():
        here.monkeypatch.setenv(name, value)
    here.monkeypatch.setattr(machines, "MEETING", 1.0)
    processes.meet("gloo")


@wrong("other-number-of-processes")
def _(here: Here) -> None:
    here.monkeypatch.setenv("WORLD_SIZE", "3")
    processes.join(for_two())


@wrong("rank-without-address")
def _(here: Here) -> None:
    here.monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        here.monkeypatch.delenv(name, raising=False)
    processes.join(for_two())


def for_two() -> Recipe:
    source = {"kind": "file", "path": "rows.jsonl"}
    sft = {"kind": "sft", "data": {"train": [source]}, "micro_batch_size": 4}
    model = {"kind": "pretrained", "path": "model"}
    values = {"name": "t", "parallel": {"processes": 2}, "model": model, "stages": {"sft": sft}}
    return Recipe.model_validate(values)


@wrong("offload-without-room")
def _(here: Here) -> None:
    room.require_room(Parallel(offload=Offload(optimizer="cpu")), 10**15, "float32", machines=1)


@wrong("offload-without-folder")
def _(here: Here) -> None:
    nvme = Offload(optimizer="nvme", path=str(Path("nowhere")))
    room.require_room(Parallel(offload=nvme), 1, "float32", machines=1)


@wrong("offload-without-folder-checked")
def _(here: Here) -> str:
    here.recipe()
    return here.align("check", "recipe.yaml", "parallel.offload={optimizer: nvme, path: rows.jsonl}")


@wrong("nvme-without-libaio")
def _(here: Here) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    here.monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    async_io.require_async_io()


@wrong("nvme-without-compiler")
def _(here: Here) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def load(self, verbose=False):
        raise RuntimeError("Error building extension 'async_io'")

    here.monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    here.monkeypatch.setattr(AsyncIOBuilder, "load", load)
    async_io.require_async_io()
