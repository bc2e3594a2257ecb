"""Tables of evaluations, reward models and verifiers, from the results of the benchmarks."""

from __future__ import annotations

from typing import Any

from markdown_table import interval, table


def accuracies(results: dict[str, Any]) -> str:
    rows = []
    for name, found in results.items():
        size = f"{found['documents']} documents × {found['samples']}"
        first = next(iter(found["models"]))
        for number, (model, measured) in enumerate(found["models"].items()):
            cells = [f"{name}: `{found['task']}`, {size}" if number == 0 else "", model, interval(measured), "", ""]
            if number:
                cells[3:] = _difference(found["differences"][f"{model} - {first}"])
            rows.append(cells)
        for pair, difference in found["differences"].items():
            if not pair.endswith(f" - {first}"):
                rows.append(["", pair, "", *_difference(difference)])
    return table(["task", "model", "accuracy", "difference from the first", "p"], rows)


def _difference(found: dict[str, Any]) -> list[str]:
    return [interval(found, sign="+"), f"{found['p_value']:.2g}"]


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
            subsets = [f"{interval(of)} (n {of['n']})" for key, of in measured.items() if key != "length bias"]
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
    empty = {name.replace("walls", "sandbox"): of for name, of in results["empty program"].items()}
    measured = {passed: solutions, **{f"empty program, {name}": of for name, of in empty.items()}}
    rows = [[name, f"{of['milliseconds']['cpu']:.0f} ms"] for name, of in measured.items()]
    return table([f"sandbox: {solutions['walls']}", "processor time of one program"], rows)


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
