"""Settings of `align serve`, checked before anything heavy is imported."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config.rollout import Rollout
from align.errors import UserError
from align.run.checkpoint import adapter_folder
from align.serve import TOKEN_VARIABLE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM can reserve memory."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of the server.

    checkpoint: Folder of the base model.
    name: Name of the base model in requests.
    adapters: Folders of the adapters that are served from the start, by name.
    adapters_dir: The only folder from which adapters are loaded while the server runs; None turns this off.
    max_adapters: Maximum number of adapters that are loaded at the same time.
    max_rank: Maximum rank of an adapter, one of `RANKS`.
    token: Bearer token of every request but GET /health; None accepts any request.
    tool_parser: vLLM's parser of tool calls; None: the first one that reads those of the chat template.
    drain_seconds: Seconds that running requests have to finish after SIGTERM.
    proof: Compare the server with transformers and PEFT before it accepts requests.
    rollout: Lengths, cache size and parallelism of the engine.
    """

    checkpoint: Path
    name: str
    adapters: Mapping[str, Path]
    adapters_dir: Path | None
    max_adapters: int
    max_rank: int
    host: str
    port: int
    token: str | None
    dtype: str
    tool_parser: str | None
    drain_seconds: int
    proof: bool
    rollout: Rollout

    @property
    def serves_adapters(self) -> bool:
        return bool(self.adapters) or self.adapters_dir is not None

    @property
    def slots(self) -> int:
        """Slots of vLLM's LoRA manager: one more for an adapter that replaces another one, and one that stays empty.

        On a CPU vLLM 0.32 gives the last slot's adapter to requests without an adapter; `align.rollout.vllm_lora`
        corrects that, and the empty slot would make the fault harmless.
        """
        return self.max_adapters + 2


def model_name(checkpoint: Path) -> str:
    """Name of a model in requests: that of its folder, or of the stage that made it."""
    folder = checkpoint.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def named_folders(pairs: Iterable[str], base_name: str) -> dict[str, Path]:
    """Folders of `--adapter NAME=DIR`, by name."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise UserError(f"--adapter {pair}: it has no name; write --adapter NAME={pair.rstrip('=')}.")
        require_name(name, f"--adapter {pair}")
        if name in found or name == base_name:
            whose = "another adapter" if name in found else "the base model"
            raise UserError(f"--adapter {pair}: {whose} has the name '{name}'; give the adapter another name.")
        found[name] = adapter_folder(Path(folder).expanduser())
    return found


def require_name(name: str, where: str) -> None:
    """Raise UserError unless the name consists of letters, digits, '.', '_' and '-'."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{where}: '{name}' is not a valid name; use up to 64 letters, digits, '.', '_' and '-', first a letter or "
            "a digit."
        )


def resolved_token(token: str | None, file: Path | None, host: str) -> str | None:
    """The bearer token. Raises UserError if the server would be open to other machines without one."""
    if token is not None and file is not None:
        raise UserError("--token and --token-file: both are given; pass one of them.")
    if file is not None:
        if not file.is_file():
            raise UserError(f"--token-file {file}: the file does not exist; write the token into it.")
        token = file.read_text(encoding="utf-8").strip()
    where = "--token" if file is None else f"--token-file {file}"
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UserError(f"{where}: the token is empty or has spaces; use printable ASCII characters.")
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: other machines can reach this address, but the server has no token. Pass --token-file, or "
            f"set {TOKEN_VARIABLE}."
        )
    return token


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def served_rank(needed: int, given: int | None) -> int:
    """The rank for which memory is reserved. needed: Largest rank of the adapters that are served from the start."""
    if given is not None and given < needed:
        raise UserError(f"--max-rank {given}: an adapter has rank {needed}; raise it to {needed}, or leave it out.")
    wanted = max(needed, 16) if given is None else given
    rank = next((rank for rank in RANKS if rank >= wanted), None)
    if rank is None or wanted < 1:
        raise UserError(f"--max-rank {wanted}: vLLM serves ranks from 1 to {RANKS[-1]}; merge larger adapters.")
    return rank


def engine_settings(checkpoint: Path, values: Mapping[str, Any]) -> Rollout:
    """Settings of the engine. values: Fields of `Rollout`; None means not given."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    longest = int(config.get("max_position_embeddings") or DEFAULT_LENGTH)
    defaults: dict[str, Any] = {"max_model_length": min(DEFAULT_LENGTH, longest)}
    given = {key: value for key, value in values.items() if value is not None}
    if given.get("max_model_length", 0) > longest:
        raise UserError(
            f"--max-model-length {given['max_model_length']}: the model's context has {longest} tokens; pass at most "
            "that."
        )
    try:
        return Rollout(**(defaults | {"engine": "remote", "start_servers": 1} | given))
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        raise UserError(f"--{flag}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None


DEFAULT_LENGTH = 4096
"""Maximum tokens of prompt and completion by default, if the model's context is longer."""
