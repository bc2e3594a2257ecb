"""Other families than HunYuan are served with vLLM's own classes, with adapters on attention; tools with a parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed")
from peft import LoraConfig, PeftModel, get_peft_model

from align.data.tokenizer import train_tokenizer
from tests.chat_templates import SHAPES, tokenizer_for
from tests.tiny_families import save_tiny
from tests.unit.serve.served import TEXTS, Served

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [5, 6, 7, 8, 9, 20, 33, 41]
ADAPTERS = [(rank, seed) for rank in (1, 8, 64) for seed in (0, 1)]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server with adapters of three ranks and two seeds."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder / "base", max_position_embeddings=2048)
    tokenizer_for(SHAPES["qwen2_5"], train_tokenizer(TEXTS, 320)).save_pretrained(folder / "base")
    given = []
    for rank, seed in ADAPTERS:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "o_proj"]
        )
        wrapped = get_peft_model(model, settings)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / (6 * rank**0.5)
        wrapped.save_pretrained(folder / f"r{rank}s{seed}")
        given += ["--adapter", f"r{rank}s{seed}={folder / f'r{rank}s{seed}'}"]
    server = Served(str(folder / "base"), *given, "--max-model-length", "1536", "--cache-gib", "0.1", forks=True)
    try:
        server.wait()
        yield server, folder
        output = server.stop()
        assert "proof: 7 models" in output
        assert "tools: calls are read by vLLM's parser 'hermes'" in output
    finally:
        server.process.kill()


def test_adapters_on_attention_beside_the_base(served: tuple[Served, Path]) -> None:
    """Ranks 1, 8 and 64 in one batch."""
    server, folder = served
    names = ["base", *(f"r{rank}s{seed}" for rank, seed in ADAPTERS)]

    def complete(name: str) -> tuple[list[int], list[float]]:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        status, answer = server.request("POST", "/v1/completions", {**body, "logprobs": 0, "return_token_ids": True})
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(complete, names)))
    for name in names:
        tokens, logprobs = found[name]
        # transformers applies Gemma 2's soft cap of attention in this implementation only.
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, folder / name).merge_and_unload().eval()
            assert found[name] != found["base"]
        with torch.no_grad():
            every = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4, (name, json.dumps(found[name]))


def test_tool_calls_are_read_whole_and_streamed(served: tuple[Served, Path]) -> None:
    server, _ = served
    body = {
        "model": "r8s0",
        "messages": [{"role": "user", "content": "What is 3?"}],
        "tools": TOOLS,
        "max_tokens": 80,
        "temperature": 0,
        "structured_outputs": {"choice": [CALL]},  # the tiny model would not call by itself
    }
    status, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert not (choice["message"]["content"] or "").strip()
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})
    parts = [
        part["function"]
        for event in server.stream("/v1/chat/completions", body)
        for choice in event["choices"]
        for part in choice["delta"].get("tool_calls") or []
    ]
    assert "".join(part.get("name") or "" for part in parts) == "add"
    assert json.loads("".join(part.get("arguments") or "" for part in parts)) == {"a": 1}
