"""Loading a sharded checkpoint in the published layout: peak resident memory and time.

Targets: peak memory at most 1.15 times the model's bytes, time at most 1.3 times that of reading the files. Each
measurement runs in a new process, with the files in the page cache.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import PeakMemory, in_new_process, write

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM

REPETITIONS = 5
SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 8,
}


def load(folder: str) -> dict[str, float]:
    HunYuanForCausalLM.from_pretrained(_small(folder), dtype=torch.float32)  # imports and first-use costs
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = HunYuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
        seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "peak": memory.bytes, "model": size}


def _small(folder: str) -> str:
    return str(Path(folder) / "small")


def read(folder: str) -> dict[str, float]:
    """Read all files into newly allocated memory, as loading must do; return the seconds and the bytes."""
    start = time.perf_counter()
    contents = [path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))]
    return {"seconds": time.perf_counter() - start, "bytes": sum(map(len, contents))}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps({"load": load, "read": read}[sys.argv[1]](sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        HunYuanForCausalLM(HunYuanConfig(**SIZES)).save_pretrained(folder, max_shard_size="100MB")
        small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
        HunYuanForCausalLM(HunYuanConfig(**SIZES | small)).save_pretrained(_small(folder))
        found: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
        for _ in range(REPETITIONS):
            for kind, measured in found.items():
                measured.append(in_new_process(kind, folder))
    times = {kind: sorted(m["seconds"] for m in measured)[REPETITIONS // 2] for kind, measured in found.items()}
    peak = max(m["peak"] for m in found["load"])
    write(
        "loading",
        {
            "bytes_of_the_files": found["read"][0]["bytes"],
            "bytes_of_the_model": found["load"][0]["model"],
            "peak_bytes": peak,
            "memory_ratio": round(peak / found["load"][0]["model"], 4),
            "seconds": {kind: round(value, 3) for kind, value in times.items()},
            "time_ratio": round(times["load"] / times["read"], 3),
        },
    )


if __name__ == "__main__":
    main()
