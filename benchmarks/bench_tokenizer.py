"""Encoding speed of the converted tokenizer against tiktoken, on one text and on a batch, with one thread.

Needs the released vocabulary: `tokenizer/hy.tiktoken` in the folder given as argument, in $ALIGN_GOLDEN or in
../shared/golden. The text is the documentation of the installed Python.
"""

from __future__ import annotations

import os
import sys
import tempfile
import unicodedata
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers starts its threads

import tiktoken
from harness import compare, medians, ratio, write

from align.data.python_docs import python_docs_rows
from align.data.tiktoken_file import read_ranks
from align.models.hunyuan.tokenization import PATTERN, SPECIAL_TOKENS, convert_tokenizer

DEFAULT = Path(__file__).parents[2] / "shared" / "golden"


def main() -> None:
    golden = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ALIGN_GOLDEN", DEFAULT))
    source = golden / "tokenizer" / "hy.tiktoken"
    if not source.is_file():
        print(f"{source}: not found; pass the folder of the released vocabulary")
        return
    ranks = read_ranks(source)
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    other = tiktoken.Encoding("hunyuan", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    with tempfile.TemporaryDirectory() as folder:
        ours = convert_tokenizer(source, Path(folder))
    texts = [unicodedata.normalize("NFC", row["text"]) for row in python_docs_rows("text", "train", 400)]
    everything = "\n\n".join(texts)
    assert ours.encode(everything, add_special_tokens=False) == other.encode(everything, allowed_special="all")
    megabytes = len(everything.encode()) / 1e6
    results = {}
    for label, variants in {
        "one text": {
            "align": lambda: ours.encode(everything, add_special_tokens=False),
            "tiktoken": lambda: other.encode(everything, allowed_special="all"),
        },
        f"{len(texts)} texts": {
            "align": lambda: ours(texts, add_special_tokens=False),
            "tiktoken": lambda: other.encode_batch(texts, num_threads=1, allowed_special="all"),
        },
    }.items():
        seconds = compare(variants, repetitions=5)
        results[label] = {
            "megabytes_per_second": {n: round(megabytes / s, 2) for n, s in medians(seconds).items()},
            "tiktoken / align": round(ratio(seconds, "tiktoken", "align"), 3),
        }
    write("tokenizer", {"megabytes": round(megabytes, 2), **results})


if __name__ == "__main__":
    main()
