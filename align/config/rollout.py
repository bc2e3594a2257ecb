"""How completions are generated."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.parts import RUNTIME, Positive, Section


class Rollout(Section):
    """How completions are generated."""

    engine: Literal["vllm", "remote", "huggingface"] = "vllm"
    """vllm: an engine in the trainer's process; remote: vLLM servers; huggingface: `generate`, slow, for machines
    without vLLM."""
    max_new_tokens: Positive = 64
    """Tokens after which a completion without an end-of-sequence token is cut off."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Logits are divided by this before sampling, in the rollout and in the trainer's log-probabilities alike. 0 is
    greedy decoding, which only `evaluate` allows."""
    max_model_length: Positive = 512
    """Prompt and completion together, in tokens."""
    cache_gib: Annotated[float, Field(gt=0)] = 0.5
    """Memory for the key/value cache of each engine."""
    max_sequences: Positive = 64
    """Sequences decoded at a time by each engine."""
    prefix_caching: bool = True
    """Keep keys and values of prompts, so that prompts with the same beginning compute it once. Every update of the
    weights empties the cache."""
    return_routing: bool = False
    """Completions carry the experts that their tokens went to, for the trainer to replay. On a CPU this takes the
    in-process engine, and each completion of a prompt computes the prompt again."""
    sleep: Annotated[bool, RUNTIME] = False
    """Let the engine give its GPU memory to the trainer between rollouts: the one in the trainer's process, servers
    that the trainer starts, and those that were started with `--sleep`."""
    bucket_mib: Annotated[Positive, RUNTIME] = 256
    """New weights go to the engines in pieces of this size."""
    servers: Annotated[list[str], RUNTIME] = Field(default_factory=list)
    """remote: addresses of running servers (`align serve-rollout`), for example `http://127.0.0.1:8001`."""
    start_servers: Annotated[int, Field(ge=0, le=256), RUNTIME] = 0
    """remote: servers that the trainer starts on this machine instead, each on a free port, and starts again if one
    dies. With GPUs, each gets the next `tensor_parallel_size` of them, counted from the end."""
    tensor_parallel_size: Annotated[Positive, RUNTIME] = 1
    """remote: devices of a server that the trainer starts."""
    weight_transfer: Annotated[Literal["auto", "shared_memory", "http", "ipc", "nccl"], RUNTIME] = "auto"
    """remote: how weights travel. shared_memory: a file in /dev/shm, servers on the trainer's machine; http: in the
    request, anywhere; ipc: servers on the trainer's own GPU; nccl: on other GPUs. auto: nccl for servers on a GPU, else
    shared_memory for loopback addresses and http for others."""
    start_timeout_seconds: Annotated[float, Field(gt=0), RUNTIME] = 300
    """remote: how long servers may take to start."""
    request_timeout_seconds: Annotated[float, Field(gt=0), RUNTIME] = 600
    """remote: a server that takes longer for a completion or a bucket counts as dead."""

    @model_validator(mode="after")
    def _engine_is_complete(self) -> Rollout:
        if self.engine == "remote" and bool(self.servers) == bool(self.start_servers):
            have = "neither servers nor start_servers" if not self.servers else "both servers and start_servers"
            raise ValueError(f"rollout.engine remote has {have}; give one of them")
        if self.engine != "remote":
            for key in ("servers", "start_servers"):
                if getattr(self, key):
                    raise ValueError(f"rollout.{key} needs rollout.engine remote; set that, or remove {key}")
            if self.tensor_parallel_size > 1:
                raise ValueError(
                    f"rollout.tensor_parallel_size {self.tensor_parallel_size} needs rollout.engine remote; set that, "
                    "or remove tensor_parallel_size"
                )
        for address in self.servers:
            if not re.fullmatch(r"http://[^/\s:]+:\d{1,5}", address):
                raise ValueError(f"rollout.servers has '{address}', which is no address; write it as http://HOST:PORT")
        if len(set(self.servers)) < len(self.servers):
            raise ValueError("rollout.servers names a server twice; keep one of them")
        if self.return_routing and self.engine == "huggingface":
            raise ValueError("rollout.return_routing needs rollout.engine vllm; change one of them")
        return self

    def require_room_for_prompts(self) -> None:
        if self.max_new_tokens >= self.max_model_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_model_length {self.max_model_length}; lower one or raise the other"
            )

    def require_sampling(self, kind: str) -> None:
        if self.temperature == 0:
            raise ValueError(
                f"rollout.temperature 0 is greedy decoding, but kind {kind} needs samples; set a temperature above 0"
            )
