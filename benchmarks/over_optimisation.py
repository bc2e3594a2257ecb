"""Over-optimisation of a reward model whose gold reward is known: `python benchmarks/over_optimisation.py`.

A random Llama model writes words. The gold reward (gold_words.py) labels pairs of its completions, a reward model (the
proxy) is trained on them, and PPO without a KL penalty maximises the proxy. Gold and proxy are measured at each step,
by the KL divergence from the start, and for the best of n completions of the start. Writes
results/over_optimisation.json and docs/images/over_optimisation.svg; the run folder is runs/over_optimisation.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from bench_ppo import words_tokenizer
from curves import GROUND, HEIGHT, IMAGES, WIDTH, panel
from gold_words import gold_score
from harness import write

HERE = Path(__file__).resolve().parent
WORDS, NEW_TOKENS, PROMPT = 32, 48, 8
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 128, 48
STEPS, BATCH = 60, 64
SAMPLES = 64
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def prepare(folder: Path) -> None:
    """Write the random model, the prompts and the recipe."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = words_tokenizer(WORDS + 1, stops=True)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        eos_token_id=WORDS,
        bos_token_id=None,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, count in (("train", TRAIN_PROMPTS), ("held_out", HELD_OUT_PROMPTS)):
        lines = [
            json.dumps({"prompt": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(PROMPT))}) for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder), sort_keys=False), encoding="utf-8")


def recipe(folder: Path) -> dict[str, Any]:
    train, held_out = ([{"path": str(folder / f"{name}.jsonl")}] for name in ("train", "held_out"))
    gold = {"kind": "function", "path": f"{HERE / 'gold_words.py'}:gold", "name": "gold"}
    rollout = {"engine": "huggingface", "max_new_tokens": NEW_TOKENS, "max_model_length": 64}
    constant = {"schedule": "constant", "warmup_fraction": 0.0}
    return {
        "name": "over_optimisation",
        "seed": 0,
        "model": {"kind": "pretrained", "path": str(folder / "model")},
        "stages": {
            "pairs": {
                "kind": "rejection_sample",
                "init_from": "base",
                "train": train,
                "held_out": held_out,
                "rewards": [gold],
                "samples": 8,
                "keep": "pairs",
                "rollout": rollout,
            },
            "proxy": {
                "kind": "reward_model",
                "init_from": "base",
                "data": {
                    "train": [{"kind": "stage", "stage": "pairs"}],
                    "held_out": [{"kind": "stage", "stage": "pairs", "split": "held_out"}],
                    "max_length": 64,
                },
                "optimizer": {"learning_rate": 1e-3, **constant},
                "batch_size": 16,
                "micro_batch_size": 16,
                "epochs": 5,
            },
            "ppo": {
                "kind": "ppo",
                "init_from": "base",
                "prompts": train,
                "max_prompt_length": 16,
                "rewards": [{"kind": "model", "init_from": "proxy", "name": "proxy"}, {**gold, "weight": 0.0}],
                "rollout": rollout,
                "optimizer": {"learning_rate": 3e-4, "eps": 1e-5, **constant},
                "critic": {"learning_rate": 5e-4},
                "steps": STEPS,
                "batch_size": BATCH,
                "mini_batch_size": 32,
                "epochs": 2,
                "kl": {"coef": 0.0},
            },
        },
    }


def of_ppo(run_dir: Path) -> list[dict[str, float]]:
    """KL divergence, proxy and gold of the completions of each step."""
    lines = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {"step": line["step"], "kl": line["kl"], "proxy": line["reward/proxy"], "gold": line["reward/gold"]}
        for line in lines
    ]


def of_best_of_n(folder: Path, run_dir: Path) -> list[dict[str, Any]]:
    """The curve of the start's own completions of the held-out prompts, with 95 % intervals over prompts."""
    from align.data.chat import encode_prompt, stop_token_ids
    from align.eval.reward_model.best_of_n import best_of_n
    from align.eval.reward_model.score import score_answers
    from align.reward.model import ModelScorer
    from align.rollout.hf_requests import HuggingFaceModel
    from align.rollout.requests import Request
    from align.run.checkpoint import require_checkpoint
    from align.train.checkpoint import load_policy, load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    policy = load_policy(folder / "model", "float32", frozen=True)
    model = HuggingFaceModel(policy, tokenizer, max_length=126, batch_size=256)
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]
    stops = tuple(stop_token_ids(tokenizer))
    requests = [
        Request(tuple(prompt), NEW_TOKENS, temperature=1.0, stop_token_ids=stops, seed=number * SAMPLES + sample)
        for number, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]
    made = dict(model.generate(requests))
    scorer = ModelScorer(require_checkpoint(run_dir / "proxy"), "float32", 8192)
    encoded = [(list(request.prompt_ids), list(made[i].token_ids)) for i, request in enumerate(requests)]
    proxy = [0.0 if found is None else found for found in score_answers(scorer, encoded)]
    gold = [gold_score(made[i].text) for i in range(len(requests))]
    rows = range(0, len(requests), SAMPLES)
    points = best_of_n([proxy[i : i + SAMPLES] for i in rows], [gold[i : i + SAMPLES] for i in rows])
    return [
        {"n": p.n, "kl": p.kl}
        | {
            name: {"mean": of.mean, "low": of.low, "high": of.high}
            for name, of in (("proxy", p.proxy), ("gold", p.gold))
        }
        for p in points
    ]


def draw(ppo: list[dict[str, float]], best: list[dict[str, Any]]) -> str:
    """Four panels over the KL divergence: proxy and gold of PPO and of best of n."""
    by_kl = sorted(ppo, key=lambda point: point["kl"])
    panels: list[str] = []
    for number, (title, points) in enumerate((("PPO", by_kl), ("best of n", best))):
        kl = [round(point["kl"], 2) for point in points]
        for place, name in enumerate(("proxy", "gold")):
            values = [point[name]["mean"] if isinstance(point[name], dict) else point[name] for point in points]
            panels += panel(f"{title}: {name}", kl, values, (2 * number + place) * WIDTH, across="KL")
    width = 4 * WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">'
    return "\n".join([head, f'<rect width="100%" height="100%" fill="{GROUND}"/>', *panels, "</svg>\n"])


def main() -> None:
    folder, run_dir = (Path("runs") / f"over_optimisation{end}" for end in ("_data", ""))
    folder, run_dir = folder.resolve(), run_dir.resolve()
    prepare(folder)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    resume = ["--resume"] if run_dir.exists() else []
    command = [
        sys.executable,
        "-m",
        "align.cli",
        "run",
        str(folder / "recipe.yaml"),
        "--run-dir",
        str(run_dir),
        *resume,
    ]
    subprocess.run(command, env=environment, check=True)
    ppo, best = of_ppo(run_dir), of_best_of_n(folder, run_dir)
    manifest = json.loads((run_dir / "proxy" / "manifest.json").read_text(encoding="utf-8"))
    pairs = json.loads((run_dir / "pairs" / "manifest.json").read_text(encoding="utf-8"))["metrics"]["train_kept"]
    write(
        "over_optimisation",
        {
            "pairs": pairs,
            "proxy": manifest["metrics"],
            "ppo": ppo,
            "best of n": best,
            "completions of a prompt": SAMPLES,
        },
        show=False,
    )
    (IMAGES / "over_optimisation.svg").write_text(draw(ppo, best), encoding="utf-8")


if __name__ == "__main__":
    main()
