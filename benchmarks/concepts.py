"""Values and figures of the pages in docs/concepts.

    python benchmarks/concepts.py                 train two small models (minutes), compute all values, draw the figures
    python benchmarks/concepts.py --only packing  compute these values again: trained, packing, kl, gae
    python benchmarks/concepts.py --only          draw the figures from benchmarks/results/concepts.json

Writes benchmarks/results/concepts.json and docs/images/concept_NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "concepts.json"
IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#0969da", "#d1651a", "#1a7f37", "#d0d7de"

MAX_LENGTH, ROWS = 256, 8
"""Settings of the packing figure: eight rows of at most 256 tokens per micro-batch."""
GAMMA, LAMBDAS, HORIZON = 1.0, (0.9, 0.95, 0.99, 1.0), 60
BALANCE_COEFFICIENTS = (0.0, 0.01)


# --- values --------------------------------------------------------------------------------------------------


def recipe(balance: float) -> dict[str, Any]:
    """Pretraining of a small mixture of experts (top-1 of 8 and a shared expert) on Python's documentation."""
    text = {"kind": "python_docs", "view": "text"}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    router = {"num_experts": 8, "moe_topk": 1, "num_shared_expert": 1, "router_aux_loss_coef": balance}
    return {
        "name": "concepts",
        "model": {
            "kind": "scratch",
            "tokenizer": {"vocab_size": 512, "data": [{**text, "limit": 200}]},
            "config": {**sizes, "num_key_value_heads": 2, "initializer_range": 0.05, **router},
        },
        "stages": {
            "pretrain": {
                "kind": "pretrain",
                "data": {"train": [{**text, "limit": 400}], "max_length": 128},
                "optimizer": {"learning_rate": 5e-3},
                "batch_size": 8,
                "micro_batch_size": 8,
                "max_steps": 120,
            }
        },
    }


def train(balance: float, folder: Path) -> list[dict[str, float]]:
    """Train; return the metrics of each step."""
    from align.config.recipe import Recipe
    from align.pipeline import run
    from align.run.folder import read_jsonl

    run(Recipe.model_validate(recipe(balance)), folder, say=lambda line: None)
    return [line for line in read_jsonl(folder / "pretrain" / "metrics.jsonl") if "loss" in line]


def row_lengths() -> list[int]:
    """Tokens of 32 questions and answers about Python's library."""
    from align.data.python_docs import python_docs_rows
    from align.data.tokenizer import train_tokenizer

    rows = python_docs_rows("conversation", "train", 800)
    texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows[:: len(rows) // 32][:32]]
    tokenizer = train_tokenizer(texts, 512)
    return [min(MAX_LENGTH, len(tokenizer(text).input_ids)) for text in texts]


def packed(lengths: list[int]) -> dict[str, Any]:
    """Computed tokens of padded micro-batches of ROWS rows, and the passes of the same rows packed."""
    from align.train.passes import split_into_passes

    batches = [lengths[first : first + ROWS] for first in range(0, len(lengths), ROWS)]
    passes = split_into_passes(lengths, ROWS * MAX_LENGTH)
    return {
        "lengths": lengths,
        "tokens": sum(lengths),
        "padded": sum(len(batch) * max(batch) for batch in batches),
        "passes": [[lengths[row] for row in members] for members in passes],
    }


def two_precisions(folder: Path) -> dict[str, list[float]]:
    """Log-probabilities of the tokens of 32 completions in bf16 (the sampler) and in float32 (the trainer), with the
    trainer's own routing and with the sampler's; and whether any layer chose another expert."""
    import torch

    from align.data.experience import build_experience
    from align.models.forward import policy_output
    from align.train.checkpoint import load_policy, load_tokenizer

    model = folder / "pretrain" / "model"
    trainer, sampler = load_policy(model, "float32").eval(), load_policy(model, "bfloat16").eval()
    prompts = [load_tokenizer(model)(text).input_ids for text in ("The module", "Return a", "If the", "This class")]
    torch.manual_seed(0)
    starts, ends = [], []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt] * 8)
            sampled = sampler.generate(ids, do_sample=True, top_k=0, max_new_tokens=64, min_new_tokens=64)
            starts += [prompt] * 8
            ends += sampled[:, len(prompt) :].tolist()
        batch = build_experience(starts, ends, [[0.0] * len(end) for end in ends])
        drawn = policy_output(sampler, batch, 1.0)
        own = policy_output(trainer, batch, 1.0)
        batch.routed_experts = drawn.routed_experts
        replayed = policy_output(trainer, batch, 1.0, replay=True)
    assert drawn.routed_experts is not None
    assert own.routed_experts is not None
    different = (drawn.routed_experts != own.routed_experts).flatten(2).any(-1)
    # A completion token is predicted by the token before it.
    before = [different[row, len(start) - 1 : len(start) - 1 + 64] for row, start in enumerate(starts)]
    valid = batch.mask.bool()
    tables = {"sampler": drawn.logprobs, "trainer": own.logprobs, "replayed": replayed.logprobs}
    rounded = {name: [round(float(x), 6) for x in table[valid]] for name, table in tables.items()}
    return rounded | {"rerouted": torch.cat(before).int().tolist()}


def kl_estimators() -> dict[str, Any]:
    """Mean and standard deviation of k1, k2 and k3 under the policy, and the exact KL, for policies further and further
    from one reference: categorical distributions over 32 tokens, computed by summation over all of them."""
    import torch

    from align.losses.kl import kl_estimate

    torch.manual_seed(0)
    reference, direction = torch.randn(32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    found: dict[str, Any] = {"kl": []}
    for size in torch.linspace(0.1, 2.0, 20, dtype=torch.float64):
        logp, logq = (reference + size * direction).log_softmax(0), reference.log_softmax(0)
        found["kl"].append(float((logp.exp() * (logp - logq)).sum()))
        for name in ("k1", "k2", "k3"):
            value = kl_estimate(logp, logq, name).double()
            mean = (logp.exp() * value).sum()
            spread = (logp.exp() * (value - mean) ** 2).sum().sqrt()
            found.setdefault(name, []).append([float(mean), float(spread)])
    ratios = torch.linspace(-2, 2, 81)
    found["log_ratio"] = ratios.tolist()
    found["values"] = {name: kl_estimate(ratios, torch.zeros(81), name).tolist() for name in ("k1", "k2", "k3")}
    return found


def gae_weights() -> dict[str, list[float]]:
    """The advantage of the first token for a TD error of 1 that comes d tokens later, by lambda."""
    import torch

    from align.losses.gae import gae

    rewards, zeros = torch.eye(HORIZON), torch.zeros(HORIZON, HORIZON)
    return {str(lam): gae(rewards, zeros, zeros + 1, GAMMA, lam)[0][:, 0].tolist() for lam in LAMBDAS}


def trained() -> dict[str, Any]:
    """Values of the two small models: their routers, and the tokens of the balanced one in two precisions."""
    with tempfile.TemporaryDirectory() as scratch:
        curves = {str(balance): train(balance, Path(scratch) / str(balance)) for balance in BALANCE_COEFFICIENTS}
        kept = ("expert_load_max", "router_entropy", "loss")
        router = {name: {key: [line[key] for line in lines] for key in kept} for name, lines in curves.items()}
        return {"router": router, "precisions": two_precisions(Path(scratch) / str(BALANCE_COEFFICIENTS[-1]))}


COMPUTED = {
    "trained": trained,
    "packing": lambda: {"packing": packed(row_lengths())},
    "kl": lambda: {"kl": kl_estimators()},
    "gae": lambda: {"gae": gae_weights()},
}


def compute(names: list[str]) -> dict[str, Any]:
    """The values on disk, with those of `names` computed again."""
    from align.run.manifest import code_version, hardware, package_versions

    values = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names:
        values |= COMPUTED[name]()
    return {**values, **code_version(), "packages": package_versions(), "hardware": hardware()}


# --- numbers that the pages quote ----------------------------------------------------------------------------


def numbers(values: dict[str, Any]) -> dict[str, str]:
    """The numbers in docs/concepts, by name, as the pages write them."""
    packing, precisions = values["packing"], values["precisions"]
    own, replayed = (differences(precisions, name) for name in ("trainer", "replayed"))
    moved = precisions["rerouted"]
    return {
        "rows": str(len(packing["lengths"])),
        "tokens": f"{packing['tokens']:,}",
        "padded": f"{packing['padded']:,}",
        "padding": f"{1 - packing['tokens'] / packing['padded']:.0%}",
        "passes": str(len(packing["passes"])),
        **{f"load {name}": f"{curve['expert_load_max'][-1]:.2f}" for name, curve in values["router"].items()},
        "sampled": f"{len(own):,}",
        "rerouted": f"{sum(moved) / len(moved):.1%}",
        "mean own": f"{sum(own) / len(own):.4f}",
        "mean replayed": f"{sum(replayed) / len(replayed):.4f}",
        "max own": f"{max(own):.2f}",
        "max replayed": f"{max(replayed):.2f}",
        "lambda 0.95 at 20": f"{values['gae']['0.95'][20]:.2f}",
    }


def differences(precisions: dict[str, list[float]], name: str) -> list[float]:
    """|log-probability of the sampler - log-probability `name`| of each token."""
    return [abs(a - b) for a, b in zip(precisions["sampler"], precisions[name], strict=True)]


# --- figures -------------------------------------------------------------------------------------------------


def draw(values: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "align", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True}
    for name, panels in FIGURES.items():
        figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
        panels(values, *axes)
        # A fixed date and salt: the same values give the same file.
        figure.savefig(IMAGES / f"concept_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def draw_packing(values: dict[str, Any], left: Any, right: Any) -> None:
    lengths, passes = values["packing"]["lengths"], values["packing"]["passes"]
    widths = [max(lengths[row - row % ROWS : row - row % ROWS + ROWS]) for row in range(len(lengths))]
    left.barh(range(len(lengths)), widths, color=GREY, height=1, label="padding", edgecolor="white", linewidth=0.4)
    left.barh(range(len(lengths)), lengths, color=BLUE, height=1, label="tokens", edgecolor="white", linewidth=0.4)
    left.set(title=f"Padded: micro-batches of {ROWS} rows", xlabel="tokens", ylabel="row")
    left.invert_yaxis()
    left.legend(loc="center", bbox_to_anchor=(0.72, 0.43))  # beside the shorter micro-batch
    for number, members in enumerate(passes):
        start = 0
        for length in members:
            right.barh(number, length, left=start, color=BLUE, edgecolor="white", linewidth=0.6, height=0.7)
            start += length
    right.axvline(ROWS * MAX_LENGTH, color=ORANGE, linewidth=1)
    right.set(title="Packed: forward passes", xlabel=f"tokens (line: at most {ROWS * MAX_LENGTH:,})", ylabel="pass")
    right.set_yticks(range(len(passes)))
    right.invert_yaxis()


def draw_router(values: dict[str, Any], left: Any, right: Any) -> None:
    for (name, curve), color in zip(values["router"].items(), (ORANGE, BLUE)):
        steps = range(1, len(curve["expert_load_max"]) + 1)
        left.plot(steps, curve["expert_load_max"], color=color, linewidth=1.2, label=f"router_aux_loss_coef {name}")
        right.plot(steps, curve["router_entropy"], color=color, linewidth=1.2)
    left.axhline(1, color=GREY, linewidth=1)
    left.set(title="expert_load_max", xlabel="step", ylabel="busiest expert / uniform")
    left.legend()
    right.axhline(math.log(8), color=GREY, linewidth=1)
    right.set(title="router_entropy (grey: log 8)", xlabel="step", ylabel="nats")


def draw_replay(values: dict[str, Any], left: Any, right: Any) -> None:
    precisions = values["precisions"]
    for name, color, label in (("trainer", ORANGE, "trainer's own routing"), ("replayed", BLUE, "sampler's experts")):
        ordered = sorted(differences(precisions, name), reverse=True)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        left.plot([max(x, 1e-5) for x in ordered], shares, color=color, linewidth=1.4, label=label)
    left.set(xscale="log", yscale="log", title="Tokens with a larger difference", xlabel="|difference of log p|, nats")
    left.set_ylabel("share of tokens")
    left.legend()
    groups: list[list[float]] = [[], []]
    for difference, rerouted in zip(differences(precisions, "trainer"), precisions["rerouted"], strict=True):
        groups[rerouted].append(max(difference, 1e-5))
    right.boxplot(groups, widths=0.5, flierprops={"markersize": 2}, medianprops={"color": ORANGE})
    right.set_xticks([1, 2], ["same experts", "another expert\nin a layer"])
    right.set(yscale="log", title="Own routing, by experts", ylabel="|difference of log p|, nats")


def draw_mismatch(values: dict[str, Any], left: Any, right: Any) -> None:
    sampler, trainer = values["precisions"]["sampler"], values["precisions"]["trainer"]
    gaps = [b - a for a, b in zip(sampler, trainer, strict=True)]
    left.axhline(0, color=GREY, linewidth=1)
    left.plot(sampler[::4], gaps[::4], ".", color=BLUE, markersize=2, alpha=0.6)
    left.set(title="Every fourth token", xlabel="log p, sampler (bf16)", ylabel="log p, trainer - sampler")
    ratios = sorted(math.exp(b - a) for a, b in zip(sampler, trainer, strict=True))
    right.plot(ratios, [(rank + 1) / len(ratios) for rank in range(len(ratios))], color=BLUE, linewidth=1.4)
    right.set(title="Importance ratio, trainer / sampler", xlabel="ratio", ylabel="share of tokens below")
    right.axvline(1, color=GREY, linewidth=1)


def draw_kl(values: dict[str, Any], left: Any, right: Any) -> None:
    found = values["kl"]
    for name, color in (("k1", ORANGE), ("k2", GREEN), ("k3", BLUE)):
        left.plot(found["log_ratio"], found["values"][name], color=color, label=name)
        means, spreads = zip(*found[name], strict=True)
        right.plot(found["kl"], [mean / kl for mean, kl in zip(means, found["kl"], strict=True)], color=color)
        right.plot(
            found["kl"], [spread / kl for spread, kl in zip(spreads, found["kl"], strict=True)], ":", color=color
        )
    left.set(title="Value at one token", xlabel="log(policy / reference)", ylabel="nats")
    left.legend()
    right.set(title="Mean (line) and deviation (dots) / KL", xlabel="KL, nats", yscale="log")


def draw_critic(values: dict[str, Any], left: Any, right: Any) -> None:
    for (name, weights), color in zip(values["gae"].items(), (ORANGE, BLUE, GREEN, GREY)):
        left.plot(range(len(weights)), weights, color=color, label=f"lam {name}")
    left.set(title="Weight of a later TD error", xlabel="tokens later", ylabel="weight", ylim=(0, 1.05))
    left.legend(loc="center right", bbox_to_anchor=(1, 0.38))
    curve = json.loads((ROOT / "benchmarks/results/curves/sums_ppo.json").read_text(encoding="utf-8"))
    explained = curve["curves"]["explained_variance"]
    right.plot(curve["steps"], explained, ".", color=BLUE, markersize=3)
    right.axhline(0, color=GREY, linewidth=1)
    right.set(title="explained_variance, PPO on sums", xlabel="iteration")


FIGURES = {
    "packing": draw_packing,
    "router": draw_router,
    "replay": draw_replay,
    "mismatch": draw_mismatch,
    "kl": draw_kl,
    "critic": draw_critic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(COMPUTED), default=list(COMPUTED), help="values to compute")
    if names := parser.parse_args().only:
        RESULTS.write_text(json.dumps(compute(names)) + "\n", encoding="utf-8")
    values = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(values)
    for name, value in numbers(values).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
