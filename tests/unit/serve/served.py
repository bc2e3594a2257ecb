"""A tiny base model with adapters by stock PEFT, and `align serve` as a process."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from align.data.tokenizer import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from tests.integration import forked

TEXTS = [f"What is {number}? It is {number}, and the sea is blue." for number in range(40)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def save_base(folder: Path) -> Any:
    """Save a HunYuan checkpoint with a tokenizer; return the tokenizer."""
    tokenizer = train_tokenizer(TEXTS, 320)
    torch.manual_seed(0)
    config = HunYuanConfig(vocab_size=len(tokenizer), **SIZES)
    HunYuanForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_adapter(base: Path, folder: Path, *, seed: int, rank: int = 4, **targets: Any) -> None:
    """Save an adapter of stock PEFT whose factors are all random."""
    model = HunYuanForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, **({"target_modules": []} | targets))
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)


@torch.no_grad()
def logprobs_by_peft(base: Path, adapter: Path | None, ids: list[int]) -> list[float]:
    """Log-probabilities of the tokens after the first, by transformers and PEFT."""
    model: Any = HunYuanForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    every = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


class Served:
    """`align serve` in a process of its own. forks: the process and its engine are forked; see `forked`."""

    def __init__(self, *arguments: str, token: str | None = None, forks: bool = False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.token = token
        words = ["serve", *arguments, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process: subprocess.Popen[str] | forked.Forked
        if forks:
            self.process = forked.align(words, environment, libraries=forked.VLLM)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "align.cli", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )

    def wait(self, seconds: float = 300) -> None:
        """Wait until the server is healthy."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.process.communicate()[0][-3000:]}")

    def connect(self, timeout: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def headers(self) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"Content-Type": "application/json", **token}

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON or text) of a request."""
        connection = self.connect()
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {**self.headers(), **headers})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of a streamed response."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}), self.headers())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip()
            if data and data != "[DONE]":
                yield json.loads(data)
        connection.close()

    def load(self, name: str, **more: Any) -> tuple[int, Any]:
        return self.request("POST", "/v1/load_lora_adapter", {"lora_name": name, **more})

    def unload(self, name: str) -> tuple[int, Any]:
        return self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def stop(self) -> str:
        """Send SIGTERM; returns the output."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[0]
