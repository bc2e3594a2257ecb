"""ZeRO-3 with expert parallelism against ZeRO-3 that gathers a layer's experts as one unit ("leaf module").

Both variants have the same ZeRO stage, model, tokens and optimizer step, on 2 and 4 processes over gloo. The bytes are
those that a rank sends in torch's collectives, if they use rings (all-to-all: a pairwise exchange). Memory is the peak
of the resident memory minus the resident memory after the imports.
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

from harness import PeakMemory, write

from align.launch.processes import free_port

EXPERTS, LAYERS, HIDDEN, WIDTH, VOCABULARY = 64, 4, 128, 256, 1024
SEQUENCES, LENGTH, STEPS = 4, 128, 6
VARIANTS = ("gathered", "spread")


def count_bytes() -> dict[str, int]:
    """Wrap torch's collectives; return a dictionary that counts the bytes sent by this rank."""
    import torch.distributed as dist

    sent: dict[str, int] = {}

    def size(tensor: Any) -> int:
        return tensor.numel() * tensor.element_size()

    def share(kwargs: dict[str, Any]) -> float:
        ranks = dist.get_world_size(kwargs.get("group"))
        return (ranks - 1) / ranks

    def tensor(arguments: tuple, kwargs: dict[str, Any], place: int, *names: str) -> Any:
        return arguments[place] if len(arguments) > place else next(kwargs[name] for name in names if name in kwargs)

    def gathered(a: tuple, k: dict[str, Any]) -> float:
        outputs = tensor(a, k, 0, "output_tensor", "output", "tensor_list")
        return sum(map(size, outputs if isinstance(outputs, list) else [outputs])) * share(k)

    def scattered(a: tuple, k: dict[str, Any]) -> float:
        return size(tensor(a, k, 1, "input", "input_tensor")) * share(k)

    def reduced(a: tuple, k: dict[str, Any]) -> float:
        return 2 * size(tensor(a, k, 0, "tensor")) * share(k)

    def exchanged(a: tuple, k: dict[str, Any]) -> float:
        rows = tensor(a, k, 1, "input")
        if len(a) < 4:
            return size(rows) * share(k)
        elsewhere = sum(a[3]) - a[3][dist.get_rank(k.get("group"))]
        return elsewhere * size(rows) / max(1, rows.shape[0])

    rules = {
        **dict.fromkeys(("all_gather_into_tensor", "all_gather_single", "all_gather"), gathered),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), scattered),
        "all_reduce": reduced,
        "all_to_all_single": exchanged,
    }
    counting: list[str] = []

    def wrap(name: str, rule: Any) -> None:
        real = getattr(dist, name, None)
        if real is None:
            return

        def counted(*arguments: Any, **kwargs: Any) -> Any:
            if not counting:
                counting.append(name)
                try:
                    sent[name] = sent.get(name, 0) + int(rule(arguments, kwargs))
                    return real(*arguments, **kwargs)
                finally:
                    counting.pop()
            return real(*arguments, **kwargs)

        setattr(dist, name, counted)

    for name, rule in rules.items():
        wrap(name, rule)
    return sent


def rank_main(variant: str, out: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    sent = count_bytes()
    import logging

    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.utils import logger

    from align.config.parallel import Parallel
    from align.config.parts import Optimizer
    from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
    from align.parallel.deepspeed_config import deepspeed_config
    from align.parallel.experts import shard_experts
    from align.parallel.group import start_deepspeed
    from align.train.optimizer import build_optimizer

    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    start_deepspeed("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel = Parallel(processes=ranks, expert_parallel_size=ranks if variant == "spread" else 1)
    with PeakMemory() as building:
        torch.manual_seed(0)
        config = HunYuanConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, num_experts=EXPERTS, moe_topk=1, num_shared_expert=1,
        )  # fmt: skip
        model = HunYuanForCausalLM(config).train()
        parameters = sum(p.numel() for p in model.parameters())
        shard_experts(model, parallel.expert_parallel_size)
        settings = deepspeed_config(
            parallel, micro_batch_size=SEQUENCES, accumulation=1, max_grad_norm=1.0, dtype="float32"
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, Optimizer()), config=settings)
        del model
    with PeakMemory() as training:
        seconds, bytes_sent, losses = [], [], []
        for step in range(-2, STEPS):
            generator = torch.Generator().manual_seed(step * ranks + rank + 10)
            ids = torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
            before = dict(sent)
            dist.barrier()
            clock = time.perf_counter()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            dist.barrier()
            if step >= 0:
                seconds.append(time.perf_counter() - clock)
                bytes_sent.append({name: sent[name] - before.get(name, 0) for name in sent})
                losses.append(loss.item())
    found = {
        "parameters": parameters,
        "seconds": seconds,
        "bytes": {name: statistics.median(step.get(name, 0) for step in bytes_sent) for name in sorted(sent)},
        "peak_bytes": max(building.bytes, training.start + training.bytes - building.start),
        "loss": statistics.mean(losses),
    }
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def measure(variant: str, ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, variant, folder],
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        "seconds": statistics.median(found[0]["seconds"]),
        "megabytes_sent_a_rank_and_step": round(statistics.mean(sum(f["bytes"].values()) for f in found) / 1e6, 3),
        "by_collective": {name: round(value / 1e6, 3) for name, value in found[0]["bytes"].items() if value},
        "peak_megabytes_a_rank": round(max(f["peak_bytes"] for f in found) / 1e6, 1),
        "parameters": found[0]["parameters"],
        "loss": statistics.mean(f["loss"] for f in found),
    }


def main() -> None:
    results: dict[str, Any] = {
        "experts": EXPERTS,
        "layers": LAYERS,
        "hidden": HIDDEN,
        "expert_width": WIDTH,
        "tokens_a_rank": SEQUENCES * LENGTH,
    }
    for ranks in (2, 4):
        repetitions = [
            {variant: measure(variant, ranks) for variant in (VARIANTS if turn % 2 == 0 else VARIANTS[::-1])}
            for turn in range(3)
        ]
        last = repetitions[-1]
        results[f"{ranks} processes"] = {
            **{v: last[v] | {"seconds": statistics.median(r[v]["seconds"] for r in repetitions)} for v in VARIANTS},
            "spread_over_gathered": {
                "seconds": statistics.median(r["spread"]["seconds"] / r["gathered"]["seconds"] for r in repetitions),
                "bytes": last["spread"]["megabytes_sent_a_rank_and_step"]
                / last["gathered"]["megabytes_sent_a_rank_and_step"],
                "peak": last["spread"]["peak_megabytes_a_rank"] / last["gathered"]["peak_megabytes_a_rank"],
                "loss_difference": abs(last["spread"]["loss"] - last["gathered"]["loss"]),
            },
        }
    write("expert_parallel", results)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        from align.launch.ending import end_process

        rank_main(*sys.argv[1:])
        end_process(0)
    else:
        main()
