"""Recall and false alarms of the filters `contamination` and `duplicates`, with the usual alternatives beside them.

    python benchmarks/bench_filters.py

Contamination: the test questions of GSM8K in ../shared/data are planted in conversations, with a share of their words
replaced by words of other questions; the clean rows are GSM8K's training rows. Without that folder, the items are
sentences of the documentation of the installed Python, and the clean rows those of other modules.

Beside the filter: a row is contaminated if it has an 8-gram or a 13-gram of words of an item (13: GPT-3, Brown et al.
2020), or if 8-grams that it shares with an item cover half of the item's words (Tülu 3, Lambert et al. 2024).

Duplicates: copies of the clean rows with a share of their words replaced. Beside the filter: MinHash with 128
permutations and a threshold of 0.5, by the library `datasketch` if it is installed.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import write

from align.config.filters import ContaminationFilter
from align.data.filters.contamination import ItemIndex
from align.data.filters.duplicates import near_duplicates
from align.data.filters.grams import WORDS, text_grams, units

SHARED = Path(__file__).parents[2] / "shared" / "data" / "rl"
CHANGED = (0.0, 0.1, 0.2, 0.3)
"""Shares of the words that are replaced."""
PLANTED = 400
"""Items, and copies, per share."""
NEAR = 0.5
"""Value of the filter's `near`, and threshold of MinHash."""
Found = Callable[[str], int | None]
"""The item that a text contains, if any."""


def texts() -> tuple[str, list[str], list[str]]:
    """(name, items of an evaluation set, clean training rows)."""
    if (SHARED / "rl_en_gsm8k_test.jsonl").is_file():
        rows = {split: _rows(SHARED / f"rl_en_gsm8k_{split}.jsonl") for split in ("test", "train")}
        items = [row["question"] for row in rows["test"]]
        return "GSM8K", items, [f"{row['question']}\n{row['answer']}" for row in rows["train"]]
    from align.data.python_docs import python_docs_rows

    items = [row["messages"][-1]["content"] for row in python_docs_rows("conversation", "held_out", 400)]
    clean = [row["messages"][-1]["content"] for row in python_docs_rows("conversation", "train", 400)]
    return "documentation of Python", [item for item in items if len(units(item)) >= 20], clean


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").strip("\n").split("\n")]


def changed(text: str, share: float, words: Sequence[str], chooser: random.Random) -> str:
    """The text with a share of its words replaced by others of `words`."""
    found = text.split()
    for place in chooser.sample(range(len(found)), round(share * len(found))):
        found[place] = chooser.choice([word for word in chooser.choices(words, k=8) if word != found[place]])
    return " ".join(found)


# --- contamination ----------------------------------------------------------------------------------------


class Overlap:
    """Items by their n-grams of words. covered: share of an item's words that shared n-grams must cover; 0 for one."""

    def __init__(self, items: Sequence[str], size: int, covered: float = 0.0):
        self.size, self.covered, self.lengths = size, covered, [len(units(item)) for item in items]
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            for place, gram in enumerate(self._grams(item)):
                self.places[gram].append((number, place))

    def _grams(self, text: str) -> list[tuple[str, ...]]:
        words = units(text)
        return [tuple(words[start : start + self.size]) for start in range(len(words) - self.size + 1)]

    def __call__(self, text: str) -> int | None:
        words: dict[int, set[int]] = defaultdict(set)
        for gram in self._grams(text):
            for number, place in self.places.get(gram, ()):
                words[number].update(range(place, place + self.size))
        best = max(words, key=lambda number: len(words[number]) / self.lengths[number], default=None)
        return best if best is not None and len(words[best]) >= self.covered * self.lengths[best] else None


def of_filter(items: Sequence[str]) -> Found:
    """The filter with its default threshold."""
    threshold = ContaminationFilter.model_fields["threshold"].default
    index = ItemIndex(items)

    def found(text: str) -> int | None:
        match = index.best_match(text, threshold)
        return None if match is None else match.item

    return found


def contamination(items: list[str], clean: list[str]) -> dict[str, Any]:
    """Recall of the planted items by share of changed words, and clean rows that are flagged, of each method."""
    chooser, words = random.Random(0), [word for item in items for word in item.split()]
    numbers = chooser.sample(range(len(items)), min(PLANTED, len(items)))
    planted = {
        share: [f"Here is one more.\n{changed(items[n], share, words, chooser)}\nLet us think." for n in numbers]
        for share in CHANGED
    }
    methods: dict[str, Callable[[], Found]] = {
        "align": lambda: of_filter(items),
        "any 8-gram": lambda: Overlap(items, 8),
        "any 13-gram": lambda: Overlap(items, 13),
        "8-grams over half of the item": lambda: Overlap(items, 8, 0.5),
    }
    results = {}
    for name, made in methods.items():
        found, start = made(), time.process_time()
        flagged = sum(found(row) is not None for row in clean)
        seconds = time.process_time() - start
        recall = {
            f"{share:.0%}": round(sum(found(row) is not None for row in rows) / len(rows), 3)
            for share, rows in planted.items()
        }
        results[name] = {"recall": recall, "flagged": flagged, "cpu_seconds": round(seconds, 2)}
    return {"items": len(items), "planted": len(numbers), "clean": len(clean), "methods": results}


# --- near duplicates --------------------------------------------------------------------------------------


def by_filter(rows: list[str]) -> list[int | None]:
    return near_duplicates([text_grams(row) for row in rows], NEAR)


def by_minhash(rows: list[str]) -> list[int | None]:
    """MinHash of the same n-grams, compared by locality-sensitive hashing."""
    from datasketch import MinHash, MinHashLSH

    index, found = MinHashLSH(threshold=NEAR, num_perm=128), list[int | None]()
    for number, row in enumerate(rows):
        words, sketch = units(row), MinHash(num_perm=128)
        sketch.update_batch(
            [" ".join(words[start : start + WORDS]).encode() for start in range(len(words) - WORDS + 1)]
        )
        matches = index.query(sketch)
        found.append(min(map(int, matches)) if matches else None)
        if not matches:
            index.insert(str(number), sketch)
    return found


def duplicates(clean: list[str]) -> dict[str, Any]:
    """Recall of changed copies, and originals that are dropped, of each method."""
    chooser, words = random.Random(1), [word for row in clean for word in row.split()]
    numbers = chooser.sample(range(len(clean)), min(PLANTED, len(clean)))
    methods: dict[str, Callable[[list[str]], list[int | None]]] = {"align": by_filter}
    if find_spec("datasketch"):
        methods["MinHash"] = by_minhash
    results = {}
    for name, method in methods.items():
        start = time.process_time()
        alone = method(clean)
        seconds = time.process_time() - start
        recall = {}
        for share in CHANGED:
            copies = [changed(clean[number], share, words, random.Random(number)) for number in numbers]
            found = method([*clean, *copies])[len(clean) :]
            recall[f"{share:.0%}"] = round(sum(match is not None for match in found) / len(copies), 3)
        dropped = sum(match is not None for match in alone)
        results[name] = {"recall": recall, "flagged": dropped, "cpu_seconds": round(seconds, 2)}
    return {"copies": len(numbers), "clean": len(clean), "methods": results}


def main() -> None:
    name, items, clean = texts()
    write("filters", {"texts": name, "contamination": contamination(items, clean), "duplicates": duplicates(clean)})


if __name__ == "__main__":
    main()
