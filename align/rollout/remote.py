"""Rollouts by vLLM servers: work is shared out, a dead server's part is done by the others, weights stay in step."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from align.config.rollout import Rollout
from align.errors import UserError
from align.models.family import read_config
from align.rollout.base import (
    Completion,
    GenerationReport,
    SamplingSettings,
    SyncReport,
    WeightSource,
    check_prompts,
    completion_seed,
)
from align.rollout.routing import moe_layers
from align.rollout.serve import StartedServer
from align.rollout.server import Server, ServerFailure, everywhere
from align.rollout.sync.send import checkpoint_weights, send_weights
from align.rollout.sync.transport import Delivery, GpuTransfer, InTheRequest, SharedMemory, ToServers, free_port
from align.rollout.vllm_options import check_checkpoint, check_temperature, sampling_options

MOST_STARTS = 4
"""Times that a server is started in a run; one that dies more often has another trouble."""
MOST_TRIES = 3
"""Servers on which one completion may fail before it is the completion's fault."""


@dataclass
class Job:
    """A completion to be made: its place in the answer, the prompt, vLLM's sampling parameters."""

    place: int
    prompt: list[int]
    sampling: dict
    tries: int = 0


class RemoteEngine:
    """`RolloutEngine` on servers that run elsewhere or that it starts.

    checkpoint: the published weights of version 0, which all servers are given first, whatever they hold. A server
    that fails is left out until it has been given the current weights from the beginning: at the next update, or, when
    none is left, at once from the last `offer_weights`. Each completion has its own seed, so it does not matter who
    makes it. One completion is one request; `rollout.request_timeout_seconds` ends a server that hangs.
    """

    def __init__(self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int):
        check_checkpoint(checkpoint, rollout)
        self.rollout = rollout
        self.dtype_name, self.dtype = dtype, getattr(torch, dtype)
        self.last_generation: GenerationReport | None = None
        self.last_sync: SyncReport | None = None
        self.version = 0
        self._run = secrets.token_hex(4)
        self._source: WeightSource | None = partial(checkpoint_weights, checkpoint)
        self._delivery: tuple[str, tuple[str, ...], Delivery] | None = None
        self._top_k = moe_layers(read_config(checkpoint)) if rollout.return_routing else None
        self.servers = self._servers(checkpoint, dtype, seed)
        try:
            self._await(self.servers, restart=False)
            if missing := [server for server in self.servers if server.failure]:
                raise UserError(self._none_answers(missing))
            self.last_sync = self._synchronise(self._source(), 0, self.servers)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        check_prompts(prompts, sampling, self.rollout.max_model_length)
        check_temperature(sampling.temperature)
        jobs = deque(
            Job(
                place=index * sampling.n + sample,
                prompt=list(prompt),
                sampling=sampling_options(sampling, completion_seed(sampling.seed, index, sample)),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        )
        done: dict[int, Completion] = {}
        count, retried, started = len(jobs), 0, time.perf_counter()
        while len(done) < count:
            retried += self._work(jobs, done, self._usable())
        completions = [done[place] for place in range(count)]
        self.last_generation = GenerationReport(
            seconds=time.perf_counter() - started,
            completions=count,
            prompt_tokens=sum(len(c.prompt_ids) for c in completions),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            retried=retried,
        )
        return [completions[i : i + sampling.n] for i in range(0, count, sampling.n)]

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Give every server that answers the new weights; those that failed before take part again."""
        self._source = None
        self._start_again()
        answering = [server for server in self.servers if server.failure is None or self._answers(server)]
        if not answering:
            self._await(self.servers, restart=True)
            answering = self._in_use()
        if not answering:
            raise UserError(self._none_answers(self.servers))
        self.version = version
        self.last_sync = self._synchronise(named_tensors, version, answering)
        return self.last_sync

    def offer_weights(self, source: WeightSource) -> None:
        self._source = source

    def sleep(self) -> None:
        """With `rollout.sleep`, let the servers that were started for it give their GPU memory to the trainer."""
        if self.rollout.sleep:
            everywhere(self._in_use(), lambda server: server.sleep(self.rollout.request_timeout_seconds))

    def wake(self) -> None:
        if self.rollout.sleep:
            everywhere(self._in_use(), lambda server: server.wake(self.rollout.request_timeout_seconds))

    def close(self) -> None:
        """End the servers that were started here; others go on."""
        if self._delivery is not None:
            self._delivery[2].close()
            self._delivery = None
        for server in self.servers:
            if isinstance(server, StartedServer):
                server.forget()
        self.servers = []

    # --- servers ---------------------------------------------------------------------------------------------

    def _servers(self, checkpoint: Path, dtype: str, seed: int) -> list[Server]:
        started: list[Server] = []
        ranks = self.rollout.tensor_parallel_size
        for i in range(self.rollout.start_servers):
            devices = _devices(i, ranks)
            server = StartedServer(checkpoint, self.rollout, dtype=dtype, seed=seed, port=free_port(), devices=devices)
            server.start()
            started.append(server)
        return started or [Server(url) for url in self.rollout.servers]

    def _await(self, servers: Iterable[Server], *, restart: bool) -> None:
        """Wait until all answer that still may; what they say about themselves must fit the recipe."""
        waiting = [server for server in servers if server.failure]
        deadline = time.monotonic() + self.rollout.start_timeout_seconds
        while waiting:
            waiting = [server for server in waiting if not self._answers(server)]
            if restart:
                self._start_again()
            waiting = [server for server in waiting if not _has_ended(server)]
            if time.monotonic() > deadline:
                return
            if waiting:
                time.sleep(0.2)

    def _answers(self, server: Server) -> bool:
        """Whether the server is there; if so it counts as usable, once it has been given the weights."""
        if not server.is_healthy():
            return False
        try:
            server.read_facts()
            server.wake(self.rollout.request_timeout_seconds)  # another trainer may have left it asleep
        except ServerFailure as failure:
            server.failure = str(failure)
            return False
        self._check_facts(server)
        server.failure = None
        return True

    def _check_facts(self, server: Server) -> None:
        if int(server.facts["max_model_length"]) < self.rollout.max_model_length:
            raise UserError(
                f"the server at {server.url} has max_model_length {server.facts['max_model_length']}, less than "
                f"rollout.max_model_length {self.rollout.max_model_length}: start it with --max-model-length "
                f"{self.rollout.max_model_length}."
            )
        if server.facts["dtype"] != self.dtype_name:
            raise UserError(
                f"the server at {server.url} computes in {server.facts['dtype']}, the recipe in {self.dtype_name}: "
                f"start it with --dtype {self.dtype_name}."
            )
        if self.rollout.return_routing and server.facts["routing"] != "True":
            raise UserError(
                f"the server at {server.url} returns no routed experts (rollout.return_routing): start it on a GPU "
                "with --return-routing, or use rollout.engine vllm."
            )

    def _in_use(self) -> list[Server]:
        return [server for server in self.servers if server.failure is None]

    def _usable(self) -> list[Server]:
        """Servers with the current weights. When none is left they are waited for and given the weights again."""
        if usable := self._in_use():
            return usable
        lost = self._none_answers(self.servers)
        self._start_again()
        self._await((s for s in self.servers if isinstance(s, StartedServer) and not s.has_ended()), restart=True)
        for server in self.servers:
            if server.failure is not None and not isinstance(server, StartedServer):
                self._answers(server)
        found = self._in_use()
        if not found:
            raise UserError(lost)
        if self._source is None:
            raise UserError(f"{lost[:-1]}; they are back, but without the weights: continue with --resume.")
        before = self.last_sync
        report = self._synchronise(self._source(), self.version, found)
        if before is not None and report.checksum != before.checksum:
            for server in self.servers:
                server.failure = "it holds weights of another update"
            raise UserError(f"{lost[:-1]}; the weights of the last update are gone: continue with --resume.")
        return [server for server in found if server.failure is None]

    def _start_again(self) -> None:
        for server in self.servers:
            if isinstance(server, StartedServer) and server.failure and server.starts < MOST_STARTS:
                hangs = server.seconds_since_start() > self.rollout.start_timeout_seconds and not server.is_healthy()
                if server.has_ended() or hangs:
                    server.start()

    def _none_answers(self, servers: Iterable[Server]) -> str:
        reasons = []
        for server in servers:
            reason = server.failure or "it failed"
            if isinstance(server, StartedServer) and server.has_ended():
                reason = f"it ended: {server.last_words()}"
            reasons.append(f"{server.url} ({reason})")
        only = "" if len(reasons) == 1 else f"none of {len(reasons)} rollout servers, "
        return f"no rollout server answers: {only}{', '.join(reasons)}."

    # --- weights ---------------------------------------------------------------------------------------------

    def _synchronise(self, stream: Iterable[tuple[str, Tensor]], version: int, servers: list[Server]) -> SyncReport:
        transport = ToServers(servers, self._deliver_to(servers), self._run, self.rollout.request_timeout_seconds)
        for server in self.servers:
            if server not in servers and server.failure is None:
                server.failure = "it missed an update of the weights"
        try:
            return send_weights(stream, transport, version, bucket_mib=self.rollout.bucket_mib, dtype=self.dtype)
        except ServerFailure:
            raise UserError(self._none_answers(servers)) from None
        except BaseException:
            for server in servers:
                server.failure = server.failure or "an update of its weights broke off"
            raise
        finally:
            transport.close()

    def _deliver_to(self, servers: list[Server]) -> Delivery:
        """The transport that fits the servers, kept as long as they are the same."""
        kind = self._transfer_kind(servers)
        urls = tuple(server.url for server in servers)
        if self._delivery is not None:
            if self._delivery[0] == kind and (kind in ("shared_memory", "http") or self._delivery[1] == urls):
                return self._delivery[2]
            self._delivery[2].close()
            self._delivery = None
        delivery: Delivery
        if kind == "shared_memory":
            delivery = SharedMemory()
        elif kind == "http":
            delivery = InTheRequest()
        else:
            size, timeout = self.rollout.bucket_mib * 2**20, self.rollout.request_timeout_seconds
            delivery = GpuTransfer(kind, servers, size, timeout)
        self._delivery = kind, urls, delivery
        return delivery

    def _transfer_kind(self, servers: list[Server]) -> str:
        wanted = self.rollout.weight_transfer
        offered = {server.facts["transfer"] for server in servers}
        local = all(server.is_local for server in servers)
        kind = wanted if wanted != "auto" else "nccl" if offered == {"nccl"} else "shared_memory" if local else "http"
        needed = "host" if kind in ("shared_memory", "http") else kind
        if offered != {needed}:
            raise UserError(
                f"rollout.weight_transfer {kind} does not fit a server that was started for {min(offered - {needed})}: "
                f"start it with --weight-transfer {needed}."
            )
        if kind == "shared_memory" and not local:
            raise UserError("rollout.weight_transfer shared_memory needs servers on this machine: set it to http.")
        if kind in ("nccl", "ipc") and not torch.cuda.is_available():
            raise UserError(
                f"rollout.weight_transfer {kind} needs a GPU here too: start the servers with --weight-transfer host."
            )
        return kind

    # --- completions -----------------------------------------------------------------------------------------

    def _work(self, jobs: deque[Job], done: dict[int, Completion], servers: list[Server]) -> int:
        """Let the servers work off the jobs until all are done or their server has failed; how many jobs came back."""
        label = f"{self._run}:{self.version}"
        problems: list[UserError] = []
        retried = 0
        lock = threading.Lock()

        def work(server: Server) -> None:
            nonlocal retried
            while server.failure is None and not problems:
                try:
                    job = jobs.popleft()
                except IndexError:
                    return
                try:
                    timeout = self.rollout.request_timeout_seconds
                    completion = server.generate(job.prompt, job.sampling, label, timeout=timeout, top_k=self._top_k)
                    done[job.place] = completion
                except ServerFailure as failure:
                    with lock:
                        server.failure = str(failure)
                        job.tries += 1
                        retried += 1
                        jobs.appendleft(job)
                    if job.tries >= MOST_TRIES:
                        problems.append(
                            UserError(f"a completion failed on {job.tries} servers, on the last with: {failure}.")
                        )
                except UserError as error:
                    problems.append(error)

        workers = [server for server in servers for _ in range(self.rollout.max_sequences)]
        # The first workers of all servers come before the second ones, so that few jobs are shared out evenly.
        workers = [workers[i] for i in sorted(range(len(workers)), key=lambda i: i % self.rollout.max_sequences)]
        with ThreadPoolExecutor(max_workers=min(len(workers), len(jobs))) as pool:
            list(pool.map(work, workers))
        if problems:
            raise problems[0]
        return retried


def _has_ended(server: Server) -> bool:
    return isinstance(server, StartedServer) and server.has_ended()


def _devices(server: int, ranks: int) -> list[str] | None:
    """GPUs of the n-th started server, counted from the end, where the trainer is least likely to be."""
    if not torch.cuda.is_available():
        return None
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [name for name in names if name] or [str(i) for i in range(torch.cuda.device_count())]
    if (server + 1) * ranks > len(visible):
        raise UserError(
            f"rollout.start_servers asks for {(server + 1) * ranks} GPUs, but {len(visible)} are visible: lower it."
        )
    end = len(visible) - server * ranks
    return visible[end - ranks : end]
