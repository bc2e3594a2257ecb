"""`align serve-rollout`: vLLM's own server with our model class, for a trainer that talks token ids."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config.rollout import Rollout
from align.errors import UserError
from align.launch.processes import environment_of_its_own
from align.rollout.server import MARK, Server
from align.rollout.vllm_options import check_checkpoint, engine_options, prepare_vllm

PARENT = "ALIGN_ROLLOUT_PARENT"
"""Environment variable: the process whose end is the server's end too."""


@dataclass(frozen=True)
class Served:
    """What a server is started for."""

    checkpoint: Path
    rollout: Rollout
    dtype: str
    seed: int


def what_to_serve(target: str, stage: str | None, run_dir: Path | None, changes: dict[str, Any]) -> Served:
    """target: a checkpoint's folder (or a finished stage's), or a recipe, of which a stage's parent is served with the
    stage's settings. changes: settings of `Rollout`, `dtype` and `seed` that were given instead."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if Path(target).is_dir():
        from align.train.checkpoint import checkpoint_folder

        for flag, given in (("--stage", stage), ("--run-dir", run_dir)):
            if given is not None:
                raise UserError(f"{flag} belongs to a recipe, but {target} is a checkpoint; leave it out.")
        checkpoint = checkpoint_folder(Path(target))
        settings: dict[str, Any] = {"max_model_length": min(Rollout().max_model_length, _longest(checkpoint))}
        dtype, seed = "float32", 0
    else:
        from align.config import load_recipe
        from align.run.context import StageContext

        recipe = load_recipe(target)
        sampling = [name for name, part in recipe.stages.items() if hasattr(part, "rollout")]
        if stage is None:
            stage = next((name for name in sampling if recipe.stages[name].kind == "ppo"), None)
        if stage not in sampling:
            has = f"it has {', '.join(sampling)}" if sampling else "it has none"
            raise UserError(f"{target}: --stage must name a stage that samples; {has}.")
        part: Any = recipe.stages[stage]
        parent = part.models[0] if part.kind == "evaluate" else part.init_from
        context = StageContext(recipe, stage, run_dir or Path("runs") / recipe.name)
        checkpoint, settings = context.checkpoint(parent), part.rollout.model_dump()
        dtype, seed = recipe.dtype, recipe.seed
    dtype, seed = changes.pop("dtype", dtype), changes.pop("seed", seed)
    try:
        rollout = Rollout(**(settings | {"engine": "remote", "servers": [], "start_servers": 1} | changes))
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        raise UserError(f"--{flag}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None
    return Served(checkpoint, rollout, dtype, seed)


def _longest(checkpoint: Path) -> int:
    path = checkpoint / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(values.get("max_position_embeddings", Rollout().max_model_length))


def serve(what: Served, *, host: str, port: int, transfer: str | None) -> None:
    """Serve until interrupted. transfer: host, nccl or ipc; by default nccl on a GPU, else host.

    The server has vLLM's development routes, through which weights are replaced; whoever reaches the port controls
    it. So it listens on loopback unless told otherwise.
    """
    checkpoint, rollout, dtype = what.checkpoint, what.rollout, what.dtype
    check_checkpoint(checkpoint, rollout)
    _check_port(host, port)
    # vLLM offers weight updates, pausing and sleeping only with these routes.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and rollout.tensor_parallel_size > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _cores_a_rank(rollout.tensor_parallel_size)
    prepare_vllm()
    from vllm.platforms import current_platform

    transfer = transfer or ("host" if current_platform.is_cpu() else "nccl")
    if transfer == "ipc":
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # vLLM sends memory handles pickled
    if current_platform.is_cpu():
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # 20 s for one tiny sampling function
    options = engine_options(checkpoint, rollout, dtype=dtype, seed=what.seed)
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
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    else:
        threading.Thread(target=_announce, args=(checkpoint, f"http://{host}:{port}"), daemon=True).start()
    _run(arguments)


def command_line(options: dict[str, Any]) -> list[str]:
    """vLLM's flags for engine arguments."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _run(arguments: list[str]) -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(options)
    uvloop.run(run_server(options))


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {host}:{port} ({reason}): give another --host or --port.") from None


def _cores_a_rank(ranks: int) -> str:
    """vLLM's setting of each rank's cores; without it vLLM wants a NUMA node for each rank."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [[cores[i % len(cores)] for i in range(rank * share, (rank + 1) * share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def _announce(checkpoint: Path, url: str) -> None:
    server = Server(url)
    while not server.is_healthy():
        time.sleep(1)
    print(f"serving {checkpoint} at {url}", flush=True)


def _end_with(parent: int) -> None:
    """End this server and its engine when the trainer that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


class StartedServer(Server):
    """A server in a process group of its own, which this process started and ends."""

    def __init__(
        self, checkpoint: Path, rollout: Rollout, *, dtype: str, seed: int, port: int, devices: list[str] | None
    ):
        super().__init__(f"http://127.0.0.1:{port}")
        flags = {
            "port": port,
            "dtype": dtype,
            "seed": seed,
            "max-model-length": rollout.max_model_length,
            "max-sequences": rollout.max_sequences,
            "cache-gib": rollout.cache_gib,
            "tensor-parallel-size": rollout.tensor_parallel_size,
        }
        transfer = rollout.weight_transfer
        if transfer == "auto" and rollout.sleep:
            transfer = "shared_memory"  # it may share the trainer's GPUs, and NCCL wants others
        if transfer != "auto":
            flags["weight-transfer"] = "host" if transfer in ("shared_memory", "http") else transfer
        self._command = [sys.executable, "-m", "align.cli", "serve-rollout", str(checkpoint)]
        self._command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        self._command += ["--no-prefix-caching"] * (not rollout.prefix_caching)
        self._command += ["--return-routing"] * rollout.return_routing
        self._command += ["--sleep"] * rollout.sleep
        self._environment = {**environment_of_its_own(), PARENT: str(os.getpid())}
        # The in-process engine's setting; a server's front and its engine are two processes.
        self._environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        if devices is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        descriptor, log = tempfile.mkstemp(prefix="align-server-", suffix=".log")
        os.close(descriptor)
        self._log = Path(log)

    def start(self) -> None:
        self.end()
        self.starts += 1
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seconds_since_start(self) -> float:
        return time.monotonic() - self._started

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def last_words(self) -> str:
        """The last line of what it wrote."""
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it wrote nothing")[:500]

    def end(self) -> None:
        """End the process group; also when the server is dead already, for its engine may not be."""
        if self.process is None:
            return
        for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=patience)
        self.process = None

    def forget(self) -> None:
        self.end()
        self._log.unlink(missing_ok=True)
