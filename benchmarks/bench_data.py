"""Start of an SFT stage on many conversations: first start, second start and memory of the ranks, against TRL.

    python benchmarks/bench_data.py --rows 1000000

The rows are conversations made of ../shared/data, numbered so that no two are equal; without that folder, of the
documentation of the installed Python. TRL is `SFTTrainer`'s own preparation of the same file, read by `datasets`, with
`assistant_only_loss=True` and `dataset_num_proc` processes. Each measurement is a process of its own with an empty
cache; its seconds do not include the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import write

SHARED = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = {
    "sft/sft_en_alpaca_demo.jsonl": ("instruction", "output"),
    "sft/sft_zh_alpaca_demo.jsonl": ("instruction", "output"),
    "preference/pref_en_pandalm_human.jsonl": ("prompt", "chosen"),
    "rl/rl_en_gsm8k_train.jsonl": ("question", "answer"),
}
MAX_LENGTH = 2048
VOCABULARY = 8192


def conversations() -> list[tuple[str, str]]:
    """(question, answer) of the shared data, otherwise of Python's documentation."""
    found = []
    for name, (question, answer) in COLUMNS.items():
        file = SHARED / name
        for line in file.read_text(encoding="utf-8").strip("\n").split("\n") if file.is_file() else ():
            row = json.loads(line)
            if isinstance(row[question], str) and isinstance(row[answer], str) and row[answer].strip():
                found.append((row[question], row[answer]))
    if not found:
        from align.data.python_docs import python_docs_rows

        talks = [row["messages"] for row in python_docs_rows("conversation", "train", 2000)]
        found = [(talk[0]["content"], talk[1]["content"]) for talk in talks]
    return found


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to three questions."""
    known, chooser = conversations(), random.Random(0)
    for number in range(count):
        turns = []
        for question, answer in chooser.choices(known, k=chooser.choice((1, 1, 2, 3))):
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns[0]["content"] += f" ({number})"
        yield {"messages": turns}


# --- what a child process measures ------------------------------------------------------------------------


def ours(file: str, folder: str, workers: int, read: int) -> dict[str, Any]:
    """Seconds until the rows can be trained on, then peak memory while `read` rows are read in random order."""
    from transformers import AutoTokenizer

    from align.config.parts import Data, FileSource
    from align.data.prepare import prepare_sft

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    data = Data(train=[FileSource(path=file)], max_length=MAX_LENGTH, cache=f"{folder}/cache", workers=workers)
    before = status()
    start, cpu = time.perf_counter(), cpu_seconds()
    made = prepare_sft(data, tokenizer, assistant_only_loss=True, seed=0)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    chooser = random.Random(os.getpid())
    for _ in range(read):
        made.train[chooser.randrange(len(made.train))]
    after = status()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rows": made.report.rows_train,
        "tokens": made.report.tokens,
        "loss_tokens": made.report.loss_tokens,
        # Memory of the process itself; pages of mapped files belong to the system's cache, which the ranks share.
        "anonymous_mb": (after["RssAnon"] - before["RssAnon"]) / 1024,
        "mapped_mb": (after["RssFile"] - before["RssFile"]) / 1024,
        "peak_mb": (after["VmHWM"] - before["VmRSS"]) / 1024,
    }


def trl(file: str, folder: str, workers: int, read: int) -> dict[str, Any]:
    """The same of TRL's preparation."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    arguments = SimpleNamespace(
        dataset_num_proc=workers,
        max_length=MAX_LENGTH,
        truncation_mode="keep_start",
        shuffle_dataset=False,
        dataset_text_field="text",
        assistant_only_loss=True,
    )
    trainer: Any = SimpleNamespace(completion_only_loss=False, chat_template=tokenizer.chat_template)
    before = status()
    start, cpu = time.perf_counter(), cpu_seconds()
    raw = datasets.load_dataset("json", data_files=file, split="train", cache_dir=f"{folder}/datasets")
    loaded = time.perf_counter() - start
    made = SFTTrainer._prepare_dataset(trainer, raw, tokenizer, arguments, False, None, "train")
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    after = status()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "seconds_of_reading": loaded,
        "rows": len(made),
        "anonymous_mb": (after["RssAnon"] - before["RssAnon"]) / 1024,
        "peak_mb": (after["VmHWM"] - before["VmRSS"]) / 1024,
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def status() -> dict[str, int]:
    """Memory of this process in KiB, by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if value[-2:] == "kB"}


# --- the benchmark ----------------------------------------------------------------------------------------


def start(kind: str, file: Path, folder: Path, workers: int, read: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", kind, str(file), str(folder), str(workers), str(read)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measurement ended with exit status {process.returncode}")
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenise, for both")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--read", type=int, default=20_000, help="rows that each rank reads after the second start")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the files and caches; default: a temporary folder")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, file, folder, workers, read = options.child
        measure = {"ours": ours, "trl": trl}[kind]
        print(json.dumps(measure(file, folder, int(workers), int(read))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write("data", measured(options, Path(folder)))


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from align.data.tokenizer import train_tokenizer

    texts = [text for talk in conversations() for text in talk]
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
    file = folder / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(options.rows))
    results: dict[str, Any] = {"rows": options.rows, "file_mb": round(file.stat().st_size / 2**20)}
    first = results["first_start"] = result(start("ours", file, folder, options.workers, 0))
    print("first start", first, flush=True)
    results["second_start"] = result(start("ours", file, folder, options.workers, 0))
    print("second start", results["second_start"], flush=True)
    ranks = [start("ours", file, folder, options.workers, options.read) for _ in range(options.ranks)]
    results["ranks"] = [result(rank) for rank in ranks]
    print("ranks", *results["ranks"], sep="\n  ", flush=True)
    stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    results["cache_mb"] = round(stored / 2**20)
    if not options.without_trl:
        other = results["trl"] = result(start("trl", file, folder, options.workers, 0))
        print("TRL", other, flush=True)
        results["first_start_speedup"] = round(other["seconds"] / first["seconds"], 2)
        results["first_start_speedup_in_cpu_seconds"] = round(other["cpu_seconds"] / first["cpu_seconds"], 2)
        preparation = other["seconds"] - other["seconds_of_reading"]
        results["speedup_over_preparation_alone"] = round(preparation / first["seconds"], 2)
        print("speedup", results["first_start_speedup"], results["speedup_over_preparation_alone"])
    return results


if __name__ == "__main__":
    main()
