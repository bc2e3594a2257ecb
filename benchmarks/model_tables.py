"""Tables of models, memory and kernels, from the results of the benchmarks."""

from __future__ import annotations

import statistics
from typing import Any

from markdown_table import measure, table


def parity(results: dict[str, Any]) -> str:
    keys = ["logits", "log-probabilities", "greedy tokens", "tensors not found"]
    rows = []
    for case, found in results.items():
        for name, measured in found.items():
            cells = [measure(measured.get(key)) for key in keys]
            if "fails" in measured:
                cells = [f"does not run: {measured['fails']}".replace("|", "/"), "", "", ""]
            rows.append([case, name, *cells])
    return table(
        ["model", "implementation", "largest logit difference", "log-probability", "greedy tokens", "missing"], rows
    )


FAMILY_COLUMNS = {
    "forward": "log-probabilities",
    "gradients": "gradients",
    "bfloat16": "bf16",
    "packing": "packing",
    "scorer": "reward model",
    "balance": "balance loss",
    "replay": "replay",
    "lora": "LoRA",
    "sharded": "two ranks",
    "sharded lora": "two ranks, LoRA",
    "export": "export",
    "fresh": "vLLM",
    "updated": "vLLM after three updates",
    "server fresh": "vLLM server",
    "server updated": "vLLM server after three updates",
    "plan": "plan",
}
"""{result of bench_families.py: header of its column}."""
MEASURED_ALONE = ("server fresh", "server updated")
"""Columns of `bench_families.py --server`."""


def families(results: dict[str, Any]) -> str:
    rows = []
    for model_type, found in results["families"].items():
        missing = [name for name in FAMILY_COLUMNS if name not in found and name not in MEASURED_ALONE]
        assert not missing, f"{model_type}: no result for {missing}; run `python benchmarks/bench_families.py`"
        cells = [_family_cell(name, found.get(name, "not measured")) for name in FAMILY_COLUMNS]
        rows.append([f"`{model_type}`", *cells])
    return table(["family", *FAMILY_COLUMNS.values()], rows) + f"\n\n{_commits(results)}"


def _commits(results: dict[str, Any]) -> str:
    """The commits at which the families, and columns that were measured alone, were measured."""
    found = results["families"]
    lines = _by_commit({name: row["commit"] for name, row in found.items()}, "")
    servers = {name: row["server commit"] for name, row in found.items() if "server commit" in row}
    return "\n".join(lines + _by_commit(servers, ", columns of vLLM servers"))


def _by_commit(commits: dict[str, str], what: str) -> list[str]:
    rows: dict[str, list[str]] = {}
    for name, commit in commits.items():
        rows.setdefault(commit[:12], []).append(f"`{name}`")
    if len(rows) == 1:
        return [f"All rows{what}: commit {next(iter(rows))}."]
    return [f"Commit {commit}{what}: {', '.join(names)}." for commit, names in rows.items()]


def _family_cell(name: str, value: Any) -> str:
    if value is None:
        return "no experts"
    if isinstance(value, float) and name in ("plan", "bfloat16"):
        return f"{value:.1%}" if name == "plan" else f"{value:.2f}"
    return measure(value).replace("|", "/")


def families_chain(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results["families"].items():
        cells = [found["fails"], ""] if "fails" in found else [measure(found[stage]) for stage in ("ppo", "grpo")]
        rows.append([f"`{name}`", *cells, str(found["seconds"])])
    return table(["family", "PPO", "GRPO", "seconds"], rows) + f"\n\n{_commits(results)}"


def launches(results: dict[str, Any]) -> str:
    def cell(dtype: str, name: str, kind: str) -> str:
        counts = (results[when][dtype].get(name, {}).get(kind) for when in ("before", "now"))
        return " → ".join(_by_layer(count) for count in counts)

    rows = []
    for name, counted in results["now"]["bfloat16"].items():
        mixes = {_by_layer(results["now"][dtype][name]["mixes"]) for dtype in ("bfloat16", "float32")}
        cells = [cell("bfloat16", name, kind) for kind in ("syncs", "blocking_uploads", "launches") if kind in counted]
        rows.append([name, ", ".join(sorted(mixes)), *cells, cell("float32", name, "syncs")])
    header = ["pass, L layers", "mixes", "host syncs", "uploads that wait", "launches", "host syncs in fp32"]
    return table(header, rows)


def _by_layer(count: dict[str, float] | None) -> str:
    if count is None:
        return "–"
    fixed, per_layer = count["fixed"], count["per layer"]
    if not per_layer:
        return f"{fixed:g}"
    return f"{fixed:g} + L" if per_layer == 1 else f"{fixed:g} + {per_layer:g} L"


def moe_block(results: dict[str, Any]) -> str:
    rows = []
    for shape, found in results.items():
        times = ", ".join(f"{name} {value:.0f}" for name, value in found.get("milliseconds", {}).items())
        ratios = ", ".join(f"{name}: {value:.2f}" for name, value in found.items() if isinstance(value, float))
        rows.append([shape, times, ratios])
    return table(["2048 tokens, hidden 512", "milliseconds, forward + backward", "ratios"], rows)


def loss_head(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        if name == "shape":
            continue
        seconds, size = found["seconds"], found["peak_extra_bytes"]
        rows.append(
            [
                name,
                f"{seconds['plain']:.2f} / {seconds['chunked']:.2f} s ({found['time_ratio']:.2f})",
                f"{size['plain'] / 2**20:,.0f} / {size['chunked'] / 2**20:,.0f} MiB ({found['memory_ratio']:.1%})",
                f"{found['relative_difference']:.0e}",
            ]
        )
    return table(["", "plain / chunked", "extra memory, plain / chunked", "relative difference"], rows)


def decoding(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{results['tokens_per_second'][name]:,.0f}",
            f"{size:,}",
            f"{results['cache_bytes_by_formula'][name]:,}",
        ]
        for name, size in results["cache_bytes"].items()
    ]
    return table(["key/value caches", "tokens/s", "bytes", "bytes by the formula"], rows)


def loading(results: dict[str, Any]) -> str:
    return table(
        ["model", "peak memory", "time", "time to read the files"],
        [
            [
                f"{results['bytes_of_the_model'] / 2**20:,.0f} MiB",
                f"{results['peak_bytes'] / 2**20:,.0f} MiB ({results['memory_ratio']:.2f})",
                f"{results['seconds']['load']:.2f} s ({results['time_ratio']:.2f})",
                f"{results['seconds']['read']:.2f} s",
            ]
        ],
    )


def tokenizer(results: dict[str, Any]) -> str:
    rows = []
    for label, found in results.items():
        if isinstance(found, dict):
            speeds = found["megabytes_per_second"]
            rows.append([f"{label}, {results['megabytes']} MB", f"{speeds['align']:.2f}", f"{speeds['tiktoken']:.2f}"])
    return table(["one thread", "align, MB/s", "tiktoken, MB/s"], rows)


def bf16_head(results: dict[str, Any]) -> str:
    table_of = results["relative_error"]
    ways = list(next(iter(table_of.values())))
    rows = [
        [p, *(f"{found[way][of]:.2%}" for of in ("hidden", "weight") for way in ways)] for p, found in table_of.items()
    ]
    header = [f"{way}, d {of}" for of in ("hidden", "weight") for way in ways]
    return table(["p(token)", *header], rows)


def share_trunk(results: dict[str, Any]) -> str:
    names = {
        "policy alone": "policy and reference alone",
        "shared": "all four, shared",
        "separate": "all four, separate",
    }
    rows = [
        [name, f"{found['peak_mb']:,.0f} MB", f"{found['cpu_seconds']:.2f} s"]
        for way, name in names.items()
        for found in [results["ways"][way]]
    ]
    return table(["models", "peak memory", "CPU time"], rows) + (
        f"\n\n{results['parameters'] / 1e6:.0f} million parameters. Shared, the four models take "
        f"{results['peak_over_policy_alone']:.2f} times the memory of the policy alone (separate: "
        f"{results['separate_over_policy_alone']:.2f} times), and {results['cpu_seconds_over_separate']:.2f} times the "
        "CPU time of separate models."
    )


def lora(results: dict[str, Any]) -> str:
    ranks = {key: found for key, found in results.items() if key.startswith("rank ")}
    rows = [
        [way, *(cell for found in ranks.values() for cell in _lora_cells(found[way]))]
        for way in next(iter(ranks.values()))
    ]
    heads = [head for rank in ranks for head in (f"{rank}: CPU time", "of attention alone", "peak memory")]
    merge, stored = results["merge"], results["stored"]
    sizes = [[name, f"{found['MB']:,.0f} MB", f"{found['CPU seconds']:.1f} s"] for name, found in stored.items()]
    return "\n\n".join(
        [
            table(["adapters on", *heads], rows),
            table([f"result of a stage, base of {merge['base GB']:.1f} GB", "on disk", "CPU time of loading"], sizes),
            f"A merge of {merge['base GB']:.1f} GB needs {merge['above MB']:,.0f} MB beyond the imports and "
            f"{merge['CPU seconds']:.0f} s of CPU time.",
        ]
    )


def _lora_cells(found: dict[str, float]) -> list[str]:
    return [f"{found['seconds']:.2f} s", f"{found['to attention']:.2f}", f"{found['peak MB']:,.0f} MB"]


def qlora_accuracy(results: dict[str, Any]) -> str:
    """Losses by model; of several seeds the mean and the standard deviation."""
    rows = []
    for name, seeds in results.items():
        runs = list(seeds.values())
        cells = [_mean_and_deviation([run[key] for run in runs]) for key in QLORA_COLUMNS]
        share = f"{100 * runs[0]['share of weights in 4 bits']:.0f} %"
        rows.append([name, str(len(runs)), share, *cells])
    return table(["model", "seeds", "weights in 4 bits", *QLORA_COLUMNS.values()], rows)


QLORA_COLUMNS = {
    "base": "base",
    "base in 4 bits": "base in 4 bits",
    "adapter": "LoRA",
    "adapter on 4 bits": "QLoRA, as trained",
    "adapter from 4 bits on the base": "QLoRA, on the base",
}
"""Keys of a result of `qlora_accuracy.py`, and the headers of its table."""


def _mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
