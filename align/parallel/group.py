"""The ranks of a run: join and leave the process group, and run work on rank 0 for all ranks."""

from __future__ import annotations

import gc
import hashlib
import ipaddress
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist

from align.config.recipe import Recipe
from align.errors import UserError
from align.launch import machines
from align.launch.devices import own_gpu, set_gpu_index
from align.launch.ending import mark_joined
from align.launch.route import route_to
from align.parallel.async_io import require_async_io
from align.parallel.sharding import world
from align.parallel.steps import ControlSteps
from align.run import interrupt

T = TypeVar("T")
COLLECTIVE = timedelta(minutes=30)
"""Time limit of a collective."""

_steps: ControlSteps | None = None
_cpu_group: dist.ProcessGroup | None = None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join(recipe: Recipe) -> None:
    """Connect this rank to the others. Every rank raises the same `UserError` if code, recipe or libraries differ."""
    parallel = recipe.parallel
    assert parallel is not None
    gpu = claim_gpu() if torch.cuda.is_available() else None
    if gpu is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quieten_deepspeed()
    connect(fingerprint(recipe), gpu)
    start_deepspeed("gloo" if gpu is None else "nccl")
    if "nvme" in (parallel.offload.optimizer, parallel.offload.parameters):
        require_async_io()


def claim_gpu() -> torch.device:
    """Make this rank's GPU the current one, for torch and for libraries that read LOCAL_RANK."""
    gpu = torch.device("cuda", own_gpu(torch.cuda.device_count()))
    set_gpu_index(gpu.index)
    torch.cuda.set_device(gpu)
    return gpu


def start_deepspeed(backend: str) -> None:
    """Initialise DeepSpeed's communication on torch's process group.

    DeepSpeed's shared-memory collectives, which only inference uses, are disabled. Loading them creates a lock file in
    the user's cache. A killed rank would leave the file behind, and every later run would wait forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, timeout=COLLECTIVE, verbose=False)
    # DeepSpeed creates its own groups without a time limit, and torch's default for NCCL is ten minutes.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=COLLECTIVE)


def connect(facts: dict[str, str], gpu: torch.device | None = None) -> None:
    """Create the process group, with NCCL if this rank has a GPU.

    Raises `UserError` if a rank is missing after `MEETING` seconds or unreachable, if `facts` differ between ranks, or
    if two ranks have the same GPU. These checks use gloo and come before NCCL connects the GPUs.
    """
    limit = timedelta(seconds=machines.MEETING)
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=limit))
        choose_interface(store, number, world)
        # The first group only waits for all ranks and compares them. It is separate because of its time limit, which
        # applies to all collectives of a group.
        first = dist.PrefixStore("meeting", store)
        dist.init_process_group("gloo", store=first, rank=number, world_size=world, timeout=limit)
        mark_joined()
        dist.barrier()
        check_equal({"the device (GPU or CPU)": "CPU" if gpu is None else "GPU", **facts})
        if gpu is not None:
            check_gpus(f"{torch.cuda.get_device_properties(gpu).uuid} of {socket.gethostname()}")
        dist.destroy_process_group()
        store.set_timeout(COLLECTIVE)
        dist.init_process_group(
            "gloo" if gpu is None else "nccl",
            store=store,
            rank=number,
            world_size=world,
            timeout=COLLECTIVE,
            # Given the device, NCCL connects all ranks now. Otherwise each pair would connect in its first send.
            device_id=gpu if world > 1 else None,
        )
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank()} could not connect to the other ranks at {address} ({reason}); start every machine within "
            f"{machines.MEETING / 60:.0f} minutes, and check that they can reach each other."
        ) from None


def choose_interface(store: dist.Store, number: int, world: int) -> None:
    """Make gloo use the network interface through which this rank reaches MASTER_ADDR.

    By default gloo uses the address of this machine's host name, which may be unreachable; see `route_to`.
    """
    here, there = route_to(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store.set(f"route/{number}", json.dumps([here, there]))
    routes = [json.loads(store.get(f"route/{other}")) for other in range(world)]
    # The machine at MASTER_ADDR reaches itself through the loopback interface; the others know its real address.
    seen = [to for own, to in routes if not ipaddress.ip_address(own).is_loopback and own != to]
    if ipaddress.ip_address(here).is_loopback and seen:
        here = seen[0]
    for name, addresses in psutil.net_if_addrs().items():
        if here in (entry.address.partition("%")[0] for entry in addresses) and seen:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def quieten_deepspeed() -> None:
    """Silence DeepSpeed's log below errors. It mostly lists settings, and the recipe has those that matter."""
    import logging

    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """Hashes and versions that must be equal on all ranks: align's code, the recipe, the libraries that compute."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    folders = os.walk(package, followlinks=True)  # reward, eval and recipes are symbolic links
    for file in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        code.update(file.relative_to(package).as_posix().encode())
        code.update(file.read_bytes())
    libraries = {}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed"):
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    # Machines may keep the hostfile at different paths; align's launchers have compared its content.
    settings = recipe.model_dump_json(exclude={"parallel": {"hostfile"}})
    recipe_hash = hashlib.sha256(settings.encode()).hexdigest()
    return {"the code of align": code.hexdigest(), "the recipe": recipe_hash, **libraries}


def check_equal(own: dict[str, str]) -> None:
    """Raise the same `UserError` on every rank if the value of `own` on a rank differs from rank 0's."""
    fingerprints = exchange(own)
    for number, other in enumerate(fingerprints):
        for what, value in fingerprints[0].items():
            if other.get(what) != value:
                refuse(
                    f"rank {number} differs from rank 0 in {what}; use the same versions and recipe on every machine."
                )


def check_gpus(own: str) -> None:
    """Raise the same `UserError` on every rank if two ranks have the same GPU. own: identifier of this rank's GPU."""
    gpus = exchange(own)
    for number, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < number:
            refuse(
                f"ranks {first} and {number} both use the GPU {gpu}; start at most one process per GPU of a machine, "
                "and let each process see all GPUs, or only its own."
            )


def exchange(own: T) -> list[T]:
    """All-gather `own`: the values of all ranks, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group=cpu_group())
    return found


def refuse(sentence: str) -> NoReturn:
    """Leave the process group and raise a `UserError`; all ranks must call this."""
    # A rank that exits while others are still connected to it can abort them (SIGABRT).
    dist.barrier()
    dist.destroy_process_group()
    raise UserError(sentence)


def is_main() -> bool:
    """True on rank 0, and in a run of one process."""
    return world()[0] == 0


def from_rank_0(step: str, make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only, and return its result on every rank.

    All ranks must call this with the same `step`. A `UserError` raised by `make` is raised on every rank. Any other
    exception ends the run with rank 0's traceback. The other ranks wait for `make` without a time limit.
    """
    if world()[1] == 1:
        return make()
    steps = control_steps()
    if not is_main():
        steps.enter(step)
        size = steps.wait_for_rank_0()
        steps.wait_for_all()
        received: T | UserError = pickle.loads(_broadcast_bytes(bytes(size)))
        return _opened(received)
    steps.enter(step, "working")
    try:
        outcome = _made(make)
        payload = pickle.dumps(outcome)
    except BaseException:
        steps.mark("failed")
        raise
    steps.mark("done", len(payload))
    steps.wait_for_all()
    _broadcast_bytes(payload)
    return _opened(outcome)


def _made(make: Callable[[], T]) -> T | UserError:
    try:
        return make()
    except UserError as error:
        return error


def _opened(outcome: T | UserError) -> T:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _broadcast_bytes(payload: bytes) -> bytes:
    """Broadcast rank 0's payload. The other ranks pass a payload of the same size, whose content is ignored."""
    box = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(box, src=0, group=cpu_group())
    return box.numpy().tobytes()


@contextmanager
def rank_0_last(step: str) -> Iterator[None]:
    """Context for collectives whose result only rank 0 writes or sends, so that rank 0 may finish long after the rest.

    The other ranks may finish at different times as well. At the end of the block they wait for rank 0 without a time
    limit.
    """
    if world()[1] == 1:
        yield
        return
    steps = control_steps()
    if not is_main():
        steps.enter(step)
        yield
        steps.wait_for_rank_0()
        return
    steps.enter(step, "working")
    try:
        yield
    except BaseException:
        steps.mark("failed")
        raise
    steps.mark("done")
    steps.wait_for_all()


def barrier(step: str) -> None:
    """Wait until every rank has reached `step`."""
    if world()[1] > 1:
        steps = control_steps()
        steps.enter(step)
        steps.wait_for_all()


def should_stop() -> bool:
    """True on every rank once any rank has been asked to stop. All ranks must call this between two training steps."""
    signal_number = interrupt.poll()
    if world()[1] > 1:
        box = torch.tensor(signal_number)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=cpu_group())
        signal_number = int(box)
    if signal_number:
        interrupt.note(signal_number)
    return signal_number > 0


def any_rank(value: bool) -> bool:
    """True on every rank if `value` is true on any. Collective."""
    if world()[1] == 1:
        return value
    box = torch.tensor(int(value))
    dist.all_reduce(box, dist.ReduceOp.MAX, group=cpu_group())
    return bool(box)


def control_steps() -> ControlSteps:
    """This rank's control steps, in the store of its process group."""
    global _steps
    if _steps is None:
        store = dist.distributed_c10d._get_default_store()
        _steps = ControlSteps(dist.PrefixStore("steps", store), *world())
    return _steps


def cpu_group() -> dist.ProcessGroup | None:
    """Process group of all ranks for tensors in host memory; None if the default group is a gloo group."""
    global _cpu_group
    if dist.get_backend() == "gloo":
        return None
    if _cpu_group is None:
        _cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    return _cpu_group


def forget_last_stage() -> None:
    """Free the last stage's engine, and reset its ZeRO settings, which transformers would apply to the next model."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    gc.collect()


def leave() -> None:
    """Leave the process group at the end of the run; all ranks must call this."""
    global _steps, _cpu_group
    if dist.is_initialized():
        barrier("end of the run")
        if _steps is not None:
            _steps.leave()
        dist.destroy_process_group()
        _steps = _cpu_group = None
