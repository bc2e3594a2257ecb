"""Other families than HunYuan are served with vLLM's own classes, with adapters on attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed")
from peft import LoraConfig, PeftModel, get_peft_model

from align.data.tokenizer import train_tokenizer
from tests.tiny_families import save_tiny
from tests.unit.serve.served import TEXTS, Served

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [5, 6, 7, 8, 9, 20, 33, 41]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_adapter_on_attention_beside_the_base(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "base")
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    server = Served(
        str(tmp_path / "base"),
        "--adapter",
        f"a={tmp_path / 'adapter'}",
        "--max-model-length",
        "128",
        "--cache-gib",
        "0.1",
    )
    try:
        server.wait()
        found = {}
        for name in ("base", "a"):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            status, answer = server.request(
                "POST", "/v1/completions", {**body, "logprobs": 0, "return_token_ids": True}
            )
            assert status == 200, answer
            choice = answer["choices"][0]
            found[name] = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        output = server.stop()
        assert "proof: 2 models" in output
    finally:
        server.process.kill()
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    for name in ("base", "a"):
        tokens, logprobs = found[name]
        if name == "a":
            plain = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        with torch.no_grad():
            every = plain(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4, json.dumps(found[name])
    assert found["base"] != found["a"]
