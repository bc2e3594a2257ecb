"""PPO against TRL 1.12's PPOTrainer: episodes per second, time of each phase and peak memory; with --curves, learning
curves, which do not need an idle machine.

Both start from the same weights and see the same prompts, reward and settings. The sides alternate, each in its own
process and environment. In the cases of a mixture of experts, TRL computes with transformers' `hunyuan_v1_moe`, which
has align's sizes and parameters if cross-layer attention is off, with one difference: for top-1 routing it gives the
expert the weight 1 instead of its probability. TRL's fastest `experts_implementation` is determined first, in separate
runs. In the case of a dense model, both sides read the same checkpoint with transformers' Llama class.

`make bench-trl` creates TRL's environment (requirements/bench-trl.lock, in .venv-trl) and runs everything, in about two
hours; `python benchmarks/bench_ppo.py [--curves] [--cases 'a;b'] [--repeats N] [--seeds N] [--trl PYTHON]` runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_topk": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,  # a tied, untrained model repeats its last token
}
DENSE_SIZES = {  # the proportions of SmolLM2-135M, at half its width and a fifth of its layers
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
OURS_ONLY = {"use_cla": False, "num_shared_expert": 1, "rope_inv_freq_dtype": "float32", "router_aux_loss_coef": 0.0}
SETTINGS = {
    "prompt_length": 32,
    "batch_size": 64,
    "rounds": 4,
    "mini_batch_size": 32,
    "epochs": 2,
    "learning_rate": 1e-4,
    "kl_coef": 0.02,
    "seed": 0,
}
PHASES = [f"time/{phase}" for phase in ("generate", "score", "logprobs", "update", "sync")]
CASES: dict[str, dict[str, Any]] = {
    "dense Llama, variable lengths": {
        "vocab_size": 64,
        "stops": True,
        "max_new_tokens": 256,
        "dense": True,
        "rounds": 2,
        "target": 3.0,
        "curves": {"rounds": 12, "learning_rate": 1e-4},
    },
    "variable lengths": {
        "vocab_size": 64,
        "stops": True,
        "max_new_tokens": 256,
        "target": 3.0,
        "curves": {"rounds": 12, "learning_rate": 1e-4},
    },
    "fixed lengths": {  # each of the many words is learned separately
        "vocab_size": 1024,
        "stops": False,
        "max_new_tokens": 64,
        "target": 1.2,
        "curves": {"rounds": 32, "learning_rate": 3e-4},
    },
}


# --- shared inputs ---------------------------------------------------------------------------------------------


def prepare(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the model (with a configuration per library), tokenizer and prompts; return the case with their paths."""
    vocab_size = case["vocab_size"]
    stop_id = vocab_size - 1 if case["stops"] else None
    tokenizer = words_tokenizer(vocab_size, case["stops"])
    save = save_llama if case.get("dense") else save_mixtures
    ours, theirs = save(folder, tokenizer, {"vocab_size": vocab_size, "eos_token_id": stop_id})
    draw = random.Random(0)
    words = vocab_size - (1 if case["stops"] else 0)
    lines = [
        json.dumps({"prompt": " ".join(f"w{draw.randrange(words)}" for _ in range(SETTINGS["prompt_length"]))}) + "\n"
        for _ in range(512)
    ]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        **SETTINGS,
        **case,
        "align_model": str(ours),
        "trl_model": str(theirs),
        "prompts": str(folder / "prompts.jsonl"),
    }


def save_llama(folder: Path, tokenizer: Any, tokens: dict[str, Any]) -> tuple[Path, Path]:
    """Save a random Llama model that both sides read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**DENSE_SIZES, **tokens, bos_token_id=None)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "model"


def save_mixtures(folder: Path, tokenizer: Any, tokens: dict[str, Any]) -> tuple[Path, Path]:
    """Save a random HunYuan model for align, and its weights with the configuration of transformers' class for TRL."""
    import torch

    from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM

    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**tokens, **SIZES, **OURS_ONLY))
    ours, theirs = folder / "align_model", folder / "trl_model"
    model.save_pretrained(ours)
    tokenizer.save_pretrained(ours)
    tokenizer.save_pretrained(theirs)
    (theirs / "model.safetensors").symlink_to(ours / "model.safetensors")
    config = {
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "bos_token_id": None,
        "pad_token_id": None,
        **SIZES,
        **tokens,
    }
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ours, theirs


def words_tokenizer(vocab_size: int, stops: bool) -> Any:
    """A tokenizer of words `w0`, `w1`, ... whose ids are their numbers; with `stops` the last id ends a sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [f"w{i}" for i in range(vocab_size)]
    if stops:
        names[-1] = "<eos>"
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>" if stops else None,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


# --- align -----------------------------------------------------------------------------------------------------


def recipe(case: dict[str, Any]) -> dict[str, Any]:
    """The case as a recipe."""
    return {
        "name": "versus-trl",
        "seed": case["seed"],
        "model": {"kind": "pretrained", "path": case["align_model"]},
        "stages": {
            "ppo": {
                "kind": "ppo",
                "prompts": [{"kind": "file", "path": case["prompts"]}],
                "max_prompt_length": case["prompt_length"],
                "rewards": [{"kind": "function", "path": f"{HERE / 'even_words.py'}:surplus"}],
                "rollout": {
                    "max_new_tokens": case["max_new_tokens"],
                    "max_model_length": case["prompt_length"] + case["max_new_tokens"],
                    "max_sequences": case["batch_size"],
                    "cache_gib": 0.2,
                },
                "optimizer": {
                    "learning_rate": case["learning_rate"],
                    "eps": 1e-5,
                    "schedule": "constant",
                    "warmup_fraction": 0.0,
                    "max_grad_norm": 1e9,  # TRL's trainer does not clip
                },
                "critic": {"learning_rate": case["learning_rate"]},
                "kl": {"coef": case["kl_coef"]},
                "steps": case["rounds"],
                "batch_size": case["batch_size"],
                "mini_batch_size": case["mini_batch_size"],
                "micro_batch_tokens": 1536,  # half a mini-batch of fixed lengths; policy and critic train in parallel
                "old_logprobs": "rollout",  # as in TRL, which keeps the logits of its generation
                "epochs": case["epochs"],
                "checkpoint_every": case["rounds"] + 1,
                **case.get("changes", {}),
            }
        },
    }


def run_align(case: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    from align.config.recipe import Recipe
    from align.pipeline import run
    from align.run.manifest import package_versions

    ends: list[tuple[float, float]] = []  # (wall clock, CPU time) at the end of each iteration

    def hear(line: str) -> None:
        if line.lstrip().startswith("step "):
            ends.append((time.perf_counter(), time.process_time()))

    run_dir = Path(case["work_dir"]) / "run"
    run(Recipe.model_validate(recipe(case)), run_dir, say=hear, progress=hear)
    log = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [{k.removeprefix("time/"): v for k, v in line.items() if k in PHASES} for line in log]
    began = ends[0][0] - sum(rounds[0].values())
    return {
        "start_up": began - started,
        "seconds": ends[-1][0] - began,
        "cpu_seconds_after_first_round": ends[-1][1] - ends[0][1],
        "rounds": rounds,
        "score": [line["score_mean"] for line in log],
        "kl": [line["kl"] for line in log],
        "length": [line["completion_length"] for line in log],
        "mismatch_max": max(line["mismatch_max"] for line in log),
        "packages": package_versions(),
    }


# --- comparison ------------------------------------------------------------------------------------------------


def run_side(side: str, case: dict[str, Any], trl_python: str) -> dict[str, Any]:
    """One run in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        case_file, result_file = Path(folder) / "case.json", Path(folder) / "result.json"
        case_file.write_text(json.dumps({**case, "work_dir": folder}), encoding="utf-8")
        script = [sys.executable, str(HERE / "bench_ppo.py"), "--align"]
        if side == "trl":
            script = [trl_python, str(HERE / "trl_ppo.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(case["threads"]), "HF_HUB_OFFLINE": "1"}
        with (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            command = [*script, str(case_file), str(result_file)]
            with subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
                peak_bytes = watch_memory(process)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"{side} ended with code {process.returncode}:\n{log.read()[-3000:]}")
        return json.loads(result_file.read_text(encoding="utf-8")) | {"peak_bytes": peak_bytes}


def watch_memory(process: subprocess.Popen) -> int:
    """Wait for a process to end; return the peak resident memory of it and its children, added up (Linux).

    The kernel keeps the peaks, so polling now and then is enough. A child is counted from the second poll on, because a
    child that is just starting still shows its parent's memory.
    """
    highest: dict[int, int] = {}
    seen: set[int] = set()
    while process.poll() is None:
        family = {process.pid, *children(process.pid)}
        for pid in family & (seen | {process.pid}):
            highest[pid] = max(highest.get(pid, 0), high_water_mark(pid))
        seen = family
        time.sleep(0.25)
    return sum(highest.values())


def children(pid: int) -> set[int]:
    """Process ids of all descendants."""
    try:
        own = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # the process has just ended
        return set()
    return set(own).union(*map(children, own))


def high_water_mark(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def episodes_per_second(case: dict[str, Any], result: dict[str, Any]) -> float:
    return case["rounds"] * case["batch_size"] / result["seconds"]


def phases(results: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase per PPO iteration: medians over all iterations of all runs."""
    rounds = [r for result in results for r in result["rounds"]]
    return {name: round(statistics.median(r.get(name, 0.0) for r in rounds), 3) for name in rounds[0]}


def measure(name: str, case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    speeds, failures = {}, {}
    for implementation in () if case.get("dense") else options.implementations.split(","):
        try:
            trial = run_side("trl", {**case, "experts_implementation": implementation}, options.trl)
        except RuntimeError as error:  # batched_mm, which copies expert weights for every token, may run out of memory
            failures[implementation] = str(error).splitlines()[0]
            say(f"{name}: TRL {implementation} does not run: {failures[implementation]}")
            continue
        speeds[implementation] = round(episodes_per_second(case, trial), 3)
        say(f"{name}: TRL {implementation} {speeds[implementation]} episodes/s")
    if speeds:
        case = {**case, "experts_implementation": max(speeds, key=speeds.__getitem__)}
    results: dict[str, list[dict[str, Any]]] = {"align": [], "trl": []}
    for repeat in range(options.repeats):
        for side in ("align", "trl") if repeat % 2 == 0 else ("trl", "align"):
            result = run_side(side, case, options.trl)
            results[side].append(result)
            say(
                f"{name}: {side} {episodes_per_second(case, result):.2f} episodes/s, "
                f"{result['peak_bytes'] / 2**20:.0f} MiB, {phases([result])}"
            )
    ratios = [t["seconds"] / a["seconds"] for a, t in zip(results["align"], results["trl"], strict=True)]
    summary: dict[str, Any] = {
        **{key: value for key, value in CASES[name].items() if key != "curves"},
        **({"TRL by experts_implementation, episodes/s": speeds} if speeds else {}),
        **({"TRL by experts_implementation, failures": failures} if speeds else {}),
        "align / TRL, episodes/s": round(statistics.median(ratios), 3),
        "align / TRL, each pair of runs": [round(r, 3) for r in ratios],
    }
    for side, runs in results.items():
        summary[side] = {
            "episodes_per_second": round(statistics.median(episodes_per_second(case, r) for r in runs), 3),
            "peak_mib": round(statistics.median(r["peak_bytes"] for r in runs) / 2**20),
            "start_up_seconds": round(statistics.median(r["start_up"] for r in runs), 1),
            "seconds_of_a_round": phases(runs),
            "packages": runs[0]["packages"],
        }
    summary["align"]["completion_length"] = round(statistics.mean(n for r in results["align"] for n in r["length"]), 1)
    summary["align"]["mismatch_max"] = max(r["mismatch_max"] for r in results["align"])
    return summary


def learning(name: str, case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Mean score of each PPO iteration, for several seeds, and its mean over each quarter of the iterations."""
    if not case.get("dense"):
        case = {**case, "experts_implementation": options.implementations.split(",")[0]}
    case = {**case, **case["curves"]}
    curves: dict[str, list[list[float]]] = {"align": [], "trl": []}
    for seed in range(options.seeds):
        for side, found in curves.items():
            result = run_side(side, {**case, "seed": seed}, options.trl)
            found.append([round(score, 4) for score in result["score"]])
            say(f"{name}: {side} seed {seed}: {found[-1][0]:.3f} -> {found[-1][-1]:.3f}")
    part = case["rounds"] // 4
    return {
        **case["curves"],
        "seeds": options.seeds,
        "score of each round": curves,
        "score of each quarter of the rounds": {
            side: [
                round(statistics.mean(score for curve in found for score in curve[i * part : (i + 1) * part]), 4)
                for i in range(4)
            ]
            for side, found in curves.items()
        },
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--align", nargs=2, metavar=("CASE", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("--cases", default=";".join(CASES), help="some of: " + "; ".join(CASES))
    parser.add_argument(
        "--implementations", default=",".join(IMPLEMENTATIONS), help="TRL's `experts_implementation`s to choose from"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--curves", action="store_true", help="learning curves instead of speed and memory")
    parser.add_argument("--seeds", type=int, default=3, help="learning curves of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl", default=str(HERE.parent / ".venv-trl" / "bin" / "python"))
    options = parser.parse_args()
    if options.align:
        case_file, result_file = map(Path, options.align)
        result_file.write_text(json.dumps(run_align(json.loads(case_file.read_text(encoding="utf-8")))))
        return
    if not Path(options.trl).exists():
        sys.exit(
            f"{options.trl}: not found; run `make bench-trl`, or pass --trl PYTHON of an environment with TRL 1.12."
        )
    from harness import write

    kind = "ppo_curves_vs_trl" if options.curves else "ppo_vs_trl"
    settings = {
        kind: {"model": {**SIZES, **OURS_ONLY}, "settings": SETTINGS},
        f"{kind}_dense": {"model": DENSE_SIZES, "settings": SETTINGS},
    }
    for name in options.cases.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            case = {**prepare(CASES[name], Path(folder)), "threads": options.threads}
            file = f"{kind}_dense" if case.get("dense") else kind
            settings[file][name] = (learning if options.curves else measure)(name, case, options)
        write(file, settings[file], option="--curves" if options.curves else "")  # after each case: each takes long


if __name__ == "__main__":
    main()
