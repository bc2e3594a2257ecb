"""Run recipes at a size for two cores, draw their learning curves, and compare the models before and after.

    python benchmarks/real_runs.py NAME [FILE ...] [--stages STAGE,...]

sums        GRPO and PPO from the same SFT checkpoint, on sums in GSM8K's form; 3M parameters, from random weights.
            Needs no file.
gsm8k       the recipe gsm8k_grpo with LoRA and small batches on short rows of TRAIN, evaluated on short rows of TEST,
            GSM8K's splits as JSON lines with question and answer; SmolLM2-135M converted to a mixture of experts.
tool_calls  full fine-tuning, adapters on attention alone, and adapters on attention and experts with equally many
            parameters, on tool calls of FILE, conversations in Glaive's form; other conversations are held out;
            SmolLM2-135M converted to a mixture of experts.
preference  the recipe preference_ppo on FILE and HELD_OUT, JSON lines with prompt, chosen and rejected; 3M parameters,
            from random weights.

The run folder is runs/NAME; an interrupted run is resumed. Afterwards the pictures of docs/runs.md are drawn, and the
results of the tasks are written to accuracies.json. --stages runs only these stages, one after another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from curves import RESULTS as CURVES
from harness import RESULTS, write
from tool_calls import split

from align.eval.pairing import compare_folders
from align.run.manifest import code_version

HERE = Path(__file__).resolve().parent


class Curves(NamedTuple):
    picture: str
    stage: str
    metrics: tuple[str, ...]


class Run(NamedTuple):
    recipe: str
    changes: tuple[str, ...]
    curves: tuple[Curves, ...]
    files: tuple[str, ...] = ()
    """Names of the recipe's input files, in the folder in which it runs."""
    task: str | None = None
    """The task of its evaluate stage."""
    given: int | None = None
    """Number of files on the command line, if it is not that of `files`."""


TINY = (
    "{{kind: scratch, preset: tiny, config: {{initializer_range: 0.05}}, tokenizer: {{vocab_size: 2048, "
    "data: [{{kind: file, path: {file}, columns: {{text: {column}}}}}]}}}}"
)
PAIRS = "{train: [{kind: file, path: pairs.jsonl}], held_out: [{kind: file, path: held_out.jsonl}], max_length: 192}"
LEARNT = ("score_mean", "kl", "entropy")

RUNS = {
    "sums": Run(
        str(HERE / "sums.yaml"),
        (),
        (Curves("sums_grpo", "grpo", LEARNT), Curves("sums_ppo", "ppo", (*LEARNT, "explained_variance"))),
        ("sums.jsonl",),
        "sums_task.yaml",
        given=0,
    ),
    "tool_calls": Run(
        str(HERE / "tool_calls.yaml"),
        (),
        (),
        ("calls.jsonl", "calls_test.jsonl"),
        "tool_calls_task.yaml",
        given=1,
    ),
    "gsm8k": Run(
        "gsm8k_grpo",
        (
            "stages.sft.data={train: [{kind: file, path: gsm8k.jsonl, limit: 480, "
            "columns: {prompt: question, completion: answer}}], max_length: 192}",
            "stages.sft.lora={rank: 8, train_router: true}",
            "stages.sft.optimizer={learning_rate: 5e-4}",
            "stages.sft.batch_size=16",
            "stages.sft.epochs=1",
            "stages.grpo.prompts=[{kind: file, path: gsm8k.jsonl, columns: {prompt: question}}]",
            "stages.grpo.max_prompt_length=96",
            "stages.grpo.lora={rank: 8, train_router: true}",
            "stages.grpo.optimizer.learning_rate=1e-4",
            "stages.grpo.rollout={max_new_tokens: 96, max_model_length: 192, max_sequences: 64, cache_gib: 0.5}",
            "stages.grpo.batch_size=32",
            "stages.grpo.mini_batch_size=32",
            "stages.grpo.micro_batch_tokens=2048",
            "stages.grpo.dynamic_sampling=0",
            "stages.grpo.steps=16",
            "stages.grpo.checkpoint_every=4",
            "stages.evaluate.models=[base, sft, grpo]",
            "stages.evaluate.tasks=[gsm8k_task.yaml]",
            "stages.evaluate.options={chat: true, limit: 128, max_length: 190}",
            "stages.evaluate.rollout={max_new_tokens: 96, max_model_length: 192, max_sequences: 64, cache_gib: 0.5}",
        ),
        (Curves("gsm8k_grpo", "grpo", ("reward/math", "reward/form", "completion_length")),),
        ("gsm8k.jsonl", "gsm8k_test.jsonl"),
        "gsm8k_task.yaml",
    ),
    "preference": Run(
        "preference_ppo",
        (
            "model=" + TINY.format(file="pairs.jsonl", column="chosen"),
            f"stages.reward_model.data={PAIRS}",
            "stages.reward_model.optimizer.learning_rate=5e-4",
            "stages.reward_model.batch_size=32",
            f"stages.dpo.data={PAIRS}",
            "stages.dpo.optimizer.learning_rate=2e-4",
            "stages.dpo.batch_size=32",
            "stages.ppo.prompts=[{kind: file, path: pairs.jsonl}]",
            "stages.ppo.max_prompt_length=96",
            "stages.ppo.rollout={max_new_tokens: 48, max_model_length: 160, max_sequences: 64, cache_gib: 0.25}",
            "stages.ppo.optimizer.learning_rate=2e-4",
            "stages.ppo.critic={learning_rate: 5e-4, warmup_steps: 5}",
            "stages.ppo.batch_size=64",
            "stages.ppo.mini_batch_size=32",
            "stages.ppo.micro_batch_tokens=4096",
            "stages.ppo.missing_eos_penalty=0",
            "stages.ppo.steps=60",
            "stages.evaluate.prompts=[{kind: file, path: held_out.jsonl, limit: 64}]",
            "stages.evaluate.preferences=[{kind: file, path: held_out.jsonl, limit: 128}]",
            "stages.evaluate.rollout={max_new_tokens: 48, max_model_length: 256, max_sequences: 64, cache_gib: 0.25}",
        ),
        (
            Curves("preference_reward_model", "reward_model", ("loss", "accuracy")),
            Curves("preference_ppo", "ppo", (*LEARNT, "explained_variance")),
        ),
        ("pairs.jsonl", "held_out.jsonl"),
    ),
}


HELD_OUT_CALLS = 64


def sums() -> str:
    """All sums of two numbers from 1 to 12, in GSM8K's form, shuffled."""
    numbers = range(1, 13)
    rows = [
        {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        for a in numbers
        for b in numbers
    ]
    random.Random(0).shuffle(rows)
    return lines(rows)


def short_problems(file: Path) -> str:
    """Rows whose question has at most 200 characters and whose answer at most 180."""
    with file.open(encoding="utf-8") as text:  # file iteration splits at newlines only, as JSON lines do
        rows = [json.loads(line) for line in text]
    fields = ("question", "answer")
    return lines(
        [{f: row[f] for f in fields} for row in rows if len(row["question"]) <= 200 and len(row["answer"]) <= 180]
    )


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepare(name: str, run: Run, given: list[Path], folder: Path) -> None:
    """Write the recipe's input files into the folder in which it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "sums":
        (folder / "sums.jsonl").write_text(sums(), encoding="utf-8")
    elif name == "tool_calls":
        for target, rows in zip(run.files, split(given[0], HELD_OUT_CALLS), strict=True):
            (folder / target).write_text(lines(rows), encoding="utf-8")
        shutil.copyfile(HERE / "tool_calls.py", folder / "tool_calls.py")
    elif name == "gsm8k":
        for source, target in zip(given, run.files, strict=True):
            (folder / target).write_text(short_problems(source), encoding="utf-8")
    else:
        for source, target in zip(given, run.files, strict=True):
            shutil.copyfile(source, folder / target)
    if run.task is not None:
        shutil.copyfile(HERE / run.task, folder / run.task)


def accuracies(results: Path) -> dict[str, Any]:
    """The means of an evaluation by model, and the difference of each pair of models, paired by document."""
    content = json.loads((results / "results.json").read_text(encoding="utf-8"))
    ((task, found),) = next(iter(content["models"].values()))["tasks"].items()
    (metric,) = found["metrics"]
    keys = ("mean", "low", "high", "n", "unscored")
    measured = {name: of["tasks"][task]["metrics"][metric] for name, of in content["models"].items()}
    return {
        "task": task,
        "documents": found["documents"],
        "samples": content["settings"]["samples"],
        "models": {name: {key: values[key] for key in keys} for name, values in measured.items()},
        "differences": {
            f"{second} - {first}": asdict(compare_folders(results / first, results / second).differences[0])
            for first, second in itertools.combinations(content["models"], 2)
        },
    }


def keep(name: str, option: str, result: dict[str, Any]) -> None:
    """Write accuracies.json with this run's result beside those of the other runs. option: arguments of this run."""
    path = RESULTS / "accuracies.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    about = {"options": option, "date": datetime.now(UTC).isoformat(timespec="seconds"), **code_version()}
    write("accuracies", {**earlier, name: {**result, **about}}, option="NAME", show=False)


def summary() -> dict[str, Any]:
    """Each drawn run's metrics: means over the first and the last tenth of the steps."""
    found = {}
    for path in sorted(CURVES.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        tenth = max(1, len(facts["steps"]) // 10)
        found[path.stem] = {
            "recipe": facts["recipe"],
            "stage": facts["stage"],
            "steps": facts["steps"][-1],
            "minutes": round(facts["seconds"] / 60, 1),
            "processor": f"{facts['hardware']['cores']} cores of {facts['hardware']['cpu']}",
            "first and last tenth": {
                name: [round(sum(part) / len(part), 3) for part in (values[:tenth], values[-tenth:])]
                for name, values in ((n, [v for v in all_ if v is not None]) for n, all_ in facts["curves"].items())
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--stages", metavar="STAGE,...", help="run only these stages")
    options = parser.parse_args()
    run = RUNS[options.name]
    needed = len(run.files) if run.given is None else run.given
    if len(options.files) != needed:
        parser.error(f"{options.name} needs {needed} files, but got {len(options.files)}.")
    folder = Path("runs") / f"{options.name}_data"
    prepare(options.name, run, [file.resolve() for file in options.files], folder)
    run_dir = (Path("runs") / options.name).resolve()
    resume = ["--resume"] if run_dir.exists() else []
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    chosen = options.stages.split(",") if options.stages else []
    changes = list(run.changes)
    if "evaluate" in chosen:
        changes.append(f"stages.evaluate.models=[{', '.join(['base'] * (options.name == 'gsm8k') + chosen[:-1])}]")
    for only in [["--only", stage] for stage in chosen] or [resume]:
        command = [sys.executable, "-m", "align.cli", "run", run.recipe, "--run-dir", str(run_dir), *only, *changes]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    if run.task is not None and (run_dir / "evaluate" / "manifest.json").is_file():
        names = [
            options.name,
            *(file.name for file in options.files),
            *(["--stages", options.stages] if chosen else []),
        ]
        keep(options.name, " ".join(names), accuracies(run_dir / "evaluate" / "tasks"))
    for picture, stage, metrics in run.curves:
        if chosen and stage not in chosen:
            continue
        script = [sys.executable, str(HERE / "curves.py"), picture, str(run_dir), stage, ",".join(metrics)]
        subprocess.run(script, check=True)
    write("real_runs", summary())


if __name__ == "__main__":
    main()
