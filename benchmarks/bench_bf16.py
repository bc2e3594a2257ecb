"""bf16 against float64 and float32: error of the loss head's gradient, and PPO's learning curves (`--curves`).

Without options: relative errors against float64 of the gradients of log p(token), for several values of p(token). They
are measured for the hidden states (median over the rows) and for the head's weight, with align's two heads and with
bf16 logits and autograd. Target: at most 6 % for p(token) up to 0.999.
`--curves` trains the recipe `tiny` up to DPO once, in float32. From that checkpoint it runs PPO in float32 and in bf16
with each of `--seeds`, and records the score, KL and log-probability mismatch of every iteration.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import write
from torch import Tensor

from align.losses.linear_head import linear_cross_entropy, linear_logprobs
from align.run.folder import read_jsonl

ROOT = Path(__file__).parents[1]
ROWS, HIDDEN, VOCABULARY = 64, 512, 32_000
PROBABILITIES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
SEEDS = [0, 1, 2]
METRICS = ("score_mean", "kl", "mismatch_mean", "mismatch_max")


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the tokens' log-probabilities, from logits in the inputs' dtype and a log-softmax in at least fp32."""
    logits = hidden @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(1, tokens[:, None]).sum()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear_logprobs": lambda hidden, weight, tokens: linear_logprobs(hidden, weight, tokens)[0].sum(),
    "linear_cross_entropy": lambda hidden, weight, tokens: -linear_cross_entropy(hidden, weight, tokens, count=1.0)[0],
    "bf16 logits, autograd": plain,
}


def hidden_states(weight: Tensor, tokens: Tensor, probability: float) -> Tensor:
    """Hidden states in bf16 whose softmax gives each token about `probability`."""
    wide = weight.float()
    base, towards = torch.randn(ROWS, HIDDEN) * 0.5, wide[tokens]
    low, high = torch.zeros(ROWS, 1), torch.full((ROWS, 1), 400.0)
    for _ in range(24):
        middle = (low + high) / 2
        logits = (base + middle * towards) @ wide.T
        under = logits.softmax(-1).gather(1, tokens[:, None]) < probability
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (base + low * towards).bfloat16()


def gradients(way: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, tokens = inputs
    trained = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(way(*trained, tokens), trained)


def errors() -> dict[str, Any]:
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).bfloat16()
    tokens = torch.randint(0, VOCABULARY, (ROWS,))
    table: dict[str, Any] = {}
    for probability in PROBABILITIES:
        hidden = hidden_states(weight, tokens, probability)
        exact = gradients(plain, hidden.double(), weight.double(), tokens)
        table[str(probability)] = row = {}
        for name, way in WAYS.items():
            d_hidden, d_weight = (found.double() for found in gradients(way, hidden, weight, tokens))
            of_hidden = (d_hidden - exact[0]).norm(dim=-1) / exact[0].norm(dim=-1)
            row[name] = {
                "hidden": round(of_hidden.median().item(), 5),
                "weight": round(((d_weight - exact[1]).norm() / exact[1].norm()).item(), 5),
            }
    return {"shape": {"rows": ROWS, "hidden": HIDDEN, "vocabulary": VOCABULARY}, "relative_error": table}


def align_run(content: dict[str, Any], path: Path, run_dir: Path) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    resume = ["--resume"] if run_dir.exists() else []
    command = [sys.executable, "-m", "align.cli", "run", str(path), "--run-dir", str(run_dir), *resume]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})


def curves(folder: Path, seeds: list[int]) -> dict[str, Any]:
    tiny = yaml.safe_load((ROOT / "align/recipes/tiny.yaml").read_text(encoding="utf-8"))
    stages = tiny["stages"]
    parents = folder / "parents"
    before = {name: stage for name, stage in stages.items() if name not in ("ppo", "evaluate")}
    align_run({**tiny, "stages": before}, folder / "parents.yaml", parents)
    stage = {**stages["ppo"], "init_from": "base"}
    stage["rewards"] = [{"kind": "model", "init_from": str(parents / "reward_model")}]
    found: dict[str, Any] = {}
    for seed in seeds:
        for dtype in ("float32", "bfloat16"):
            run_dir = folder / f"{dtype}-{seed}"
            model = {"kind": "pretrained", "path": str(parents / "dpo" / "model")}
            content = {"name": "bf16", "seed": seed, "dtype": dtype, "model": model, "stages": {"ppo": stage}}
            align_run(content, folder / f"{run_dir.name}.yaml", run_dir)
            lines = read_jsonl(run_dir / "ppo" / "metrics.jsonl")
            found.setdefault(dtype, {})[str(seed)] = {
                name: [round(line[name], 5) for line in lines] for name in METRICS
            }
            print(dtype, seed, found[dtype][str(seed)]["score_mean"], flush=True)
    scores = {dtype: [run["score_mean"] for run in runs.values()] for dtype, runs in found.items()}
    mean = {dtype: [round(statistics.mean(at), 3) for at in zip(*runs)] for dtype, runs in scores.items()}
    return {"mean_score_per_iteration": mean, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", action="store_true", help="PPO of the recipe tiny in float32 and bf16")
    parser.add_argument("--folder", type=Path, help="folder of these runs, which are resumed (default: temporary)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    if options.curves:
        with tempfile.TemporaryDirectory() as folder:
            found = curves(options.folder or Path(folder), options.seeds)
            write("bf16_curves", found, option=f"--curves --seeds {' '.join(map(str, options.seeds))}")
    else:
        write("bf16_head", errors())


if __name__ == "__main__":
    main()
