"""Process-wide state that vLLM changes and the trainer needs: threads, random generators, process groups."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def generation_threads() -> int:
    """Number of torch threads for generation: OMP_NUM_THREADS, otherwise one.

    Decoding is thousands of tiny operations, and threads that wait for each other spin. Measured on two cores that
    other processes also use: a model of 5M parameters generates 1,640 tokens/s with one thread and 97 with two.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(value) if value.isdigit() and int(value) > 0 else 1


@contextmanager
def preserved_torch_state() -> Iterator[None]:
    """Restore the trainer's thread count, random states and `torch.set_num_threads` afterwards.

    vLLM seeds the global generators and draws from them. On a CPU it also changes the thread count and replaces
    `torch.set_num_threads` by a no-op. It likewise replaces `synchronize` and `empty_cache` of `torch.accelerator`,
    which would fail without an accelerator. These two are not restored, because vLLM calls them until the process ends.
    """
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


class ProcessGroups:
    """Counts the engines that use vLLM's process groups, which belong to the process and not to an engine.

    When a vLLM engine shuts down, it destroys all process groups, including the trainer's under torchrun and those of
    other engines. Here only the last engine destroys vLLM's groups. It destroys torch's default group only if vLLM
    created that group.
    """

    def __init__(self) -> None:
        self._engines = 0
        self._trainer_has_group = False

    def enter(self) -> None:
        if not self._engines:
            self._trainer_has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._engines += 1

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Prevent an engine that shuts down in this context from destroying the groups."""
        from vllm.v1.engine import core

        cleanup = core.cleanup_dist_env_and_memory
        core.cleanup_dist_env_and_memory = lambda *_, **__: None
        try:
            yield
        finally:
            core.cleanup_dist_env_and_memory = cleanup

    def leave(self) -> None:
        """Destroy the groups after the last engine."""
        from vllm.distributed import cleanup_dist_env_and_memory, destroy_model_parallel

        self._engines -= 1
        if self._engines:
            return
        if self._trainer_has_group:
            destroy_model_parallel()
        else:
            cleanup_dist_env_and_memory()


GROUPS = ProcessGroups()
