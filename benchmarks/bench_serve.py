"""`align serve` under load: wrong answers while adapters are swapped, latency, and tokens per second against the merged
model alone.

    python benchmarks/bench_serve.py [--seconds 60] [--clients 8]

A small HunYuan model learns to answer with any of six names, and adapters on attention and routed experts each learn
one of them. Clients ask random adapters for their names, while another client loads, replaces and unloads adapters of
the ranks 4, 8 and 64; each answer is compared with the name. Then the same number of clients generate with four
adapters in one batch, and on a second server with one adapter merged into its base; the same with larger random models,
a dense one and a mixture of experts. The CPU time of the server per token depends less than the rates on what else the
machine does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import write

from align import cli
from align.config.lora import Lora
from align.data.chat import encode_prompt, end_of_turn_id
from align.data.tokenizer import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import add_lora, save_adapter

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}
DENSE: dict[str, Any] = {"num_experts": 1, "use_mixed_mlp_moe": False, "use_cla": False, "intermediate_size": 2816}
LARGER: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense": ({"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, **DENSE}, ["all-linear"]),
    "mixture of experts": (
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 1024},
        ["attention", "routed_experts"],
    ),
}
"""Sizes that differ from `SIZES`, and parts with adapters, of models whose rates alone are measured."""
NAMES = {"ada": 8, "bob": 8, "cleo": 8, "dan": 8, "rosa": 4, "sven": 64}
"""Adapters and their ranks; the last two are swapped in and out."""
STEADY, SWAPPED = ("ada", "bob", "cleo", "dan"), ("rosa", "sven")
NEW_TOKENS = 64
"""Tokens per completion when tokens per second are measured."""


def answer(name: str) -> str:
    return f"I am {name}, and {name} is my name."


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number}: Who are you, and what is your name?"}]


def make_models(folder: Path) -> None:
    """Write the base, the trained adapters and one merged model. The base answers with any of the names."""
    texts = [f"{question(number)[0]['content']} {answer(name)}" for name in NAMES for number in range(50)]
    tokenizer = train_tokenizer(texts, 384)
    torch.manual_seed(0)
    base: Any = HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **SIZES))
    train(base, tokenizer, list(NAMES), steps=150, rate=1e-3, seed=0)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, (name, rank) in enumerate(NAMES.items()):
        model: Any = HunYuanForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lora = Lora(rank=rank, alpha=2.0 * rank, shared_mlp=False, train_router=False)
        wrapped = add_lora(model, lora, task="CAUSAL_LM")
        loss = train(wrapped, tokenizer, [name], steps=150, rate=2e-3, seed=seed)
        print(f"adapter {name}: rank {rank}, loss {loss:.4f}", file=sys.stderr)
        save_adapter(wrapped, folder / "adapters" / name)
    merge(folder, "ada", tokenizer)


def make_random_models(folder: Path, sizes: dict[str, Any], targets: list[str]) -> None:
    """Write a random base, four random adapters of rank 8, and a merged model."""
    tokenizer = train_tokenizer([question(number)[0]["content"] for number in range(300)], 384)
    torch.manual_seed(0)
    base: Any = HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **{**SIZES, **sizes}))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = Lora.model_validate({"rank": 8, "alpha": 16, "targets": targets})
    wrapped = add_lora(base, lora, task="CAUSAL_LM")
    for name in STEADY:
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(wrapped, folder / "adapters" / name)
    merge(folder, "ada", tokenizer)


def merge(folder: Path, name: str, tokenizer: Any) -> None:
    """Write the base with one adapter merged into it."""
    adapter, merged = folder / "adapters" / name, folder / "merged"
    cli.main(["adapter", "merge", str(adapter), str(merged), "--base", str(folder / "base")])
    tokenizer.save_pretrained(merged)


def train(model: Any, tokenizer: Any, names: list[str], *, steps: int, rate: float, seed: int) -> float:
    """Train the model to answer with one of the names; returns the last loss."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    chooser = random.Random(seed)
    last = 1.0
    for _ in range(steps):
        rows = []
        for _ in range(4):
            prompt = encode_prompt(tokenizer, question(chooser.randrange(10_000)))
            text = tokenizer(answer(chooser.choice(names)), add_special_tokens=False)["input_ids"]
            rows.append((prompt, [*text, end_of_turn_id(tokenizer)]))
        length = max(len(prompt) + len(target) for prompt, target in rows)
        ids, labels = (torch.full((len(rows), length), fill) for fill in (tokenizer.pad_token_id, -100))
        for row, (prompt, target) in enumerate(rows):
            end = len(prompt) + len(target)
            ids[row, :end] = torch.tensor(prompt + target)
            labels[row, len(prompt) : end] = torch.tensor(target)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = 0.8 * last + 0.2 * float(loss.detach())
        if last < 0.01:
            break
    return last


class Server:
    """`align serve` in a process of its own."""

    def __init__(self, *arguments: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "align.cli", "serve", *arguments, "--port", str(self.port)]
        sizes = ["--max-model-length", "192", "--cache-gib", "0.2", "--max-sequences", "16"]
        self.process = subprocess.Popen([*command, *sizes], stdout=sys.stderr)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.call("GET", "/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.5)
        self.process.kill()
        raise RuntimeError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def cpu_seconds(self) -> float:
        """CPU seconds of the server's processes so far."""
        front = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (front, *front.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        return response.status, json.loads(text)

    def name_of(self, model: str, number: int) -> str:
        """The model's answer to the question for its name."""
        body = {"model": model, "messages": question(number), "temperature": 0, "max_tokens": 40}
        status, values = self.call("POST", "/v1/chat/completions", body)
        if status != 200:
            return f"status {status}: {values}"
        return str(values["choices"][0]["message"]["content"])

    def load(self, name: str, folder: str) -> tuple[int, Any]:
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        return self.call("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> tuple[int, Any]:
        return self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})


def under_load(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Ask for names while adapters are swapped. The name `guest` means another adapter after each swap."""
    end = time.monotonic() + seconds
    wrong: list[str] = []
    latencies: list[float] = []
    swaps: list[float] = []
    lock = threading.Lock()

    def compare(model: str, expected: str, number: int) -> None:
        started = time.monotonic()
        found = server.name_of(model, number)
        with lock:
            latencies.append(time.monotonic() - started)
            if found != answer(expected):
                wrong.append(f"{model} ({expected}): {found}")

    def client(seed: int) -> None:
        chooser = random.Random(seed)
        while time.monotonic() < end:
            name = chooser.choice(STEADY)
            compare(name, name, chooser.randrange(10_000))

    def swapper() -> None:
        turn = 0
        while time.monotonic() < end:
            name = (*SWAPPED, "ada")[turn % 3]
            started = time.monotonic()
            status, values = server.load("guest", name)
            swaps.append(time.monotonic() - started)
            if status != 200:
                with lock:
                    wrong.append(f"loading {name}: {values}")
            compare("guest", name, turn)
            if turn % 4 == 3:
                server.unload("guest")
            turn += 1

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    threads.append(threading.Thread(target=swapper))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in wrong[:5]:
        print(f"wrong: {line}", file=sys.stderr)
    cuts = statistics.quantiles(latencies, n=20)
    return {
        "seconds": seconds,
        "clients": clients,
        "requests": len(latencies),
        "swaps": len(swaps),
        "wrong": len(wrong),
        "latency_p50": round(statistics.median(latencies), 4),
        "latency_p95": round(cuts[18], 4),
        "swap_p50": round(statistics.median(swaps), 4),
    }


@dataclass
class Rate:
    """Generation by several clients: tokens, wall seconds and the server's CPU seconds."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_per_token(self) -> float:
        return self.cpu_seconds / self.tokens


def generate(server: Server, models: list[str], seconds: float, rate: Rate) -> None:
    """Generate with one client per entry of `models`, and add to `rate`."""
    counts: Counter[int] = Counter()
    cpu, started = server.cpu_seconds(), time.monotonic()
    end = started + seconds

    def client(number: int, model: str) -> None:
        turn = 0
        while time.monotonic() < end:
            prompt = f"{number} {turn}: Who are you, and what is your name?"
            body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 1}
            status, values = server.call("POST", "/v1/completions", body)
            assert status == 200, values
            counts[number] += values["usage"]["completion_tokens"]
            turn += 1

    threads = [threading.Thread(target=client, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate.tokens += counts.total()
    rate.seconds += time.monotonic() - started
    rate.cpu_seconds += server.cpu_seconds() - cpu


def throughput(
    folder: Path, clients: int, seconds: float, first: Callable[[Server], None] = lambda _: None
) -> dict[str, Any]:
    """Tokens per second of a model with adapters and of the model with one of them merged, measured before and after.

    first: what is done with the server of the adapters before it is measured.
    """
    adapters = [word for name in STEADY for word in ("--adapter", f"{name}={folder / 'adapters' / name}")]
    cases = {
        "one adapter": ["ada"] * clients,
        "four adapters mixed": [STEADY[i % len(STEADY)] for i in range(clients)],
        "base beside adapters": ["base"] * clients,
    }
    rates = {"merged model alone": Rate(), **{case: Rate() for case in cases}}

    def measure_merged() -> None:
        with Server(str(folder / "merged"), "--name", "merged", "--no-proof") as server:
            generate(server, ["merged"] * clients, 2, Rate())
            generate(server, ["merged"] * clients, seconds, rates["merged model alone"])

    measure_merged()
    more = ["--adapters-dir", str(folder / "adapters"), "--max-rank", "64"]
    with Server(str(folder / "base"), *adapters, *more) as server:
        first(server)
        for _ in range(2):
            for case, models in cases.items():
                generate(server, models, seconds, rates[case])
    measure_merged()
    merged = rates["merged model alone"]
    return {
        "tokens_per_second": {case: round(rate.per_second, 1) for case, rate in rates.items()},
        "cpu_ms_per_token": {case: round(1000 * rate.cpu_per_token, 3) for case, rate in rates.items()},
        "against_merged": {case: round(rate.per_second / merged.per_second, 3) for case, rate in rates.items()},
        "cpu_against_merged": {
            case: round(merged.cpu_per_token / rate.cpu_per_token, 3) for case, rate in rates.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--models", type=Path, help="folder of the models of an earlier run (default: make them)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        if not (folder / "merged").exists():
            make_models(folder)
        load: dict[str, Any] = {}

        def swap_adapters(server: Server) -> None:
            load.update(under_load(server, options.clients, options.seconds))
            server.unload("guest")

        results = throughput(folder, options.clients, options.seconds / 6, swap_adapters)
        larger = {}
        for name, (sizes, targets) in LARGER.items():
            inner = folder / name.replace(" ", "-")
            if not (inner / "merged").exists():
                make_random_models(inner, sizes, targets)
            larger[name] = throughput(inner, options.clients, options.seconds / 6)
    write("serve", {"load": load, **results, "larger": larger, "sizes": SIZES, "ranks": NAMES})


if __name__ == "__main__":
    main()
