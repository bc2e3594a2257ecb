"""Host syncs, uploads and kernel launches of one pass of every kind, counted on a pretend GPU; nothing is timed.

A pass is the forward pass of one micro-batch, in training also its loss and backward pass, with the results or metrics
copied to the host. Counts grow linearly with the number of layers, so the counts for two depths give a fixed part and a
part per layer. `tests/pretend_device.py` defines what is counted. The table also shows the counts of an earlier version
from results/launches_before.json, which lacks passes that were added later.

    --before    write results/launches_before.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write
from model_tables import launches

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.pretend_passes import EXPERT_PARALLEL, PASSES, count  # noqa: E402
from tests.unit.parallel.started import run_ranks  # noqa: E402

BEFORE = "launches_before"
LAYERS = (2, 4)
DTYPES = ("bfloat16", "float32")
Totals = dict[str, int]


def by_layer(few: Totals, many: Totals) -> dict[str, dict[str, float]]:
    """{kind: {"fixed": f, "per layer": p}} from the counts of both depths."""
    first, second = LAYERS
    found = {}
    for kind, count_of_few in few.items():
        per_layer = (many[kind] - count_of_few) / (second - first)
        found[kind] = {"fixed": count_of_few - first * per_layer, "per layer": per_layer}
    return found


def expert_parallel() -> dict[tuple[str, int], Totals]:
    """Counts of rank 0 of two ranks, by dtype and number of layers."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks("pretend_ranks.py", 2, Path(folder))
        counted = json.loads((Path(folder) / "rank-0.json").read_text(encoding="utf-8"))
    return {(found["dtype"], found["layers"]): found["totals"] for found in counted}


def count_all() -> dict[str, dict[str, Any]]:
    """{dtype: {pass: counts}}."""
    sharded = expert_parallel()
    results: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        results[dtype] = {}
        for name, build in PASSES.items():
            few, many = (count(build, getattr(torch, dtype), layers).totals() for layers in LAYERS)
            results[dtype][name] = by_layer(few, many)
        results[dtype][EXPERT_PARALLEL] = by_layer(*(sharded[dtype, layers] for layers in LAYERS))
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", action="store_true")
    if parser.parse_args().before:
        write(BEFORE, count_all(), option="--before")
        return
    before = json.loads((RESULTS / f"{BEFORE}.json").read_text(encoding="utf-8"))
    results = {"before": before["results"], "now": count_all()}
    write("launches", results)
    print(launches(results))


if __name__ == "__main__":
    main()
