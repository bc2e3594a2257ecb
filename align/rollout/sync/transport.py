"""How new weights reach vLLM servers: through shared memory, in the request, or by vLLM's own GPU transports."""

from __future__ import annotations

import base64
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from align.errors import UserError
from align.rollout.server import Server, ServerFailure, everywhere
from align.rollout.sync.stream import Bucket, pack, packed_size

SHARED_MEMORY = Path("/dev/shm")


class Delivery(Protocol):
    """Brings one bucket to servers that expect one."""

    def prepare(self, bucket: Bucket) -> Any:
        """Take a copy of the bucket."""
        ...

    def deliver(self, prepared: Any, servers: list[Server], timeout: float) -> None:
        """Hand that copy over; servers that fail are marked."""
        ...

    def close(self) -> None: ...


class ToServers:
    """`Transport` to several servers at a time. One that fails is marked and left out; the others go on.

    While the servers load a bucket, the next one is prepared.
    """

    def __init__(self, servers: list[Server], delivery: Delivery, run: str, timeout: float):
        self.servers, self.delivery, self.run, self.timeout = servers, delivery, run, timeout
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[None] | None = None

    @property
    def engines(self) -> int:
        return len(self.servers)

    def start(self) -> None:
        def begin(server: Server) -> None:
            # Requests that a trainer gave up, or left behind when it died, are dropped, and with them all prefixes
            # computed by the old weights.
            server.call("POST", "/pause?mode=abort", timeout=self.timeout)
            if not server.call("POST", "/reset_prefix_cache", timeout=self.timeout)["success"]:
                raise ServerFailure("it did not empty its prefix cache")
            try:
                server.call("POST", "/start_weight_update", timeout=self.timeout)
            except ServerFailure:  # perhaps an update was left unfinished
                try:
                    server.call("POST", "/update_weights", _update(abandon=True), timeout=self.timeout)
                except ServerFailure:
                    server.call("POST", "/start_weight_update", timeout=self.timeout)

        self._everywhere(begin)

    def send(self, bucket: Bucket) -> None:
        prepared = self.delivery.prepare(bucket)
        self._settle()
        self._under_way = self._pool.submit(self.delivery.deliver, prepared, self.servers, self.timeout)

    def finish(self, digests: dict[str, str], version: int) -> None:
        def complete(server: Server) -> None:
            server.call("POST", "/update_weights", _update(digests=digests), timeout=self.timeout)
            label = {"weight_version": f"{self.run}:{version}"}
            server.call("POST", "/finish_weight_update", label, timeout=self.timeout)
            server.call("POST", "/resume", timeout=self.timeout)

        self._settle()
        self._everywhere(complete)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _everywhere(self, action: Any) -> None:
        self.servers = everywhere(self.servers, action)
        if not self.servers:
            raise ServerFailure("no server is left to take the weights")

    def _settle(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()
            self._everywhere(lambda server: None)


class SharedMemory:
    """Safetensors in a file of /dev/shm that the servers map: two files in turn, one being read, one written."""

    def __init__(self) -> None:
        folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        self._files = [tempfile.mkstemp(prefix="align-weights-", suffix=".safetensors", dir=folder) for _ in range(2)]
        self._turn = 0

    def prepare(self, bucket: Bucket) -> str:
        self._turn = 1 - self._turn
        descriptor, path = self._files[self._turn]
        size = packed_size(bucket)
        os.ftruncate(descriptor, size)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a page that is missing later would end the process
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{Path(path).parent} has no room for a bucket of {size / 2**20:.0f} MiB: lower rollout.bucket_mib, or "
                "set rollout.weight_transfer: http."
            ) from None
        pack(bucket, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        return path

    def deliver(self, prepared: str, servers: list[Server], timeout: float) -> None:
        everywhere(servers, lambda s: s.call("POST", "/update_weights", _update(path=prepared), timeout=timeout))

    def close(self) -> None:
        for descriptor, path in self._files:
            os.close(descriptor)
            Path(path).unlink(missing_ok=True)
        self._files = []


class InTheRequest:
    """Safetensors in base64, to any machine."""

    def prepare(self, bucket: Bucket) -> str:
        buffer = torch.empty(packed_size(bucket), dtype=torch.uint8)
        pack(bucket, buffer)
        return base64.b64encode(buffer.numpy().data).decode()

    def deliver(self, prepared: str, servers: list[Server], timeout: float) -> None:
        everywhere(servers, lambda s: s.call("POST", "/update_weights", _update(body=prepared), timeout=timeout))

    def close(self) -> None:
        pass


class GpuTransfer:
    """vLLM's NCCL or CUDA-IPC transport, driven bucket by bucket.

    Its trainer engines bracket everything they send by a start and a finish of their own; here those belong to the
    whole update, so the client that they talk through leaves them out.
    """

    def __init__(self, kind: str, servers: list[Server], bucket_bytes: int, timeout: float):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self.source = bucket_source()
        self.timeout = timeout
        info: Any
        if kind == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            ranks = sum(int(server.facts["ranks"]) for server in servers)
            local = all(server.is_local for server in servers)
            info = NCCLTrainerInitInfo(
                rank=0,
                master_address="127.0.0.1" if local else socket.gethostbyname(socket.gethostname()),
                master_port=free_port(),
                world_size=1 + ranks,
                packed_buffer_size_bytes=bucket_bytes,
            )
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
        client = _BucketClient(servers, timeout)
        self._engine: Any = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def prepare(self, bucket: Bucket) -> Bucket:
        return [(name, tensor.cuda().clone() if tensor.is_cuda else tensor.cuda()) for name, tensor in bucket]

    def deliver(self, prepared: Bucket, servers: list[Server], timeout: float) -> None:
        """A server that dies in a broadcast leaves the others inside it, so a failure here fails them all."""
        self.source.bucket = prepared
        sending = ThreadPoolExecutor(max_workers=1)
        try:
            sending.submit(self._engine.send_weights).result(timeout)
        except Exception as error:
            for server in servers:
                server.failure = f"the transfer of weights failed ({error or type(error).__name__})"
        finally:
            sending.shutdown(wait=False)

    def close(self) -> None:
        self._engine.shutdown()


def bucket_source() -> Any:
    """A `vllm` WeightSource over one bucket at a time, its `bucket`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class BucketSource(WeightSource):
        bucket: Bucket = []

        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.bucket]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.bucket)

    return BucketSource()


class _BucketClient:
    """`VLLMWeightSyncClient` to several servers, whose start and finish the whole update has already."""

    def __init__(self, servers: list[Server], timeout: float):
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        self.servers = servers
        self.clients = {server.url: HTTPVLLMWeightSyncClient(server.url, timeout) for server in servers}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, rank = {}, init_info.get("rank_offset", 1)
        for server in self.servers:
            infos[server.url] = init_info | ({"rank_offset": rank} if "rank_offset" in init_info else {})
            rank += int(server.facts["ranks"])
        self._all(lambda server: self.clients[server.url].init_weight_transfer_engine(infos[server.url]))

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self._all(lambda server: self.clients[server.url].update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def _all(self, action: Any) -> None:
        with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
            list(pool.map(action, self.servers))


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _update(**info: Any) -> dict[str, Any]:
    return {"update_info": info}
