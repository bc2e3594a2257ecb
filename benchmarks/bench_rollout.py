"""Rollouts: tokens per second against Hugging Face generate, time of a weight update against that of a plain copy, and
the difference between the log-probabilities of sampler and trainer.

    python benchmarks/bench_rollout.py [CHECKPOINT ...]

Without checkpoints it builds the tiny preset, with larger random weights so that the distributions of experts and of
next tokens are far from uniform. All use the same number of threads: OMP_NUM_THREADS, or all cores.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from harness import compare, medians, ratio, write
from transformers import DynamicCache

from align.config.presets import PRESETS
from align.config.rollout import Rollout
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weights import published_weights
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.remote import RemoteEngine
from align.rollout.sync.stream import digest
from align.rollout.vllm_engine import VllmEngine
from align.run.checkpoint import checkpoint_folder
from align.train.checkpoint import load_policy
from align.train.quiet import quieten

PROMPT, NEW = 64, 64
BATCHES = (1, 16, 64)
ROLLOUT = {"max_model_length": PROMPT + NEW, "cache_gib": 0.5, "max_sequences": 64, "bucket_mib": 64}


def fresh_tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    config = HunYuanConfig(**(PRESETS["tiny"] | {"vocab_size": 1024, "initializer_range": 0.1}))
    HunYuanForCausalLM(config).save_pretrained(folder)
    return folder


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, vocabulary, (count, PROMPT), generator=generator).tolist()


@torch.no_grad()
def hugging_face(model: HunYuanForCausalLM, rows: list[list[int]]) -> None:
    ids = torch.tensor(rows)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(),
        max_new_tokens=NEW,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert output.shape == (len(rows), PROMPT + NEW)


def vllm(engine: RolloutEngine, rows: list[list[int]]) -> None:
    """Generate with an empty prefix cache, so that no repetition benefits from an earlier one."""
    engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]
    completions = engine.generate(rows, SamplingSettings(NEW, seed=len(rows)))
    assert all(len(c.token_ids) == NEW for row in completions for c in row)


def speed(model: HunYuanForCausalLM, engine: RolloutEngine, repetitions: int) -> dict[str, Any]:
    found = {}
    for batch in BATCHES:
        rows = prompts(batch, model.config.vocab_size)
        seconds = compare(
            {"engine": partial(vllm, engine, rows), "generate": partial(hugging_face, model, rows)}, repetitions
        )
        found[f"{batch} sequences"] = {
            "tokens_per_second": {name: round(batch * NEW / s, 1) for name, s in medians(seconds).items()},
            "engine_over_generate": round(1 / ratio(seconds, "engine", "generate"), 2),
        }
    return found


def synchronisation(model: HunYuanForCausalLM, engines: dict[str, RolloutEngine], repetitions: int) -> dict[str, Any]:
    stream = list(published_weights(model))
    places = [torch.empty_like(tensor) for _, tensor in stream]
    size = sum(tensor.nbytes for _, tensor in stream)

    def copy() -> None:
        for place, (_, tensor) in zip(places, stream, strict=True):
            place.copy_(tensor)

    def update(engine: RolloutEngine) -> None:
        assert engine.update_weights(published_weights(model), 1).bytes == size

    def digests() -> None:
        for _, tensor in stream:
            digest(tensor)

    variants = {"copy": copy, "digest": digests} | {n: partial(update, e) for n, e in engines.items()}
    seconds = compare(variants, repetitions)
    return {
        "mib": round(size / 2**20, 1),
        "tensors": len(stream),
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians(seconds).items()},
        "times_the_copy": {name: round(ratio(seconds, name, "copy"), 2) for name in variants if name != "copy"},
    }


@torch.no_grad()
def mismatch(model: HunYuanForCausalLM, engine: RolloutEngine) -> dict[str, Any]:
    """|log p(trainer) - log p(sampler)| of sampled tokens: 64 completions of mixed lengths, temperature 1."""
    rows = [row[: 8 + 7 * (i % 9)] for i, row in enumerate(prompts(64, model.config.vocab_size))]
    differences: list[float] = []
    entropies: list[float] = []
    for (completion,) in engine.generate(rows, SamplingSettings(NEW, seed=7)):
        logprobs = trainer_logprobs(model, completion)
        taken = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences += (taken - torch.tensor(completion.logprobs)).abs().tolist()
        entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
    return {
        "tokens": len(differences),
        "mean": statistics.mean(differences),
        "max": max(differences),
        "entropy_nats": round(statistics.mean(entropies), 2),
    }


def trainer_logprobs(model: HunYuanForCausalLM, completion: Completion) -> torch.Tensor:
    start = len(completion.prompt_ids)
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    return model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    model = load_policy(folder, "float32").eval()
    engine = VllmEngine(folder, Rollout(**ROLLOUT), dtype="float32", seed=0)
    remote = Rollout(engine="remote", start_servers=1, **ROLLOUT)
    servers = RemoteEngine(folder, remote, dtype="float32", seed=0)
    over_http = RemoteEngine(
        folder,
        Rollout(engine="remote", servers=[servers.servers[0].url], weight_transfer="http", **ROLLOUT),
        dtype="float32",
        seed=0,
    )
    try:
        engines = {"in process": engine, "server, shared memory": servers, "server, http": over_http}
        results = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "mismatch": mismatch(model, engine),
            "speed": speed(model, engine, repetitions),
            "sync": synchronisation(model, engines, repetitions),
        }
        servers.update_weights(published_weights(model), 2)  # the last update may have come through `over_http`
        rows = prompts(64, model.config.vocab_size)
        settings = SamplingSettings(NEW, seed=64)
        seconds = compare(
            {"in process": partial(vllm, engine, rows), "server": partial(servers.generate, rows, settings)},
            repetitions,
        )
        results["server_speed_over_in_process"] = round(ratio(seconds, "in process", "server"), 2)
    finally:
        over_http.close()
        servers.close()
        engine.close()
    return results


def main() -> None:
    quieten()
    repetitions = int(os.environ.get("REPETITIONS", "5"))
    given = [Path(argument) for argument in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        models = {str(path): checkpoint_folder(path) for path in given} or {"tiny": fresh_tiny(Path(folder) / "tiny")}
        write(
            "rollout",
            {
                "prompt_tokens": PROMPT,
                "new_tokens": NEW,
                **{n: measure(path, repetitions) for n, path in models.items()},
            },
        )


if __name__ == "__main__":
    main()
