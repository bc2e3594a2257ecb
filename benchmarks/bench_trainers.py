"""SFT, reward model, DPO and KTO against TRL's trainers: tokens per second, peak memory and loss curves.

Both sides train the same weights on the same token ids, in the same order, with AdamW in float32. TRL trains
transformers' own model class with its fastest `experts_implementation`, which is determined first: rows padded, and
padded with length grouping. Each side has a process of its own; the processes take turns, one epoch each. An epoch of
DPO and KTO includes the log-probabilities of the reference. Peak memory is that of the first epoch, weights included.

Loss curves: the largest difference between align and TRL (padded) in any step of all epochs, and, as the noise between
seeds, the largest difference in any step of the first epoch between two orders of the rows.

Rows are conversations of the installed Python's documentation, or of --sft FILE and --pairs FILE. "fixed lengths" has
rows of one length, without padding on either side.

python benchmarks/bench_trainers.py [--rows N] [--repeats N] [--sft FILE --pairs FILE]

With --models, --kinds or --lengths, some cases are measured again; the results of the others are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import RESULTS, PeakMemory, write
from trainer_sides import (
    ALIGN,
    BATCH,
    DENSE,
    GROUPED,
    MICRO_BATCH,
    MODELS,
    PADDED,
    SHARED,
    Case,
    sequence_lengths,
    write_inputs,
    write_model,
)

from align.run.manifest import code_version

IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Not batched_mm, which copies an expert's weights for each of its tokens: a step takes more than 40 times as long."""
TARGETS = {"natural lengths": 2.0, "fixed lengths": 1.0}

FORK = multiprocessing.get_context("fork")
"""Processes inherit the imported libraries. The parent computes nothing: a fork would lose its threads."""


def import_libraries() -> None:
    import datasets
    import transformers
    import trl
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer  # noqa: F401  # imported when they are named

    import align.recipes.kto  # noqa: F401
    from align.train.quiet import quieten

    quieten()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    assert trl.__version__


class Side:
    """One side of a case in a process of its own."""

    def __init__(self, case: dict[str, Any], side: str, implementation: str | None):
        self.connection, other = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(other, case, side, implementation), daemon=True)
        self.process.start()
        other.close()
        self.lengths: list[int] = self.connection.recv()

    def epoch(self) -> dict[str, Any]:
        """Train one epoch: its losses, seconds, CPU seconds, and peak memory since the model was loaded, in MiB."""
        self.connection.send(True)
        found: dict[str, Any] = self.connection.recv()
        return found

    def close(self) -> None:
        self.connection.send(False)  # closing is not enough: processes that were forked later have the other end, too
        self.process.join()


def serve(connection: Any, case: dict[str, Any], side: str, implementation: str | None) -> None:
    """Answer each request with an epoch, until the request is False."""
    made = Case(**case)
    connection.send(sequence_lengths(made.data.train, made.kind))
    with PeakMemory() as peak:
        epoch = made.epoch(side, implementation)
        while connection.recv():
            wall, processor = time.perf_counter(), time.process_time()
            losses = epoch()
            times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
            peak.__exit__()
            connection.send({"losses": losses, "peak_mib": peak.bytes / 2**20, **times})


@contextmanager
def sides_of(case: dict[str, Any], sides: dict[str, tuple[str, str | None]]) -> Iterator[dict[str, Side]]:
    """Processes of the sides by name; sides: (side, experts implementation) of each."""
    made: dict[str, Side] = {}
    try:
        for name, (side, implementation) in sides.items():
            made[name] = Side(case, side, implementation)
        yield made
    finally:
        for running in made.values():
            running.close()


def alternate(sides: dict[str, Side], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Epochs of each side; the order of the sides rotates. The first is a warm-up."""
    names = list(sides)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(sides[name].epoch())
    return found


def fastest(case: dict[str, Any]) -> tuple[str | None, dict[str, float]]:
    """TRL's fastest experts implementation, and the seconds of an epoch of each."""
    if case["model_type"] in DENSE:
        return None, {}
    with sides_of(case, {name: (PADDED, name) for name in IMPLEMENTATIONS}) as sides:
        found = alternate(sides, 1)
    seconds = {name: round(min(epoch["seconds"] for epoch in epochs[1:]), 3) for name, epochs in found.items()}
    return min(seconds, key=seconds.__getitem__), seconds


def measure(case: dict[str, Any], implementation: str | None, repeats: int) -> dict[str, Any]:
    names = [ALIGN, PADDED] + [GROUPED] * (case["kind"] != "kto" and not case["fixed"])
    with sides_of(case, {name: (name, implementation) for name in names}) as sides:
        epochs = alternate(sides, repeats)
        lengths = sides[ALIGN].lengths
    with sides_of({**case, "seed": 1}, {ALIGN: (ALIGN, None)}) as other:
        other_seed = other[ALIGN].epoch()["losses"]
    tokens = sum(lengths)

    def of(name: str, key: str) -> list[float]:
        return [round(epoch[key], 3) for epoch in epochs[name][1:]]

    losses = {name: [loss for epoch in found for loss in epoch["losses"]] for name, found in epochs.items()}
    seconds = {name: of(name, "seconds") for name in names}
    processor = {name: of(name, "cpu_seconds") for name in names}
    return {
        "sequences": len(lengths),
        "tokens": tokens,
        "longest": max(lengths),
        "steps": len(other_seed),
        "seconds": seconds,
        "cpu_seconds": processor,
        "tokens_per_second": {name: round(tokens / statistics.median(values)) for name, values in seconds.items()},
        "peak_mib": {name: round(found[0]["peak_mib"]) for name, found in epochs.items()},
        "align / TRL": {name: ratio(seconds, name) for name in names[1:]},
        "align / TRL, CPU": {name: ratio(processor, name) for name in names[1:]},
        "target": TARGETS["fixed lengths" if case["fixed"] else "natural lengths"],
        "losses": {name: [round(loss, 6) for loss in values] for name, values in losses.items()},
        "largest loss difference": largest(losses[ALIGN], losses[PADDED]),
        "noise between seeds": largest(losses[ALIGN][: len(other_seed)], other_seed),
    }


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Speed of align divided by that of `name`, median over the epochs."""
    return round(statistics.median(b / a for a, b in zip(seconds[ALIGN], seconds[name], strict=True)), 3)


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run with the same settings, models and files, if any; otherwise `results`."""
    path = RESULTS / "trainers.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    same = json.loads(json.dumps(results)).items() <= earlier.items()
    return earlier if same else results


def in_child(function: Any, *arguments: Any, **options: Any) -> None:
    """Run `function` in a process of its own, so that this one has no threads."""
    child = FORK.Process(target=function, args=arguments, kwargs=options)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} failed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default="sft,reward_model,dpo,kto")
    parser.add_argument("--lengths", default=",".join(TARGETS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sft", help="JSONL file of conversations: instruction, input, output")
    parser.add_argument("--pairs", help="JSONL file of pairs: prompt, chosen, rejected")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    version = code_version()
    import_libraries()
    settings = {"batch": BATCH, "micro_batch": MICRO_BATCH, "rows": options.rows, "repeats": options.repeats, **SHARED}
    names = {"sft": Path(options.sft or "python_docs").name, "pairs": Path(options.pairs or "made").name}
    results: dict[str, Any] = {"settings": settings, "models": MODELS, "files": names}
    if any(getattr(options, name) != parser.get_default(name) for name in ("models", "kinds", "lengths")):
        results = kept(results)
    option = " ".join(f"--{key} {name}" for key, name in names.items() if getattr(options, key))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_child(write_inputs, folder, options.rows, options.sft, options.pairs)
        for model_type in options.models.split(","):
            for scorer in (False, True):
                in_child(write_model, folder, model_type, scorer=scorer)
            implementation = None
            for lengths in options.lengths.split(","):
                for number, kind in enumerate(options.kinds.split(",")):
                    fixed = lengths == "fixed lengths"
                    case = {"folder": folder, "model_type": model_type, "kind": kind, "fixed": fixed}
                    if number == 0:
                        implementation, seconds = fastest(case)
                        results[f"{model_type}, {lengths}: TRL by experts_implementation, seconds"] = seconds
                    label, begin = f"{model_type}, {kind}, {lengths}", time.perf_counter()
                    found = results[label] = measure(case, implementation, options.repeats)
                    results["minutes"] = {
                        **results.get("minutes", {}),
                        label: round((time.perf_counter() - begin) / 60, 1),
                    }
                    shown = {key: found[key] for key in found if key not in ("losses", "seconds", "cpu_seconds")}
                    print(f"{label}: {shown}", flush=True)
                    write("trainers", results, option=option, show=False, version=version)


if __name__ == "__main__":
    main()
