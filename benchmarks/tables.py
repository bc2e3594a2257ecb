"""Write the tables of the guides from benchmarks/results/*.json; no figure in them is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GUIDES = (
    "adapters.md",
    "data.md",
    "evaluation.md",
    "families.md",
    "model.md",
    "parallel.md",
    "ppo.md",
    "rewards.md",
    "rollouts.md",
    "runs.md",
    "serving.md",
    "training.md",
)
PAGES = [ROOT / "docs" / name for name in GUIDES]
RESULTS = ROOT / "benchmarks" / "results"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parity(results: dict[str, Any]) -> str:
    keys = ["logits", "log-probabilities", "greedy tokens", "tensors not found"]
    rows = []
    for case, found in results.items():
        for name, measured in found.items():
            cells = [_measure(measured.get(key)) for key in keys]
            if "fails" in measured:
                cells = [f"does not run: {measured['fails']}".replace("|", "/"), "", "", ""]
            rows.append([case, name, *cells])
    return table(
        ["model", "implementation", "largest logit difference", "log-probability", "greedy tokens", "missing"], rows
    )


def _measure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


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
    return _measure(value).replace("|", "/")


def families_chain(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results["families"].items():
        cells = [found["fails"], ""] if "fails" in found else [_measure(found[stage]) for stage in ("ppo", "grpo")]
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


def trainers(results: dict[str, Any]) -> str:
    rows, curves = [], []
    for case, found in results.items():
        if not isinstance(found, dict) or "tokens_per_second" not in found:
            continue
        wall, processor = found["align / TRL"], found["align / TRL, CPU"]
        for side, speed in found["tokens_per_second"].items():
            ratios = f"{wall[side]:.2f} ({processor[side]:.2f})" if side in wall else f"target {found['target']:.1f}"
            name = case if side == "align" else ""
            rows.append([name, side, f"{speed:,}", ratios, f"{found['peak_mib'][side]:,} MiB"])
        difference, noise = found["largest loss difference"], found["noise between seeds"]
        curves.append([case, str(len(found["losses"]["align"])), f"{difference:.1e}", f"{noise:.1e}"])
    speeds = table(["model, trainer, rows", "", "tokens/s", "align / TRL (by CPU time)", "peak memory"], rows)
    losses = ["losses of align and TRL, padded", "steps", "largest difference", "between two seeds of align"]
    return speeds + "\n\n" + table(losses, curves)


def ppo_vs_trl(results: dict[str, Any]) -> str:
    cases = {name: found for name, found in results.items() if "target" in found}
    speeds, times = [], []
    for name, found in cases.items():
        pairs = ", ".join(f"{pair:.2f}" for pair in found["align / TRL, each pair of runs"])
        ratio = f"{found['align / TRL, episodes/s']:.2f} (pairs of runs: {pairs}; target {found['target']})"
        trials = found.get("TRL by experts_implementation, episodes/s")
        trl = f"TRL 1.12, {max(trials, key=trials.__getitem__)}" if trials else "TRL 1.12"
        for side, label in (("align", "align"), ("trl", trl)):
            measured = found[side]
            cells = [f"{measured['episodes_per_second']:.2f}", ratio if side == "align" else ""]
            speeds.append([name, label, *cells, f"{measured['peak_mib']:,} MiB"])
            seconds = measured["seconds_of_a_round"]
            times.append([name, label, *(f"{seconds[phase]:.2f}" if phase in seconds else "–" for phase in PHASES)])
    tables = [
        table(["", "", "episodes/s", "align / TRL", "peak memory"], speeds),
        table(["seconds per round", "", *PHASES], times),
    ]
    return "\n\n".join(tables)


def ppo_curves_vs_trl(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        if isinstance(found, dict) and "score of each quarter of the rounds" in found:
            runs = f"{name}, {found['rounds']} rounds at {found['learning_rate']}, seeds: {found['seeds']}"
            for side, scores in found["score of each quarter of the rounds"].items():
                rows.append([runs, SIDES[side], *(f"{score:.3f}" for score in scores)])
    return table(["mean score", "", "first quarter of the rounds", "second", "third", "last"], rows)


def rollout(results: dict[str, Any]) -> str:
    tables = []
    for model, found in results.items():
        if not isinstance(found, dict):
            continue
        speeds = [
            [case, *(f"{value:,.0f}" for value in measured["tokens_per_second"].values()), f"{measured[RATIO]:.1f}"]
            for case, measured in found["speed"].items()
        ]
        sync, times = found["sync"], found["sync"]["milliseconds"]
        updates = [[name, f"{times[name]:.0f} ms", f"{ratio:.1f}"] for name, ratio in sync["times_the_copy"].items()]
        size = f"{found['parameters'] / 1e6:.1f}M parameters"
        moved = f"{sync['mib']:.0f} MiB in {sync['tensors']} tensors; copied in {times['copy']:.0f} ms"
        tables += [
            table([f"{model}, {size}", "vLLM, tokens/s", "generate, tokens/s", "ratio"], speeds),
            table([moved, "time", "ratio to the copy"], updates),
        ]
    return "\n\n".join(tables)


def parallel_equality(results: dict[str, Any]) -> str:
    layouts = results["layouts"]
    one = next(iter(layouts.values()))
    stages = [stage for stage in one if stage not in ("ppo", "seconds")]
    plain = [stage for stage in stages if not stage.startswith("sft_")]
    trained, written = [], []
    for name, found in layouts.items():
        layout = name.replace("ZeRO 3", "ZeRO-3").replace("experts over", "expert parallel")
        pairs = (" / ".join(f"{found[stage][key]:.1e}" for key in ("loss", "grad_norm")) for stage in plain)
        trained.append([layout, *pairs, f"{found['ppo']['metric']:.1e}"])
        apart = (f"{found[stage]['weight']:.0e} ({found[stage]['weights above 1e-6']:,})" for stage in stages)
        written.append([layout, *apart])
    names = {"reward_model": "reward model", "sft_eps_1e_5": "sft, eps 1e-5", "sft_rate_1e_5": "sft, rate 1e-5"}
    losses = [f"{results['steps']} steps: loss / gradient norm", *(names.get(stage, stage) for stage in plain)]
    weights = [
        f"largest difference of a weight (number of {one['sft']['weights']:,} that differ by more than 1e-6)",
        *(names.get(stage, stage) for stage in stages),
    ]
    return table([*losses, "PPO's first update"], trained) + "\n\n" + table(weights, written)


def real_runs(results: dict[str, Any]) -> str:
    rows = []
    for found in results.values():
        metrics = found["first and last tenth"].items()
        curves = ", ".join(f"{name} {first:.3g} → {last:.3g}" for name, (first, last) in metrics)
        cells = [found["recipe"], found["stage"], str(found["steps"]), f"{found['minutes']:.0f}", found["processor"]]
        rows.append([*cells, curves])
    curves = "mean over the first tenth of the steps → over the last"
    return table(["recipe", "stage", "steps", "minutes", "processor", curves], rows)


def expert_parallel(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        ratio = found["spread_over_gathered"]
        for variant in ("gathered", "spread"):
            of = found[variant]
            cells = [
                (f"{of['seconds']:.2f}", ratio["seconds"]),
                (f"{of['megabytes_sent_a_rank_and_step']:.1f}", ratio["bytes"]),
                (f"{of['peak_megabytes_a_rank']:.0f}", ratio["peak"]),
            ]
            parallel = variant == "spread"
            label = "expert parallel" if parallel else variant
            rows.append([name, label, *(f"{cell} ({r:.2g})" if parallel else cell for cell, r in cells)])
    return table(
        ["", "experts (ratio to gathered)", "seconds per step", "MB sent per rank and step", "peak MB per rank"], rows
    )


def bf16_head(results: dict[str, Any]) -> str:
    table_of = results["relative_error"]
    ways = list(next(iter(table_of.values())))
    rows = [
        [p, *(f"{found[way][of]:.2%}" for of in ("hidden", "weight") for way in ways)] for p, found in table_of.items()
    ]
    header = [f"{way}, d {of}" for of in ("hidden", "weight") for way in ways]
    return table(["p(token)", *header], rows)


def bf16_curves(results: dict[str, Any]) -> str:
    means, runs = results["mean_score_per_iteration"], results["runs"]
    steps = len(next(iter(means.values())))
    rows = []
    for dtype, found in runs.items():
        rows.append([dtype, *(f"{mean:.2f}" for mean in means[dtype])])
        rows += [[f"seed {seed}", *(f"{score:.2f}" for score in run["score_mean"])] for seed, run in found.items()]
    return table(["mean score of iteration", *map(str, range(1, steps + 1))], rows)


def filters(results: dict[str, Any]) -> str:
    titles = {"contamination": "filter `contamination`", "duplicates": "filter `duplicates`, `near: 0.5`"}
    tables = []
    for kind, title in titles.items():
        found = results[kind]
        shares = next(iter(found["methods"].values()))["recall"]
        planted = found.get("planted") or found["copies"]
        rows = [
            [
                title if name == "align" else name,
                *(f"{recall:.0%}" for recall in measured["recall"].values()),
                str(measured["flagged"]),
                f"{measured['cpu_seconds']:.1f} s",
            ]
            for name, measured in found["methods"].items()
        ]
        header = [
            f"{results['texts']}, {planted} rows planted",
            *(f"found, {share} of words changed" for share in shares),
        ]
        tables.append(table([*header, f"flagged of {found['clean']:,} clean rows", "CPU time"], rows))
    return "\n\n".join(tables)


def starts(results: dict[str, Any]) -> str:
    ranks = results["ranks"]
    named = {
        "align, first start": results["first_start"],
        "align, second start": results["second_start"],
        f"align, second start of {len(ranks)} ranks at once": {
            name: max(rank[name] for rank in ranks) for name in ("seconds", "cpu_seconds", "anonymous_mb")
        },
        "TRL": results["trl"],
    }
    rows = [
        [name, f"{found['seconds']:.1f} s", f"{found['cpu_seconds']:.1f} s", f"{found['anonymous_mb']:.0f} MB"]
        for name, found in named.items()
    ]
    header = [
        f"{results['rows']:,} conversations, {results['file_mb']:,} MB",
        "time",
        "CPU time",
        "memory of a process",
    ]
    wall, cpu = results["first_start_speedup"], results["first_start_speedup_in_cpu_seconds"]
    return (
        table(header, rows) + f"\n\nTRL takes {wall:.2f} times as long as the first start, {cpu:.2f} times in CPU time."
    )


def serve(results: dict[str, Any]) -> str:
    load = results["load"]
    asked = (
        f"{load['clients']} clients for {load['seconds']:.0f} s: {load['requests']} requests, {load['swaps']} swaps, "
        f"**{load['wrong']} wrong answers**; latency {1000 * load['latency_p50']:.0f} ms (median), "
        f"{1000 * load['latency_p95']:.0f} ms (95th percentile); a swap takes {1000 * load['swap_p50']:.0f} ms."
    )
    models = {"hidden size 256": results}
    models |= {f"{name}, hidden size 1024": found for name, found in results.get("larger", {}).items()}
    rows = []
    for model, found in models.items():
        cpu, cpu_ratios = found["cpu_ms_per_token"], found["cpu_against_merged"]
        for number, (case, rate) in enumerate(found["tokens_per_second"].items()):
            ratio = found["against_merged"][case]
            cells = [f"{rate:.0f}", f"{ratio:.2f}", f"{cpu[case]:.2f} ms", f"{cpu_ratios[case]:.2f}"]
            rows.append(["" if number else model, case, *cells])
    ratios = ["against the merged model", "CPU time per token", "tokens per CPU second, ratio"]
    return f"{asked}\n\n{table(['model', 'requests', 'tokens/s', *ratios], rows)}"


def accuracies(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        size = f"{found['documents']} documents × {found['samples']}"
        first = next(iter(found["models"]))
        for number, (model, measured) in enumerate(found["models"].items()):
            cells = [f"{name}: `{found['task']}`, {size}" if number == 0 else "", model, _interval(measured), "", ""]
            if number:
                cells[3:] = _difference(found["differences"][f"{model} - {first}"])
            rows.append(cells)
        for pair, difference in found["differences"].items():
            if not pair.endswith(f" - {first}"):
                rows.append(["", pair, "", *_difference(difference)])
    return table(["task", "model", "accuracy", "difference from the first", "p"], rows)


def _difference(found: dict[str, Any]) -> list[str]:
    return [_interval(found, sign="+"), f"{found['p_value']:.2g}"]


def _interval(found: dict[str, Any], sign: str = "") -> str:
    if found["low"] is None:
        return f"{found['mean']:{sign}.3f}"
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def evaluation(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        cells = [f"`{name}`: {found['kind']}", f"{found['ours']['cpu_s']:.1f} s"]
        for side in ("hflm_8", "hflm_64"):
            cells.append(f"{found[side]['cpu_s']:.1f} s ({found[side]['ratio']:.2f})")
        apart = [found[side].get("relative_difference") for side in ("hflm_8", "hflm_64")]
        same = [
            f"{found[side]['same_verdicts']} of {found[side]['verdicts']}"
            for side in ("hflm_8", "hflm_64")
            if "verdicts" in found[side]
        ]
        agreed = ", ".join(dict.fromkeys(same)) if same else f"perplexity within {max(apart):.0e}"
        rows.append([*cells, f"{found['target']:g}", agreed])
    head = f"{results['documents']} documents, {results['model']}"
    return table([head, "align", "HFLM, batches of 8 (ratio)", "of 64 (ratio)", "target", "same verdict"], rows)


def reward_models_vs_trl(results: dict[str, Any]) -> str:
    trained, scored = [], []
    for model, found in results.items():
        pairs = " + ".join(f"{n} {name}" for name, n in found["trained pairs"].items())
        test = found["agreement"]["test"]["p_value"]
        for side, measured in found["accuracy"].items():
            subsets = [f"{_interval(of)} (n {of['n']})" for key, of in measured.items() if key != "length bias"]
            label = f"{model}: {pairs}, {found['steps']} steps" if side == "align" else f"same accuracy: p = {test:.2g}"
            trained.append([label, side, *subsets, f"{found['training, CPU seconds'][side]:.0f} s"])
        speeds = found["scoring"]
        for side, speed in speeds["pairs per CPU second"].items():
            ratio = speeds["align / TRL"].get(side)
            accuracy = speeds["accuracy with align's weights"][side]
            label = f"{model}: {speeds['pairs']} pairs" if side == "align" else ""
            scored.append([label, side, f"{speed:.1f}", "" if ratio is None else f"{ratio:.2f}", f"{accuracy:.3f}"])
    names = list(next(iter(results.values()))["trained pairs"])
    first = table(["trained on", "", "accuracy, held-out pairs", *names, "CPU time of training"], trained)
    header = ["scored", "", "pairs per CPU second", "align / TRL (target 1.5)", "accuracy with align's weights"]
    return first + "\n\n" + table(header, scored)


def reference_solutions(results: dict[str, Any]) -> str:
    solutions = results["solutions"]
    passed = f"HumanEval's reference solutions: {solutions['passed']} of {solutions['programs']} pass"
    measured = {passed: solutions, **{f"empty program, {name}": of for name, of in results["empty program"].items()}}
    rows = [[name, f"{of['milliseconds']['cpu']:.0f} ms"] for name, of in measured.items()]
    return table([f"walls: {solutions['walls']}", "processor time of one program"], rows)


def over_optimisation(results: dict[str, Any]) -> str:
    points, rows = results["ppo"], []
    tenth = max(1, len(points) // 10)
    for start in range(0, len(points), tenth):
        part = points[start : start + tenth]
        means = [f"{sum(point[name] for point in part) / len(part):.2f}" for name in ("kl", "proxy", "gold")]
        rows.append([f"PPO, steps {part[0]['step']} to {part[-1]['step']}", *means])
    for point in results["best of n"]:
        cells = [f"{of['mean']:.2f} [{of['low']:.2f}, {of['high']:.2f}]" for of in (point["proxy"], point["gold"])]
        rows.append([f"best of {point['n']}", f"{point['kl']:.2f}", *cells])
    return table([f"proxy trained on {results['pairs']:.0f} pairs", "KL, nats", "proxy", "gold"], rows)


RATIO = "engine_over_generate"
SIDES = {"align": "align", "trl": "TRL 1.12"}
PHASES = ["generate", "score", "logprobs", "update", "sync", "other"]


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


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "parity": parity,
    "moe_block": moe_block,
    "families": families,
    "families_chain": families_chain,
    "launches": launches,
    "loss_head": loss_head,
    "decoding": decoding,
    "loading": loading,
    "tokenizer": tokenizer,
    "trainers": trainers,
    "parallel_equality": parallel_equality,
    "ppo_vs_trl": ppo_vs_trl,
    "ppo_vs_trl_dense": ppo_vs_trl,
    "ppo_curves_vs_trl": ppo_curves_vs_trl,
    "rollout": rollout,
    "serve": serve,
    "expert_parallel": expert_parallel,
    "real_runs": real_runs,
    "filters": filters,
    "accuracies": accuracies,
    "over_optimisation": over_optimisation,
    "reference_solutions": reference_solutions,
    "eval": evaluation,
    "reward_models_vs_trl": reward_models_vs_trl,
    "data": starts,
    "share_trunk": share_trunk,
    "lora": lora,
    "bf16_head": bf16_head,
    "bf16_curves": bf16_curves,
}


def fill(page: str) -> str:
    """The page with every `<!-- table NAME -->` section rendered from NAME.json."""

    def section(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.json"
        if not path.exists():
            return f"<!-- table {match[1]} -->\nNot measured yet.\n<!-- end -->"
        facts = json.loads(path.read_text(encoding="utf-8"))
        hardware = facts["hardware"]
        where = hardware["accelerator"] or f"{hardware['cores']} cores of {hardware['cpu']}"
        source = f"`{facts['command']}`, {facts['date'][:10]}, {where}, torch {facts['packages']['torch']}."
        return f"<!-- table {match[1]} -->\n{RENDER[match[1]](facts['results'])}\n\n{source}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", section, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
