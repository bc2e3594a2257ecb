"""LoRA on routed experts: time and memory of a training step by target group, memory of a streamed merge, and disk and
start of a result that is stored as an adapter.

A step is the forward and backward pass of a HunYuan model with random weights (hidden 512, 4 layers, 16 experts of
width 1,024, top-1), 8 rows of 256 tokens, float32, one thread. Times are medians of CPU seconds in alternating order.
The peak is the resident memory above that before the step.

    python benchmarks/bench_lora.py              everything
    python benchmarks/bench_lora.py time 8       one rank, printed only
    python benchmarks/bench_lora.py start        disk and start-up of a 2 GB model, printed only
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))
import harness
import torch
from safetensors.torch import save_file

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "moe_topk": 1,
    "num_shared_expert": 1,
    "pad_token_id": 0,
    "use_cla": True,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARED = ["gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = {
    "full fine-tuning": None,
    "attention": (ATTENTION, None, False),
    "attention, DoRA": (ATTENTION, None, True),
    "attention, shared expert": (ATTENTION + SHARED, None, False),
    "attention, shared and routed experts by row": (ATTENTION + SHARED, STACKS, False),
    "attention, shared and routed experts by row, QLoRA": (ATTENTION + SHARED, STACKS, False),
    "attention, shared and routed experts by PEFT": (ATTENTION + SHARED, STACKS, False),
}
RANKS = (8, 64)
REPETITIONS = 7
STARTS = 5


def build(way: str, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    from align.models.lora.experts import apply_by_row
    from align.models.quantized import quantize_model

    torch.manual_seed(0)
    model: Any = HunYuanForCausalLM(HunYuanConfig(**SIZES))  # type: ignore[arg-type]
    if (targets := WAYS[way]) is not None:
        modules, stacks, dora = targets
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=modules, target_parameters=stacks, use_dora=dora
        )
        if way.endswith("QLoRA"):
            quantize_model(model)
        model = get_peft_model(model, settings)
        if "by row" in way:
            apply_by_row(model)
    return model.train()


def step(model: Any, rows: int = 8, length: int = 256) -> None:
    ids = torch.randint(3, 2048, (rows, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def times(rank: int) -> dict[str, float]:
    """Median CPU seconds of a step, by way."""
    models = {way: build(way, rank) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for model in models.values():
        step(model, rows=2)
    for number in range(REPETITIONS):
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            start = time.process_time()
            step(models[way])
            taken[way].append(time.process_time() - start)
    return {way: round(statistics.median(found), 3) for way, found in taken.items()}


def resident(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def peak(way: str, rank: int) -> float:
    """Peak MB of a step above the memory before it."""
    model = build(way, rank)
    step(model, rows=1, length=8)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(model)
    return round(resident("VmHWM") - before)


def write_base(folder: Path) -> Any:
    """A HunYuan checkpoint of about 2 GB in files of one layer."""
    from align.models.family import family_of

    config = HunYuanConfig(**SIZES | {"num_hidden_layers": 16, "intermediate_size": 1152})  # type: ignore[arg-type]
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in family_of(config).published_shapes(config).items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = torch.randn(shape) * 0.02
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["HunYuanForCausalLM"]}))
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def write_adapter(folder: Path, config: Any, base: Path) -> None:
    """An adapter of rank 16 on attention, shared and routed experts."""
    from align.models.lora import build as made
    from align.models.lora.folder import skeleton

    bones, pairs = skeleton(config), {}
    for name, shape in bones.shapes.items():
        if name in bones.experts or (name.endswith(".weight") and bones.group(name) in made.LOW_RANK):
            outputs, inputs = shape[-2:]
            one = torch.randn(outputs, 16) * 0.02, torch.randn(16, inputs) * 0.02
            if ".experts." not in name or name in bones.experts:
                pairs[name] = [one] * bones.experts.get(name, 1)
    made.write_adapter(folder, pairs, {}, 16, bones, config, base)


def merge_memory(base: str, adapter: str, target: str) -> dict[str, float]:
    """Peak MB of the merge above the imports, and CPU seconds."""
    from align.models.family import load_config
    from align.models.lora.stream import merge_adapter

    config = load_config(Path(base))
    before, start = resident("VmHWM"), time.process_time()
    merge_adapter(Path(base), config, Path(adapter), Path(target))
    above, seconds = resident("VmHWM") - before, time.process_time() - start
    return {"imports MB": round(before), "above MB": round(above), "CPU seconds": round(seconds, 1)}


def start(folder: str) -> float:
    """CPU seconds of loading a checkpoint; the imports are not counted."""
    from align.train.checkpoint import load_policy

    began = time.process_time()
    load_policy(Path(folder), "float32")
    return round(time.process_time() - began, 2)


def stored() -> dict[str, dict[str, float]]:
    """MB on disk of a stage's result, and CPU seconds of loading it (median of `STARTS` in alternating order)."""
    from align.models.lora.whole import whole
    from align.run.adapted import write_pointer

    with tempfile.TemporaryDirectory() as name:
        base, beside, merged = (Path(name) / stage / "model" for stage in ("base", "adapter", "merged"))
        base.mkdir(parents=True)
        write_adapter(beside, write_base(base), base)
        write_pointer(beside, beside, base)
        (beside / "config.json").write_bytes((base / "config.json").read_bytes())
        with whole(beside) as folder:
            folder.rename(merged.parent)
        places = {"save: adapter": beside, "save: merged": merged.parent}
        seconds: dict[str, list[float]] = {way: [] for way in places}
        for number in range(STARTS):
            for way in list(places)[:: 1 if number % 2 == 0 else -1]:
                seconds[way].append(in_process("load", str(places[way])))
        return {
            way: {
                "MB": round(sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e6, 1),
                "CPU seconds": statistics.median(seconds[way]),
            }
            for way, place in places.items()
        }


def in_process(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def merged() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        write_adapter(folder / "adapter", write_base(folder / "base"), folder / "base")
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        found = in_process("merge", *(str(folder / part) for part in ("base", "adapter", "merged")))
        return {"base GB": round(size / 1e9, 2), **found}


def main() -> None:
    torch.set_num_threads(1)
    kind, *rest = sys.argv[1:] or [""]
    if kind == "time":
        print(json.dumps(times(int(rest[0]))))
    elif kind == "memory":
        print(json.dumps(peak(rest[0], int(rest[1]))))
    elif kind == "load":
        print(json.dumps(start(*rest)))
    elif kind == "start":
        print(json.dumps(stored(), indent=1))
    elif kind == "merge":
        print(json.dumps(merge_memory(*rest) if rest else merged()))
    else:
        results: dict[str, Any] = {"merge": merged(), "stored": stored()}
        for rank in RANKS:
            seconds = in_process("time", str(rank))
            results[f"rank {rank}"] = {
                way: {
                    "seconds": taken,
                    "to attention": round(taken / seconds["attention"], 2),
                    "peak MB": in_process("memory", way, str(rank)),
                }
                for way, taken in seconds.items()
            }
        harness.write("lora", results)
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
