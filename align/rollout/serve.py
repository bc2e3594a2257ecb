"""`align serve-rollout`: vLLM's own server with our model class and token ids as input and output."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config import load_recipe
from align.config.rollout import Rollout
from align.errors import UserError
from align.models.lora.whole import whole
from align.rollout.serve_stage import serving_stage
from align.rollout.server import MARK, Server
from align.rollout.started_server import PARENT
from align.rollout.vllm_options import check_model, engine_options, has_gpu, model_options, prepare_vllm
from align.rollout.vllm_versions import serve_parser
from align.run.checkpoint import checkpoint_folder
from align.run.context import StageContext


@dataclass(frozen=True)
class ServeSettings:
    """Checkpoint and settings of a rollout server."""

    checkpoint: Path
    rollout: Rollout
    dtype: str
    seed: int


def serve_settings(target: str, stage: str | None, run_dir: Path | None, overrides: dict[str, Any]) -> ServeSettings:
    """Find the checkpoint and the settings to serve.

    target: a checkpoint folder, a finished stage's folder, or a recipe. For a recipe, the checkpoint with which
        `stage` generates is served with that stage's settings.
    stage: by default the first stage of the recipe that generates and trains.
    overrides: values of `Rollout` fields, `dtype` and `seed` given on the command line; None means not given.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if Path(target).is_dir():
        for flag, given in (("--stage", stage), ("--run-dir", run_dir)):
            if given is not None:
                raise UserError(f"{flag} needs a recipe, but {target} is a checkpoint. Remove {flag}.")
        checkpoint = checkpoint_folder(Path(target))
        settings: dict[str, Any] = {"max_model_length": min(Rollout().max_model_length, _context_length(checkpoint))}
        dtype, seed = "float32", 0
    else:
        recipe = load_recipe(target)
        stage = serving_stage(recipe, target, stage)
        part: Any = recipe.stages[stage]
        context = StageContext(recipe, stage, run_dir or Path("runs") / recipe.name)
        checkpoint, settings = context.checkpoint(part.generates_with), part.rollout.model_dump()
        dtype, seed = recipe.dtype, recipe.seed
    dtype, seed = overrides.pop("dtype", dtype), overrides.pop("seed", seed)
    try:
        rollout = Rollout(**(settings | {"engine": "remote", "servers": [], "start_servers": 1} | overrides))
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        raise UserError(f"--{flag}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None
    return ServeSettings(checkpoint, rollout, dtype, seed)


def _context_length(checkpoint: Path) -> int:
    """Context length of the model; if its config.json has none, the default of `rollout.max_model_length`."""
    path = checkpoint / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(values.get("max_position_embeddings", Rollout().max_model_length))


def serve(settings: ServeSettings, *, host: str, port: int, transfer: str | None) -> None:
    """Serve until interrupted. transfer: host, nccl or ipc; by default nccl on a GPU, otherwise host.

    The server has vLLM's development routes, through which clients replace its weights. Anyone who can reach the port
    controls the server, so the default host is loopback.
    """
    with whole(settings.checkpoint) as checkpoint:
        _serve(settings, checkpoint, host=host, port=port, transfer=transfer)


def _serve(settings: ServeSettings, checkpoint: Path, *, host: str, port: int, transfer: str | None) -> None:
    """Serve the whole weights in the folder `checkpoint`."""
    rollout, dtype = settings.rollout, settings.dtype
    check_model(checkpoint, rollout, dtype=dtype)
    check_port(host, port)
    # vLLM has routes for weight updates, pausing and sleeping in development mode only.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    bind_cores(rollout.tensor_parallel_size)
    prepare_vllm()
    transfer = transfer or ("nccl" if has_gpu() else "host")
    if transfer == "ipc":
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # vLLM pickles the memory handles
    options = engine_options(checkpoint, rollout, dtype=dtype, seed=settings.seed)
    options |= model_options(checkpoint, dtype=dtype)
    options |= {
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "weight_transfer_config": {"backend": f"align_{transfer}"},
        "host": host,
        "port": port,
        "tokens_only": True,
        "disable_log_stats": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "error",
    }
    facts = {
        "dtype": dtype,
        "transfer": transfer,
        "routing": str(bool(options.get("enable_return_routed_experts"))),
        "sleeps": str(bool(options.get("enable_sleep_mode"))),
    }
    arguments = [*command_line(options), "--served-model-name", MARK, *(f"{k}={v}" for k, v in facts.items())]
    if PARENT in os.environ:
        threading.Thread(target=_end_with_parent, args=(int(os.environ[PARENT]),), daemon=True).start()
    else:
        threading.Thread(
            target=_print_when_ready, args=(settings.checkpoint, f"http://{host}:{port}"), daemon=True
        ).start()
    run_vllm_server(arguments)


def command_line(options: dict[str, Any]) -> list[str]:
    """Command-line flags of vLLM for these engine arguments."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *value]
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def run_vllm_server(arguments: list[str]) -> None:
    """Run vLLM's server with these flags until it is interrupted. Call `prepare_vllm` first."""
    if not has_gpu():
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # compiling one tiny sampling function takes 20 s
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser, validate_parsed_serve_args = serve_parser()
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(options)
    uvloop.run(run_server(options))


def check_port(host: str, port: int) -> None:
    """Raise UserError unless this process can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{host}:{port}: cannot listen there ({reason}). Pass another --port or --host.") from None


def bind_cores(ranks: int) -> None:
    """Divide the cores among several ranks, unless the user has done so."""
    if ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores_per_rank(ranks))


def _cores_per_rank(ranks: int) -> str:
    """Cores of each rank, as VLLM_CPU_OMP_THREADS_BIND; without this variable vLLM requires one NUMA node per rank."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [[cores[i % len(cores)] for i in range(rank * share, (rank + 1) * share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def _print_when_ready(checkpoint: Path, url: str) -> None:
    server = Server(url)
    while not server.is_healthy():
        time.sleep(1)
    print(f"serving {checkpoint} at {url}", flush=True)


def _end_with_parent(parent: int) -> None:
    """Kill this server and its engine when the trainer that started it has ended, for any reason."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)
