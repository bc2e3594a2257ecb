"""`align serve`: vLLM's OpenAI server for one checkpoint and its LoRA adapters."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.data.chat import stop_token_ids
from align.errors import UserError
from align.models.lora.whole import whole
from align.rollout.serve import bind_cores, check_port, command_line, run_vllm_server
from align.rollout.vllm_options import check_model, engine_options, has_gpu, model_options, prepare_vllm
from align.serve import gate
from align.serve.proof import Probed, probe_prompt, references
from align.serve.service import Service
from align.serve.settings import ServeSettings
from align.serve.staging import Base, check_adapter
from align.serve.tools import NOT_READ, find_parser, reads_calls, tool_problem
from align.train.checkpoint import check_checkpoint, checked_config, load_tokenizer

UNSAFE = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_API_KEY")
"""Variables that make vLLM add routes of its own, or check tokens itself."""


def adapter_base(checkpoint: Path, dtype: str) -> Base:
    """The base model that adapters must fit."""
    config = checked_config(check_checkpoint(checkpoint), str(checkpoint), "restore the published value")
    return Base.of(checkpoint, config, dtype)


def largest_rank(folders: Iterable[Path], base: Base) -> int:
    """Check adapters by their headers; returns their largest rank, 0 without adapters."""
    return max((check_adapter(folder, base).rank for folder in folders), default=0)


def serve(settings: ServeSettings, base: Base) -> None:
    """Serve until SIGINT or SIGTERM; UserError if the proof at the start fails."""
    with whole(settings.checkpoint) as checkpoint:
        _serve(replace(settings, checkpoint=checkpoint), base)


def _serve(settings: ServeSettings, base: Base) -> None:
    """Serve a checkpoint with whole weights."""
    for name in UNSAFE:
        os.environ.pop(name, None)
    checkpoint, rollout = settings.checkpoint, settings.rollout
    if settings.serves_adapters and not torch.cuda.is_available():
        require_served_on_a_cpu(base)
    check_model(checkpoint, rollout, dtype=settings.dtype, remedy="Use `align chat`, or serve it with another server.")
    check_port(settings.host, settings.port)
    tokenizer: Any = load_tokenizer(checkpoint)
    vocabulary = min(len(tokenizer), base_vocabulary(base))
    no_tools = tool_problem(tokenizer)
    if settings.tool_parser is not None and no_tools is not None:
        raise UserError(f"--tool-parser {settings.tool_parser}: {no_tools}. Leave out --tool-parser.")
    expected = _expected(settings, vocabulary)
    bind_cores(rollout.tensor_parallel_size)
    prepare_vllm()
    _check_vllm(settings)
    if no_tools is None:
        settings = replace(settings, tool_parser=parser_of_calls(settings, tokenizer))
        no_tools = NOT_READ if settings.tool_parser is None else None
    arguments = _vllm_arguments(settings, base)
    with tempfile.TemporaryDirectory(prefix="align-serve-") as scratch:
        service = Service(
            settings,
            base,
            Path(scratch),
            expected=expected,
            stop_tokens=stop_token_ids(tokenizer) if tokenizer.chat_template else [],
            vocabulary=vocabulary,
            no_tools=no_tools,
        )
        gate.install(service)
        threading.Thread(target=_print_when_ready, args=(settings,), daemon=True).start()
        run_vllm_server(arguments)
    if service.failure is not None:
        raise UserError(service.failure)


def require_served_on_a_cpu(base: Base) -> None:
    """Raise UserError for families with routed experts other than HunYuan.

    While adapters are served, vLLM 0.32 computes the experts of its own classes with a Triton kernel, even if no
    adapter is on them, and its engine fails at the first request without a GPU.
    """
    if base.bones.experts and not base.bones.serves_expert_adapters:
        raise UserError(
            f"{base.folder}: on a CPU vLLM serves no adapters beside a model of this family, which has routed experts; "
            "merge them with `align adapter merge`, and serve the result."
        )


def base_vocabulary(base: Base) -> int:
    return base.bones.shapes[f"{base.bones.embedding}.weight"][0]


def _expected(settings: ServeSettings, vocabulary: int) -> dict[str, Probed] | None:
    if not settings.proof:
        return None
    adapters = dict(settings.adapters)
    return references(settings.checkpoint, settings.dtype, adapters, probe_prompt(vocabulary))


def _check_vllm(settings: ServeSettings) -> None:
    """Refuse what vLLM would refuse in its own process, with a traceback."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora
    from vllm.tool_parsers import ToolParserManager

    parsers = ToolParserManager.list_registered()
    if settings.tool_parser is not None and settings.tool_parser not in parsers:
        raise UserError(
            f"--tool-parser {settings.tool_parser}: vLLM has no such parser. Pass one of: {', '.join(sorted(parsers))}."
        )
    if not settings.serves_adapters:
        return
    from align.run.checkpoint import read_config

    names = read_config(settings.checkpoint).get("architectures") or []
    known = next((ModelRegistry.models[name] for name in names if name in ModelRegistry.models), None)
    if known is not None and not supports_lora(known.load_model_cls()):
        raise UserError(
            f"{settings.checkpoint}: vLLM's class {names[0]} takes no LoRA adapters; merge the adapter with `align "
            "adapter merge`, and serve the result."
        )


def parser_of_calls(settings: ServeSettings, tokenizer: Any) -> str | None:
    """The parser of the model's tool calls, if any; UserError if --tool-parser names one that does not read them."""
    wanted = settings.tool_parser
    if wanted is not None and reads_calls(wanted, tokenizer):
        return wanted
    found = find_parser(tokenizer)
    if wanted is not None:
        instead = f"Leave it out, so that '{found}' is used" if found else "Leave it out"
        raise UserError(
            f"--tool-parser {wanted}: it does not read the tool calls that the chat template of {settings.checkpoint} "
            f"writes. {instead}."
        )
    return found


def _vllm_arguments(settings: ServeSettings, base: Base) -> list[str]:
    """Flags of vLLM's server."""
    checkpoint, rollout = settings.checkpoint, settings.rollout
    options = engine_options(checkpoint, rollout, dtype=settings.dtype, seed=0)
    del options["weight_transfer_config"]
    options |= model_options(checkpoint, dtype=settings.dtype)
    options |= {
        "skip_tokenizer_init": False,
        "tokenizer": str(checkpoint),
        # Log-probabilities of the model, whatever the temperature.
        "logprobs_mode": "raw_logprobs",
        # Sampling defaults of the checkpoint's generation_config.json.
        "generation_config": "auto",
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "served_model_name": settings.name,
        "host": settings.host,
        "port": settings.port,
        "middleware": "align.serve.gate.Gate",
        "shutdown_timeout": settings.drain_seconds,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "critical",
    }
    if settings.serves_adapters:
        options |= {
            "enable_lora": True,
            "max_loras": settings.slots,
            "max_cpu_loras": settings.slots,
            "max_lora_rank": settings.max_rank,
            "lora_target_modules": base.layer_names,
        }
    if settings.tool_parser is not None:
        options |= {"enable_auto_tool_choice": True, "tool_call_parser": settings.tool_parser}
    return command_line(options)


def _print_when_ready(settings: ServeSettings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    while True:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            break
        time.sleep(0.5)
    models = ", ".join([settings.name, *sorted(settings.adapters)])
    if settings.tool_parser is not None:
        print(f"tools: calls are read by vLLM's parser '{settings.tool_parser}'", flush=True)
    access = "with a token" if settings.token else "without a token: every user of this machine has access"
    print(f"serving {models} at {url}/v1 ({'GPU' if has_gpu() else 'CPU'}, {access})", flush=True)
