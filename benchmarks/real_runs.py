"""Run recipes at a size for two cores and draw their learning curves: `python benchmarks/real_runs.py NAME [FILE ...]`.

sums        GRPO and PPO from the same SFT checkpoint, on sums in GSM8K's form; 3M parameters, from random weights.
            Needs no file.
gsm8k       the recipe gsm8k_grpo with LoRA and small batches on short rows of FILE, GSM8K's train split as JSON lines
            with question and answer; SmolLM2-135M converted to a mixture of experts.
preference  the recipe preference_ppo on FILE and HELD_OUT, JSON lines with prompt, chosen and rejected; 3M parameters,
            from random weights.

The run folder is runs/NAME; an interrupted run is resumed. Afterwards the pictures of docs/runs.md are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from curves import RESULTS as CURVES
from harness import write

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
            # The file has no test split, so this is the accuracy on training rows.
            "stages.evaluate.tasks=[{name: gsm8k_train, prompts: [{kind: file, path: gsm8k.jsonl, limit: 64, "
            "columns: {prompt: question}}], metrics: [{kind: math}], temperature: 0.0, max_new_tokens: 96}]",
            "stages.evaluate.rollout={max_model_length: 192, max_sequences: 64, cache_gib: 0.5}",
        ),
        (Curves("gsm8k_grpo", "grpo", ("reward/math", "reward/form", "completion_length")),),
        ("gsm8k.jsonl",),
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
    elif name == "gsm8k":
        (folder / "gsm8k.jsonl").write_text(short_problems(given[0]), encoding="utf-8")
    else:
        for source, target in zip(given, run.files, strict=True):
            shutil.copyfile(source, folder / target)


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
    options = parser.parse_args()
    run = RUNS[options.name]
    needed = 0 if options.name == "sums" else len(run.files)
    if len(options.files) != needed:
        parser.error(f"{options.name} needs {needed} files, but got {len(options.files)}.")
    folder = Path("runs") / f"{options.name}_data"
    prepare(options.name, run, [file.resolve() for file in options.files], folder)
    run_dir = (Path("runs") / options.name).resolve()
    resume = ["--resume"] if run_dir.exists() else []
    command = [sys.executable, "-m", "align.cli", "run", run.recipe, "--run-dir", str(run_dir), *resume, *run.changes]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    for picture, stage, metrics in run.curves:
        script = [sys.executable, str(HERE / "curves.py"), picture, str(run_dir), stage, ",".join(metrics)]
        subprocess.run(script, check=True)
    write("real_runs", summary())


if __name__ == "__main__":
    main()
