"""Start and close two engines in a process with its own process group; print an all-reduce after each engine."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed

from align.config.rollout import Rollout
from align.launch.ending import end_process
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.rollout.base import SamplingSettings
from align.rollout.vllm_engine import VllmEngine


def main(folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    HunYuanForCausalLM(
        HunYuanConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=2,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder / "model")
    reduced = []
    for _ in range(2):
        engine = VllmEngine(folder / "model", Rollout(max_model_length=64, cache_gib=0.05), dtype="float32", seed=0)
        engine.generate([[1, 2, 3]], SamplingSettings(2, seed=1))
        engine.close()
        value = torch.tensor(3.0)
        torch.distributed.all_reduce(value)
        reduced.append(value.item())
    print(*reduced)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
