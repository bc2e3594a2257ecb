"""vLLM's log-probabilities of a tiny model of one family, compared with transformers' own class.

    python -m tests.families.engine llama gemma2             one JSON line per family, each in its own process
    python -m tests.families.engine llama gemma2 --server    the engine is a rollout server in processes of its own

The engine starts from one random model and then takes the weights of three others, as a trainer sends them. For a
mixture of experts an engine in the trainer's process also records the experts of each token, which are compared with
those of the trainer's routers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from align.config.rollout import Rollout
from align.models.family import family, routed_layers
from align.models.packing import Packing
from align.models.weights import published_weights
from align.rollout.base import Completion, RolloutEngine, SamplingSettings
from align.rollout.remote import RemoteEngine
from tests.families.checks import reference_attention
from tests.tiny_families import VOCABULARY, tiny_config, tiny_model

ROLLOUT = Rollout(max_model_length=128, cache_gib=0.1, max_sequences=8, bucket_mib=1)
LENGTHS = (5, 17, 33, 60)
NEW_TOKENS = 40
TOLERANCE = 1e-4


def check_engine(model_type: str, updates: int = 3, *, server: bool = False, **changes: Any) -> dict[str, Any]:
    """Largest differences of log-probabilities between vLLM and transformers.

    server: sample from a rollout server, which is started here, instead of an engine in this process.

    fresh: with the initial weights.
    updated: after each update.
    stale: difference to the model before the last update; it shows that other weights give other log-probabilities.
    routing: share of tokens and layers whose recorded experts differ from the trainer's; None for a dense family and
        for a server, which does not record experts on a CPU.
    """
    started = time.perf_counter()
    attention = reference_attention(tiny_config(model_type))
    models = [tiny_model(model_type, seed, attention, **changes) for seed in range(0, 2 + 2 * updates, 2)]
    policy: Any = family(model_type).policy(tiny_config(model_type, **changes)).eval()
    records = not server and any(layer.experts > 1 for layer in routed_layers(policy.config))
    with tempfile.TemporaryDirectory() as folder:
        models[0].save_pretrained(folder)
        engine = started_server(Path(folder)) if server else own_engine(Path(folder), records)
    try:
        completions = sample(engine)
        fresh, updated = difference(models[0], completions), []
        for version, model in enumerate(models[1:], 1):
            policy.load_state_dict(model.state_dict())
            engine.update_weights(published_weights(policy), version)
            completions = sample(engine)
            updated.append(difference(model, completions))
    finally:
        engine.close()
    return {
        "family": model_type,
        "fresh": fresh,
        "updated": updated,
        "stale": difference(models[-2], completions) if updates else None,
        "routing": other_experts(policy, completions) if records and updates else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def own_engine(folder: Path, records_experts: bool) -> RolloutEngine:
    from align.rollout.vllm_engine import VllmEngine

    rollout = ROLLOUT.model_copy(update={"return_routing": records_experts})
    return VllmEngine(folder, rollout, dtype="float32", seed=0)


def started_server(folder: Path) -> RolloutEngine:
    changes = {"engine": "remote", "start_servers": 1, "start_timeout_seconds": 900}
    return RemoteEngine(folder, ROLLOUT.model_copy(update=changes), dtype="float32", seed=0)


def sample(engine: RolloutEngine) -> list[Completion]:
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


@torch.no_grad()
def other_experts(policy: Any, completions: list[Completion]) -> float:
    """Share of tokens and layers for which the engine recorded other experts than the policy's routers choose."""
    differs = []
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids[:-1]])
        packing = Packing([ids.shape[1]])
        output = policy.model(input_ids=ids, packing=packing, use_cache=False, output_router_logits=True)
        chosen = output.routed_experts[0].transpose(0, 1).sort(-1).values
        recorded = torch.from_numpy(completion.routed_experts).sort(-1).values
        differs.append((chosen != recorded).any(-1).flatten())
    return float(torch.cat(differs).float().mean())


def in_own_process(model_type: str, *, server: bool = False) -> dict[str, Any]:
    """`check_engine` in a new process; {"family", "error"} if it fails."""
    command = [sys.executable, "-m", "tests.families.engine", model_type, "--here", *["--server"] * server]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return dict(json.loads(lines[-1]))
    return {"family": model_type, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="+")
    parser.add_argument("--server", action="store_true", help="sample from a rollout server")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check = check_engine if options.here else in_own_process
    for model_type in options.model_types:
        print(json.dumps(check(model_type, server=options.server)), flush=True)


if __name__ == "__main__":
    main()
