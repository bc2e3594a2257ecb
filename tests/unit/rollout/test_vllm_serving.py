"""Our model class in a plain vLLM process with a LoRA adapter that is not merged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.config.lora import Lora
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora.adapters import add_lora

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]
PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 60))]
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    folder, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True,
              kv_cache_memory_bytes=32 * 2**20, generation_config="vllm", enable_lora=True, max_lora_rank=8)
    sampling = SamplingParams(max_tokens=12, temperature=0, logprobs=0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = []
    for lora in (None, LoRARequest("adapter", 1, adapter)):
        outputs = [output.outputs[0] for output in llm.generate(requests, sampling, lora_request=lora, use_tqdm=False)]
        found.append([[list(o.token_ids), [at[t].logprob for at, t in zip(o.logprobs, o.token_ids)]] for o in outputs])
    print(json.dumps(found))
"""


def model() -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(**SIZES)).eval()


def serve(tmp_path: Path) -> list:
    """Greedy tokens and log-probabilities, without and with the adapter, from vLLM in another process, which finds our
    class through the plugin."""
    script = tmp_path / "serve.py"
    script.write_text(SERVE, encoding="utf-8")
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "adapter"), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@torch.no_grad()
def assert_same(reference: torch.nn.Module, served: list) -> None:
    for prompt, (tokens, logprobs) in zip(PROMPTS, served, strict=True):
        every = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert every.argmax(-1).tolist() == tokens
        expected = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4


def test_an_adapter_gives_the_log_probabilities_of_the_wrapped_model(tmp_path) -> None:
    policy = model()
    policy.save_pretrained(tmp_path / "model")
    wrapped = add_lora(policy, Lora(rank=8, experts=False), task="CAUSAL_LM").eval()
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    without, served = serve(tmp_path)
    assert_same(wrapped, served)
    with wrapped.disable_adapter():
        assert_same(wrapped, without)
    assert without != served
