"""Weight updates to vLLM servers, and the two transfer kinds that need no GPU: shared memory and HTTP."""

from __future__ import annotations

import base64
import errno
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from align.errors import UserError
from align.rollout.server import Server, ServerFailure, on_all
from align.rollout.sync.stream import Bucket, pack, packed_size

SHARED_MEMORY = Path("/dev/shm")

Deliver = Callable[[list[Server], float], None]
"""Sends one prepared bucket to servers within a timeout in seconds; marks servers that fail."""


class Delivery(Protocol):
    """A way to send buckets to servers during an update."""

    def prepare(self, bucket: Bucket) -> Deliver:
        """Copy the bucket, and return the function that sends the copy."""
        ...

    def close(self) -> None: ...


class ToServers:
    """`Transport` to several servers in parallel.

    A server that fails is marked and dropped, and the update continues with the others. The next bucket is prepared
    while the servers load the previous one.
    """

    def __init__(self, servers: list[Server], delivery: Delivery, run: str, timeout: float):
        self.servers, self.delivery, self.run, self.timeout = servers, delivery, run, timeout
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    @property
    def engines(self) -> int:
        return len(self.servers)

    def start(self) -> None:
        def begin(server: Server) -> None:
            # Abort requests that a trainer gave up on or that outlived it, and clear the prefix cache, which was
            # computed with the old weights.
            server.call("POST", "/pause?mode=abort", timeout=self.timeout)
            if not server.call("POST", "/reset_prefix_cache", timeout=self.timeout)["success"]:
                raise ServerFailure("it did not empty its prefix cache")
            try:
                server.call("POST", "/start_weight_update", timeout=self.timeout)
            except ServerFailure:  # an earlier update may be unfinished
                try:
                    server.call("POST", "/update_weights", update_body(abandon=True), timeout=self.timeout)
                except ServerFailure:
                    server.call("POST", "/start_weight_update", timeout=self.timeout)

        self._on_all(begin)

    def send(self, bucket: Bucket) -> None:
        deliver = self.delivery.prepare(bucket)
        self._settle()
        self._pending = self._pool.submit(deliver, self.servers, self.timeout)

    def finish(self, digests: dict[str, str], version: int) -> None:
        def complete(server: Server) -> None:
            server.call("POST", "/update_weights", update_body(digests=digests), timeout=self.timeout)
            label = {"weight_version": f"{self.run}:{version}"}
            server.call("POST", "/finish_weight_update", label, timeout=self.timeout)
            server.call("POST", "/resume", timeout=self.timeout)

        self._settle()
        self._on_all(complete)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _settle(self) -> None:
        """Wait until the pending bucket has been delivered, and drop the servers that failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            self._on_all(lambda server: None)

    def _on_all(self, action: Callable[[Server], object]) -> None:
        self.servers = on_all(self.servers, action)
        if not self.servers:
            raise ServerFailure("no server is left to take the weights")


class SharedMemory:
    """Safetensors in a file of /dev/shm that the servers map.

    Two files alternate: the servers read one while the next bucket is written to the other.
    """

    def __init__(self) -> None:
        folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        self._files = [tempfile.mkstemp(prefix="align-weights-", suffix=".safetensors", dir=folder) for _ in range(2)]
        self._current = 0

    def prepare(self, bucket: Bucket) -> Deliver:
        self._current = 1 - self._current
        descriptor, path = self._files[self._current]
        size = packed_size(bucket)
        os.ftruncate(descriptor, size)
        try:
            os.posix_fallocate(descriptor, 0, size)  # otherwise a full /dev/shm kills the process in the copy
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{Path(path).parent}: a bucket of {size / 2**20:.0f} MiB does not fit. Lower rollout.bucket_mib, or "
                "set rollout.weight_transfer: http."
            ) from None
        pack(bucket, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        return update_sender(path=path)

    def close(self) -> None:
        for descriptor, path in self._files:
            os.close(descriptor)
            Path(path).unlink(missing_ok=True)
        self._files = []


class HttpBody:
    """Safetensors as base64 in the body of a request, for servers on any machine."""

    def prepare(self, bucket: Bucket) -> Deliver:
        buffer = torch.empty(packed_size(bucket), dtype=torch.uint8)
        pack(bucket, buffer)
        return update_sender(body=base64.b64encode(buffer.numpy().data).decode())

    def close(self) -> None:
        pass


def transfer_kind(wanted: str, servers: list[Server]) -> str:
    """Transfer kind for these servers: shared_memory, http, nccl or ipc. wanted: rollout.weight_transfer.

    Raises UserError if the servers were not started for this kind, or if it cannot work from this process.
    """
    offered = {server.facts["transfer"] for server in servers}
    local = all(server.is_local for server in servers)
    kind = wanted if wanted != "auto" else "nccl" if offered == {"nccl"} else "shared_memory" if local else "http"
    needed = "host" if kind in ("shared_memory", "http") else kind
    if offered != {needed}:
        raise UserError(
            f"rollout.weight_transfer: {kind} needs servers started with --weight-transfer {needed}, but one was "
            f"started with {min(offered - {needed})}. Restart it with --weight-transfer {needed}."
        )
    if kind == "shared_memory" and not local:
        raise UserError(
            "rollout.weight_transfer: shared_memory needs servers on this machine. Set rollout.weight_transfer: http."
        )
    if kind in ("nccl", "ipc") and not torch.cuda.is_available():
        raise UserError(
            f"rollout.weight_transfer: {kind} needs a GPU on the trainer's machine too. Restart the servers "
            "with --weight-transfer host, and set rollout.weight_transfer: auto."
        )
    return kind


def update_sender(**info: str) -> Deliver:
    """Function that sends one `/update_weights` request to all servers."""

    def deliver(servers: list[Server], timeout: float) -> None:
        on_all(servers, lambda server: server.call("POST", "/update_weights", update_body(**info), timeout=timeout))

    return deliver


def update_body(**info: Any) -> dict[str, Any]:
    """Body of vLLM's `/update_weights` request; `sync.vllm_side` receives `info`."""
    return {"update_info": info}
