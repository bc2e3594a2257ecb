"""Settings of generation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.section import RUNTIME, Positive, Section

CPU_CACHE_GIB = 0.5
"""Size in GiB of the key/value cache on a CPU if `cache_gib` is not set."""


class Rollout(Section):
    """Generation of completions: engine, sampling, memory, servers."""

    engine: Literal["vllm", "remote", "huggingface"] = "vllm"
    """vllm: a vLLM engine in the trainer's process. remote: vLLM servers. huggingface: `generate` of transformers,
    which is slow, for machines without vLLM."""
    max_new_tokens: Positive = 64
    """Maximum tokens per completion. Completions without an end-of-sequence token are truncated there."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Sampling temperature; the trainer's log-probabilities use it too. 0: greedy decoding, for `evaluate` only."""
    max_model_length: Positive = 512
    """Maximum tokens of prompt and completion together. Must not exceed the model's max_position_embeddings."""
    cache_gib: Annotated[Annotated[float, Field(gt=0)] | None, RUNTIME] = None
    """Size of the key/value cache in GiB, per engine on a CPU and per GPU otherwise. Raise it if sequences wait for
    the cache. Default on a CPU: 0.5. Default on a GPU: a server takes 92 % of the GPU for weights and cache, which is
    vLLM's default; an engine in the trainer's process takes half of the GPU memory that is free when it starts. Must be
    set for a server that shares a GPU with the trainer."""
    max_sequences: Positive = 64
    """Maximum number of sequences decoded at the same time per engine."""
    prefix_caching: bool = True
    """Cache the keys and values of prompts, so that a shared beginning is computed once. Each weight update clears the
    cache."""
    return_routing: bool = False
    """Return the experts chosen for each token, for `routing_replay: rollout`. On a CPU this needs `engine: vllm`, and
    the prompt is computed once per completion."""
    sleep: Annotated[bool, RUNTIME] = False
    """Free the engine's GPU memory for the trainer between rollouts. The weights are dropped, since the next update
    replaces them. Applies to the engine in the trainer's process, to servers started by the trainer, and to servers
    started with `--sleep`."""
    bucket_mib: Annotated[Positive, RUNTIME] = 256
    """Size in MiB of the buckets in which weights are transferred to the engines."""
    servers: Annotated[list[str], RUNTIME] = Field(default_factory=list)
    """For `engine: remote`: URLs of running servers (`align serve-rollout`), for example `http://127.0.0.1:8001`."""
    start_servers: Annotated[int, Field(ge=0, le=256), RUNTIME] = 0
    """For `engine: remote` without `servers`: number of servers that the trainer starts on this machine, and restarts
    if one dies. Each gets `tensor_parallel_size` GPUs, counted from the last GPU; with `weight_transfer: ipc` it gets
    rank 0's GPU."""
    tensor_parallel_size: Annotated[Positive, RUNTIME] = 1
    """GPUs per server started by the trainer."""
    weight_transfer: Annotated[Literal["auto", "shared_memory", "http", "ipc", "nccl"], RUNTIME] = "auto"
    """For `engine: remote`: transfer of weights to the servers. shared_memory: a file in /dev/shm, for servers on the
    trainer's machine. http: in the request, for any server. ipc: for one server on rank 0's GPU. nccl: for servers on
    other GPUs than rank 0's. auto: nccl for servers on a GPU of their own, otherwise shared_memory for loopback
    addresses and http for others."""
    start_timeout_seconds: Annotated[float, Field(gt=0), RUNTIME] = 300
    """For `engine: remote`: seconds that a server may take to start."""
    request_timeout_seconds: Annotated[float, Field(gt=0), RUNTIME] = 600
    """For `engine: remote`: seconds after which a server that has not returned a completion or accepted a bucket counts
    as dead."""

    @model_validator(mode="after")
    def _engine_is_complete(self) -> Rollout:
        if self.engine == "remote" and bool(self.servers) == bool(self.start_servers):
            have = "neither servers nor start_servers is" if not self.servers else "both servers and start_servers are"
            raise ValueError(f"rollout.engine is remote, but {have} set; set one")
        if self.engine != "remote":
            for key in ("servers", "start_servers"):
                if getattr(self, key):
                    raise ValueError(f"rollout.{key} needs `engine: remote`; set it, or remove {key}")
            if self.tensor_parallel_size > 1:
                raise ValueError(
                    f"rollout.tensor_parallel_size {self.tensor_parallel_size} needs `engine: remote`; set it, or "
                    "remove tensor_parallel_size"
                )
        if self.weight_transfer == "ipc" and max(len(self.servers), self.start_servers, self.tensor_parallel_size) > 1:
            raise ValueError(
                "rollout.weight_transfer: ipc supports one server with one GPU, but the recipe has more; use one "
                "server with one GPU, or set weight_transfer to auto"
            )
        for address in self.servers:
            if not re.fullmatch(r"http://[^/\s:]+:\d{1,5}", address):
                raise ValueError(
                    f"rollout.servers: '{address}' is not a valid server URL; write it as http://HOST:PORT"
                )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError("rollout.servers lists a server twice; remove one of the two")
        if self.return_routing and self.engine == "huggingface":
            raise ValueError(
                "rollout.return_routing needs rollout.engine vllm or remote; change engine, or remove return_routing"
            )
        return self

    def require_room_for_prompts(self) -> None:
        if self.max_new_tokens >= self.max_model_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.max_new_tokens} leaves no tokens for a prompt within "
                f"rollout.max_model_length {self.max_model_length}; lower max_new_tokens or raise max_model_length"
            )

    def require_sampling(self, kind: str) -> None:
        if self.temperature == 0:
            raise ValueError(
                f"rollout.temperature 0 is greedy decoding, but kind {kind} needs samples; set a temperature above 0"
            )
