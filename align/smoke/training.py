"""Lines 5 to 8: `align run` on a small recipe, started as a command, as users do."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from align.config import load_recipe
from align.plan.shape import shape_of
from align.run.folder import read_jsonl
from align.smoke.bandwidth import all_reduce
from align.smoke.machine import Machine
from align.smoke.table import Check, below, fast, holds, skipped

ONE = "parallel={processes: 1, zero_stage: 3}"
MFU, DECODING = 0.17, 40_000
"""Estimates: share of a GPU's peak FLOP/s in SFT, and sampled tokens per second on an H200 without CUDA graphs."""
MEAN, LARGEST = 0.02, 1.0
"""Bounds on the mean and largest mismatch between sampler and trainer in bf16, in nats."""
SAME = 1e-4
"""Bound on the relative difference between the fp32 losses of one process and of several."""


class Run(NamedTuple):
    """A finished or killed `align run`. lines: (seconds since its start, printed line)."""

    folder: Path
    lines: list[tuple[float, str]]


def sft(machine: Machine, folder: Path) -> list[Check]:
    """Run line 5."""
    run = align_run(recipe(machine, folder), folder, "sft", "--only", "sft", "dtype=bfloat16")
    checks = [learns(run)]
    rate = tokens_per_second(run)
    share = None
    if machine.peak_flops is not None:
        flops = flops_per_token(run)
        share = MFU * machine.peak_flops / flops
        checks.append(fast("share of the peak", 100 * rate * flops / machine.peak_flops, 100 * MFU, "%"))
    return [*checks, fast("tokens per second", rate, share, "tokens/s")]


def resume(machine: Machine, folder: Path) -> list[Check]:
    """Run line 6: the rank is killed after a checkpoint. The resumed run must end with bit-equal weights and losses."""
    if find_spec("deepspeed") is None:
        return [skipped("ZeRO-3", "DeepSpeed is not installed: align doctor")]
    words = ("--only", "sft", "dtype=bfloat16", ONE)
    path = recipe(machine, folder)
    whole = align_run(path, folder, "whole", *words)
    target = folder / "runs/killed"
    killed = align_run(path, folder, "killed", *words, kill=lambda: checkpoints(target) > 0)
    step = max((int(line.split("step ")[1].split("/")[0]) for _, line in killed.lines if "  step " in line), default=0)
    interrupted = not (target / "sft/manifest.json").exists()
    checks = [learns(whole), holds("a rank is killed", "an unfinished run", f"after step {step}", interrupted)]
    resumed = align_run(path, folder, "killed", "--resume", "dtype=bfloat16", ONE, "--only", "sft", keep=True)
    same = weights(whole) == weights(resumed) and losses(whole) == losses(resumed)
    return [*checks, holds("resumed run", "bit-equal", "bit-equal" if same else "different weights or losses", same)]


def grpo(machine: Machine, folder: Path) -> list[Check]:
    """Run line 7."""
    if find_spec("vllm") is None:
        return [skipped("GRPO", "vLLM is not installed: align doctor")]
    words = [ONE] if machine.has_gpu else []
    run = align_run(recipe(machine, folder), folder, "grpo", "--only", "ppo", "dtype=bfloat16", *words)
    rows = read_jsonl(run.folder / "ppo/metrics.jsonl")
    mean, largest = (max(row[f"mismatch_{name}"] for row in rows) for name in ("mean", "max"))
    size, seconds, rate = (rows[-1][key] for key in ("sync/mib", "time/weights", "speed/rollout"))
    return [
        below("sampler against trainer", mean=(mean, MEAN), largest=(largest, LARGEST)),
        below("policy gradient", norm=(rows[-1]["policy_grad_norm"], 1e3)),
        fast(f"weight update, {size:,.0f} MiB", seconds, 1.0 if machine.has_gpu else None, "s", at_most=True),
        fast("sampled tokens per second", rate, DECODING if machine.peak_flops else None, "tokens/s"),
    ]


def several(machine: Machine, folder: Path) -> list[Check]:
    """Run line 8: compare the fp32 losses of the tiny model in one process and in several.

    There are four processes with four or more GPUs, and otherwise two.
    """
    if find_spec("deepspeed") is None:
        return [skipped("several processes", "DeepSpeed is not installed: align doctor")]
    if machine.gpus == 1:
        return [skipped("several processes", "this process sees one GPU")]
    count = 2 if machine.gpus < 4 else 4
    path = recipe(Machine("cpu", None, 0), folder)
    parallel = f"parallel={{processes: {count}, zero_stage: 3, expert_parallel_size: {count}}}"
    one = align_run(path, folder, "one", "--only", "sft", ONE)
    spread = align_run(path, folder, "several", "--only", "sft", parallel)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses(spread), losses(one), strict=True))
    checks = [below(f"losses of {count} processes", difference=(worst, SAME))]
    if not machine.has_gpu:
        return [*checks, skipped("NCCL all-reduce", "needs several GPUs")]
    link = None if machine.peak is None else 0.7 * machine.peak.link
    return [*checks, fast(f"NCCL all-reduce, {machine.gpus} GPUs", all_reduce(machine.gpus, folder), link, "GB/s")]


# --- running ----------------------------------------------------------------------------------------------


def recipe(machine: Machine, folder: Path) -> Path:
    """Write the data that the recipe reads; return the recipe's path."""
    name, words, count = ("gpu", 4096, 256) if machine.has_gpu else ("tiny", 40, 64)
    data = folder / "data" / name
    if not (data / "conversations.jsonl").exists():
        write_data(data, words, count)
    return Path(__file__).parent / f"{name}.yaml"


def write_data(folder: Path, words: int, count: int) -> None:
    """Write `count` conversations whose answers are `words` random numbers, and their texts for the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    answers = [" ".join(str(draw.randrange(1000)) for _ in range(words)) for _ in range(count)]
    questions = [f"Write {words} numbers, of which the first is {answer.split()[0]}." for answer in answers]
    pairs = list(zip(questions, answers, strict=True))
    texts = [{"text": f"{question} {answer}"} for question, answer in pairs]
    rows = [{"prompt": question, "completion": answer} for question, answer in pairs]
    for name, content in (("texts", texts), ("conversations", rows)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content), encoding="utf-8")


def align_run(
    path: Path, folder: Path, name: str, *words: str, kill: Callable[[], bool] | None = None, keep: bool = False
) -> Run:
    """Run `align run` in the folder runs/NAME, reusing the base model of an earlier run if possible.

    kill: once it returns True, all ranks are killed with SIGKILL; the run's exit status is then ignored.
    keep: keep the folder of an earlier run and continue in it.
    """
    target = folder / "runs" / name
    if not keep:
        shutil.rmtree(target, ignore_errors=True)
        reuse_base(target, path, words)
    command = [sys.executable, "-m", "align.cli", "run", str(path), "--run-dir", str(target), *words]
    print("$", *command[2:], flush=True)
    clock = time.perf_counter()
    lines = []
    process = subprocess.Popen(
        command,
        cwd=folder / "data" / path.stem,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "ALIGN_LOG_STEPS": "1"},  # `tokens_per_second` needs the line of every step
    )
    assert process.stdout is not None
    was_killed = False
    for line in process.stdout:
        lines.append((time.perf_counter() - clock, line.rstrip()))
        print(f"{lines[-1][0]:7.1f}  {line}", end="", flush=True)
        if kill is not None and not was_killed and kill():
            for rank in psutil.Process(process.pid).children():
                os.kill(rank.pid, signal.SIGKILL)
            was_killed = True
    code = process.wait()
    if code and not was_killed:
        last = next((text for _, text in reversed(lines) if text.strip()), "no output")
        raise RuntimeError(f"align run --run-dir {target} ended with exit code {code}: {last.strip()}")
    return Run(target, lines)


def reuse_base(target: Path, path: Path, words: tuple[str, ...]) -> None:
    """Hard-link the base model of an earlier run with the same model section, precision and seed, to save time."""
    wanted = load_recipe(path, [word for word in words if word.startswith("dtype=")]).model_dump(mode="json")
    for earlier in sorted(target.parent.glob("*/base/manifest.json")):
        found = json.loads((earlier.parents[1] / "recipe.json").read_text(encoding="utf-8"))
        if all(found[key] == wanted[key] for key in ("model", "dtype", "seed")):
            shutil.copytree(earlier.parent, target / "base", copy_function=os.link)
            return


# --- reading ----------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> int:
    """Number of complete checkpoints of the SFT stage."""
    return len(list((run / "sft/checkpoints").glob("*/complete")))


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in read_jsonl(run.folder / "sft/metrics.jsonl") if "loss" in row]


def weights(run: Run) -> dict[str, bytes]:
    """Bytes of each weight file of the SFT stage's model."""
    return {file.name: file.read_bytes() for file in (run.folder / "sft/model").glob("*.safetensors")}


def learns(run: Run) -> Check:
    """Check that the loss is finite and that the last loss is below the first."""
    found = losses(run)
    right = all(loss == loss and loss < float("inf") for loss in found) and found[-1] < found[0]
    return holds("loss falls", "last < first", f"{found[0]:.3f} to {found[-1]:.3f}", right)


def flops_per_token(run: Run) -> int:
    """FLOPs of a forward and backward pass per token of a full row."""
    config = json.loads((run.folder / "base/model/config.json").read_text(encoding="utf-8"))
    return round(3 * shape_of("base", config).token_flops(row_length(run) // 2))


def stage_settings(run: Run) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run.folder / "recipe.json").read_text(encoding="utf-8"))["stages"]["sft"]
    return settings


def row_length(run: Run) -> int:
    """Tokens per row: the stage's maximum length, because every answer is longer."""
    length: int = stage_settings(run)["data"]["max_length"]
    return length


def tokens_per_second(run: Run) -> float:
    """Tokens of a step, divided by the median time between the printed lines of two steps."""
    times = [seconds for seconds, line in run.lines if line.startswith("  step ")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    tokens: int = stage_settings(run)["batch_size"] * row_length(run)
    return tokens / statistics.median(gaps)
