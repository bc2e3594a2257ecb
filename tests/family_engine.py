"""vLLM's log-probabilities of a tiny model of one family, compared with transformers' own class.

    python -m tests.family_engine llama gemma2     one JSON line per family, each in its own process

The engine starts from one random model and then takes the weights of three others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from align.config.rollout import Rollout
from align.rollout.base import Completion, SamplingSettings
from tests.tiny_families import VOCABULARY, tiny_model

ROLLOUT = Rollout(max_model_length=128, cache_gib=0.1, max_sequences=8, bucket_mib=1)
LENGTHS = (5, 17, 33, 60)
NEW_TOKENS = 40
EAGER = {"gemma2"}
"""Families whose sdpa attention in transformers ignores the soft cap."""


def check_engine(model_type: str, updates: int = 3, **changes: Any) -> dict[str, Any]:
    """Largest differences of log-probabilities between a vLLM engine in this process and transformers.

    Returns `fresh` for the initial weights, `updated` for each update, and `stale`: the difference to the model before
    the last update, which shows that other weights give other log-probabilities.
    """
    from align.rollout.vllm_engine import VllmEngine

    started = time.perf_counter()
    attention = "eager" if model_type in EAGER else "sdpa"
    models = [tiny_model(model_type, seed, attention, **changes) for seed in range(0, 2 + 2 * updates, 2)]
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work) / str(index) for index in range(len(models))]
        for model, folder in zip(models, folders):
            model.save_pretrained(folder)
        engine = VllmEngine(folders[0], ROLLOUT, dtype="float32", seed=0)
        fresh = difference(models[0], sample(engine))
        updated = []
        for version in range(1, updates + 1):
            engine.update_weights(saved_weights(folders[version]), version)
            completions = sample(engine)
            updated.append(difference(models[version], completions))
        stale = difference(models[updates - 1], completions) if updates else None
        engine.close()
    seconds = round(time.perf_counter() - started, 1)
    return {"family": model_type, "fresh": fresh, "updated": updated, "stale": stale, "seconds": seconds}


def sample(engine: Any) -> list[Completion]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [row[0] for row in engine.generate(prompts, SamplingSettings(NEW_TOKENS, seed=1))]


@torch.no_grad()
def difference(model: Any, completions: list[Completion]) -> float:
    """Largest difference between the engine's log-probabilities and the model's log_softmax(logits)."""
    worst = 0.0
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(completion.prompt_ids) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return float(f"{worst:.2g}")


def saved_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Published weights of a saved model."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
            yield name, file.get_tensor(name)


def in_own_process(model_type: str) -> dict[str, Any]:
    """`check_engine` in a new process; {"family", "error"} if it fails."""
    command = [sys.executable, "-m", "tests.family_engine", model_type, "--here"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return dict(json.loads(lines[-1]))
    return {"family": model_type, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def main(arguments: list[str]) -> None:
    if "--here" in arguments:
        print(json.dumps(check_engine(arguments[0])), flush=True)
    else:
        for model_type in arguments:
            print(json.dumps(in_own_process(model_type)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
