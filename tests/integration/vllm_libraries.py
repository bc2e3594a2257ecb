"""vLLM and all that `align run`, `serve` and `serve-rollout` import, for the process from which `forked` forks.

On a CPU vLLM starts its engines and workers with multiprocessing's `spawn`, and inspects a model class that it sees for
the first time in a new process; each of these would import everything again. Here engines and workers are forked, and
classes are inspected in the same process.
"""

from __future__ import annotations

import multiprocessing
import os
from importlib import import_module

# As `align.rollout.serve` sets it for a server; torch reads it when it is imported.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import tests.integration.libraries  # noqa: F401
from align.rollout.vllm_options import prepare_vllm
from align.rollout.vllm_versions import serve_parser

MODULES = (
    "align.models.hunyuan.vllm",
    "align.rollout.remote",
    "align.rollout.serve",
    "align.rollout.sync.vllm_side",
    "align.rollout.vllm_engine",
    "align.serve.command",
    "uvloop",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.transformers",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)
STARTING = ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor")
"""Modules of vLLM that start processes."""

prepare_vllm()
serve_parser()
for name in MODULES:
    import_module(name)
for name in STARTING:
    import_module(name).get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]
import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda inspect: inspect()
