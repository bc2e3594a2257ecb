"""Generation on vLLM servers.

Requests are distributed over the servers. The requests of a failed server are sent to other servers. All servers in use
have the same weights.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.rollout import Rollout
from align.errors import UserError
from align.models.family import load_config
from align.models.lora.whole import whole
from align.rollout.base import (
    Completion,
    GenerationReport,
    SamplingSettings,
    SyncReport,
    WeightSource,
    check_prompts,
    completion_seed,
)
from align.rollout.pool import ServerPool
from align.rollout.routing import moe_layers
from align.rollout.server import Server, ServerFailure, on_all
from align.rollout.started_server import StartedServer
from align.rollout.sync.gpu_transfer import GpuTransfer
from align.rollout.sync.send import checkpoint_weights, send_stream
from align.rollout.sync.transport import Delivery, HttpBody, SharedMemory, ToServers, transfer_kind
from align.rollout.vllm_options import check_model, check_temperature, sampling_options

MAX_TRIES = 3
"""Attempts per completion; the run ends if all of them fail."""


@dataclass
class Request:
    """One completion to generate.

    index: position in the result.
    prompt: token ids.
    sampling: vLLM's sampling parameters.
    tries: number of attempts that failed.
    """

    index: int
    prompt: list[int]
    sampling: dict[str, Any]
    tries: int = 0


class RemoteEngine:
    """`RolloutEngine` on servers that run already or that it starts.

    checkpoint: folder with the weights of version 0 in the published layout, or an adapter beside its base. The weights
        are sent to every server at the start, whatever weights the server has.

    A server that fails is not used again until it has received all current weights. They are sent with the next update
    or, if no other server is left, at once from the source that `offer_weights` set. Each completion has its own seed,
    so it does not depend on the server that generates it. Each completion is one request; a server that does not
    respond within `rollout.request_timeout_seconds` counts as failed.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int):
        # Servers read the files again when they are restarted.
        self._files = ExitStack()
        checkpoint = self._files.enter_context(whole(checkpoint))
        try:
            check_model(checkpoint, rollout, dtype=dtype)
        except BaseException:
            self._files.close()
            raise
        self.rollout = rollout
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.last_generation: GenerationReport | None = None
        self.last_sync: SyncReport | None = None
        self.version = 0
        self._run = secrets.token_hex(4)
        self._source: WeightSource | None = partial(checkpoint_weights, checkpoint)
        self._delivery: tuple[str, tuple[tuple[str, int], ...], Delivery] | None = None
        self._has_weights = False
        self._top_k = moe_layers(load_config(checkpoint)) if rollout.return_routing else None
        self.pool = ServerPool(checkpoint, rollout, dtype=dtype, seed=seed)
        try:
            self.pool.start()
            self.pool.wait(self.servers, restart=False)
            if missing := [server for server in self.servers if server.failure]:
                raise self.pool.no_server(missing)
            self.last_sync = self._synchronise(self._source(), 0, self.servers)
        except BaseException:
            self.close()
            raise

    @property
    def servers(self) -> list[Server]:
        return self.pool.servers

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        check_prompts(prompts, sampling, self.rollout.max_model_length)
        check_temperature(sampling.temperature)
        if not self._has_weights:
            raise RuntimeError("the servers dropped their weights when they slept; update them before generating")
        pending = deque(
            Request(
                index=index * sampling.n + sample,
                prompt=list(prompt),
                sampling=sampling_options(sampling, completion_seed(sampling.seed, index, sample)),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        )
        done: dict[int, Completion] = {}
        count, retried, started = len(pending), 0, time.perf_counter()
        while len(done) < count:
            retried += self._generate_pending(pending, done, self._servers_with_weights())
        completions = [done[index] for index in range(count)]
        self.last_generation = GenerationReport(
            seconds=time.perf_counter() - started,
            completions=count,
            prompt_tokens=sum(len(c.prompt_ids) for c in completions),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            retried=retried,
        )
        return [completions[i : i + sampling.n] for i in range(0, count, sampling.n)]

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send the new weights to every server that responds, including those that failed before."""
        self._source = None
        self.pool.restart()
        responding = [server for server in self.servers if server.failure is None or self.pool.connect(server)]
        if not responding:
            self.pool.wait(self.servers, restart=True)
            responding = self.pool.in_use()
        if not responding:
            raise self.pool.no_server(self.servers)
        self.version = version
        self.last_sync = self._synchronise(named_tensors, version, responding)
        return self.last_sync

    def offer_weights(self, source: WeightSource) -> None:
        self._source = source

    def sleep(self) -> None:
        """With `rollout.sleep`, let the servers that were started with `--sleep` release their GPU memory."""
        if self.rollout.sleep:
            self._has_weights = not any(server.sleeps for server in self.pool.in_use())
            on_all(self.pool.in_use(), lambda server: server.sleep(self.rollout.request_timeout_seconds))

    def wake(self) -> None:
        if self.rollout.sleep:
            on_all(self.pool.in_use(), lambda server: server.wake(self.rollout.request_timeout_seconds))

    def close(self) -> None:
        """Stop the servers that were started here; the others keep running."""
        if self._delivery is not None:
            self._delivery[2].close()
            self._delivery = None
        self.pool.close()
        self._files.close()

    # --- weights ---------------------------------------------------------------------------------------------

    def _servers_with_weights(self) -> list[Server]:
        """Servers with the current weights. If none is left, wait for some and send them the weights again."""
        if usable := self.pool.in_use():
            return usable
        lost, error = self.pool.failures(self.servers), self.pool.no_server(self.servers)
        self.pool.restart()
        self.pool.wait((server for server in self.pool.started() if not server.has_ended()), restart=True)
        for server in self.servers:
            if server.failure is not None and not isinstance(server, StartedServer):
                self.pool.connect(server)
        found = self.pool.in_use()
        if not found:
            raise error
        if self._source is None:
            raise UserError(f"{lost}; they respond again, but without the weights. Continue with --resume.")
        before = self.last_sync
        report = self._synchronise(self._source(), self.version, found)
        if before is not None and report.checksum != before.checksum:
            for server in self.servers:
                server.failure = "it has weights of another update"
            raise UserError(f"{lost}; the weights of the last update are gone. Continue with --resume.")
        return [server for server in found if server.failure is None]

    def _synchronise(self, stream: Iterable[tuple[str, Tensor]], version: int, servers: list[Server]) -> SyncReport:
        """Send a stream of weights to these servers; the others count as failed until their next update."""
        transport = ToServers(servers, self._delivery_to(servers), self._run, self.rollout.request_timeout_seconds)
        for server in self.servers:
            if server not in servers and server.failure is None:
                server.failure = "it missed a weight update"
        try:
            report = send_stream(stream, transport, version, bucket_mib=self.rollout.bucket_mib, dtype=self.dtype)
            self._has_weights = True
            return report
        except ServerFailure:
            raise self.pool.no_server(servers) from None
        except BaseException:
            for server in servers:
                server.failure = server.failure or "a weight update was interrupted"
            raise
        finally:
            transport.close()

    def _delivery_to(self, servers: list[Server]) -> Delivery:
        """Weight delivery for these servers.

        The previous delivery is reused if it has the same kind. For NCCL and IPC the servers must be the same, too.
        """
        kind = transfer_kind(self.rollout.weight_transfer, servers)
        connected = tuple((server.url, server.connections) for server in servers)
        if self._delivery is not None:
            if self._delivery[0] == kind and (kind in ("shared_memory", "http") or self._delivery[1] == connected):
                return self._delivery[2]
            self._delivery[2].close()
            self._delivery = None
        delivery: Delivery
        if kind == "shared_memory":
            delivery = SharedMemory()
        elif kind == "http":
            delivery = HttpBody()
        else:
            size, timeout = self.rollout.bucket_mib * 2**20, self.rollout.request_timeout_seconds
            delivery = GpuTransfer(kind, servers, size, timeout)
        self._delivery = kind, connected, delivery
        return delivery

    # --- completions -----------------------------------------------------------------------------------------

    def _generate_pending(self, pending: deque[Request], done: dict[int, Completion], servers: list[Server]) -> int:
        """Generate the pending requests until all are done or their servers have failed.

        Returns the number of requests that failed on a server and are pending again.
        """
        version = f"{self._run}:{self.version}"
        problems: list[UserError] = []
        retried = 0
        lock = threading.Lock()

        def work(server: Server) -> None:
            nonlocal retried
            while server.failure is None and not problems:
                try:
                    request = pending.popleft()
                except IndexError:
                    return
                try:
                    done[request.index] = server.generate(
                        request.prompt,
                        request.sampling,
                        version,
                        timeout=self.rollout.request_timeout_seconds,
                        top_k=self._top_k,
                    )
                except ServerFailure as failure:
                    with lock:
                        server.failure = str(failure)
                        request.tries += 1
                        retried += 1
                        pending.appendleft(request)
                    if request.tries >= MAX_TRIES:
                        problems.append(
                            UserError(
                                f"one completion failed on {request.tries} servers, the last time with: {failure}."
                            )
                        )
                except UserError as error:
                    problems.append(error)

        # One worker thread for each sequence that a server can decode concurrently. The workers alternate between the
        # servers, so that a small number of requests is distributed evenly.
        workers = [server for _ in range(self.rollout.max_sequences) for server in servers]
        with ThreadPoolExecutor(max_workers=min(len(workers), len(pending))) as pool:
            list(pool.map(work, workers))
        if problems:
            raise problems[0]
        return retried
