"""Tables of data, training, rollouts and serving, from the results of the benchmarks."""

from __future__ import annotations

from typing import Any

from markdown_table import table


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


def data_preparation(results: dict[str, Any]) -> str:
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


SIDES = {"align": "align", "trl": "TRL 1.12"}
PHASES = ["generate", "score", "logprobs", "update", "sync", "other"]


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
        table(["seconds per iteration", "", *PHASES], times),
    ]
    return "\n\n".join(tables)


def ppo_curves_vs_trl(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        if isinstance(found, dict) and "score of each quarter of the rounds" in found:
            runs = f"{name}, {found['rounds']} iterations at {found['learning_rate']}, seeds: {found['seeds']}"
            for side, scores in found["score of each quarter of the rounds"].items():
                rows.append([runs, SIDES[side], *(f"{score:.3f}" for score in scores)])
    return table(["mean score", "", "first quarter of the iterations", "second", "third", "last"], rows)


def bf16_curves(results: dict[str, Any]) -> str:
    means, runs = results["mean_score_per_iteration"], results["runs"]
    steps = len(next(iter(means.values())))
    rows = []
    for dtype, found in runs.items():
        rows.append([dtype, *(f"{mean:.2f}" for mean in means[dtype])])
        rows += [[f"seed {seed}", *(f"{score:.2f}" for score in run["score_mean"])] for seed, run in found.items()]
    return table(["mean score of iteration", *map(str, range(1, steps + 1))], rows)


RATIO = "engine_over_generate"


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


def serve(results: dict[str, Any]) -> str:
    load = results["load"]
    load_line = (
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
    return f"{load_line}\n\n{table(['model', 'requests', 'tokens/s', *ratios], rows)}"


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


def real_runs(results: dict[str, Any]) -> str:
    rows = []
    for found in results.values():
        metrics = found["first and last tenth"].items()
        curves = ", ".join(f"{name} {first:.3g} → {last:.3g}" for name, (first, last) in metrics)
        cells = [found["recipe"], found["stage"], str(found["steps"]), f"{found['minutes']:.0f}", found["processor"]]
        rows.append([*cells, curves])
    curves = "mean over the first tenth of the steps → over the last"
    return table(["recipe", "stage", "steps", "minutes", "processor", curves], rows)


def watch(results: dict[str, Any]) -> str:
    low, high = results["extra_cpu_share_95"]
    return (
        f"`align watch` took {100 * results['watcher_share']:.2f} % of one core while it showed a run of "
        f"{results['steps']} steps of the stage `pretrain` of `tiny`. The run's own CPU time differed from that of a "
        f"run without it by {100 * results['extra_cpu_share']:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}] "
        f"({len(results['pairs'])} pairs of runs)."
    )
