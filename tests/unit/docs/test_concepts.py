"""The numbers in docs/concepts are those in benchmarks/results, which follow from the library."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGES = {
    "packing": ("rows", "tokens", "padded", "padding", "passes"),
    "router": ("load 0.0", "load 0.01"),
    "replay": ("sampled", "rerouted", "mean own", "mean replayed", "max own", "max replayed"),
    "critic": ("lambda 0.95 at 20",),
}


@pytest.fixture(scope="module")
def concepts() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "concepts.py"))


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "concepts.json").read_text(encoding="utf-8"))


def test_the_pages_quote_the_results(concepts, values) -> None:
    numbers = concepts["numbers"](values)
    assert numbers.keys() == {name for names in PAGES.values() for name in names}
    for page, names in PAGES.items():
        text = (ROOT / "docs" / "concepts" / f"{page}.md").read_text(encoding="utf-8")
        words = text.replace("\n", " ").replace(":", " ").replace(".  ", " ").split(" ")
        words = [word.rstrip(".,") for word in words]
        assert [name for name in names if numbers[name] not in words] == [], "run `python benchmarks/concepts.py`"


def test_every_page_has_its_figure(concepts) -> None:
    for name in concepts["FIGURES"]:
        page = (ROOT / "docs" / "concepts" / f"{name}.md").read_text(encoding="utf-8")
        assert page.count("](../images/concept_") == page.count(f"](../images/concept_{name}.svg)") == 1
        assert "<svg" in (ROOT / "docs" / "images" / f"concept_{name}.svg").read_text(encoding="utf-8")[:500]


def test_packing_by_hand(values) -> None:
    packing = values["packing"]
    lengths, passes = packing["lengths"], packing["passes"]
    assert sorted(length for members in passes for length in members) == sorted(lengths)
    assert max(map(sum, passes)) <= 8 * 256
    assert packing["padded"] == sum(8 * max(lengths[i : i + 8]) for i in (0, 8, 16, 24))


def test_weights_of_prediction_errors_are_powers_of_lambda(concepts, values) -> None:
    for lam, weights in concepts["gae_weights"]().items():
        assert weights == pytest.approx(values["gae"][lam])
        assert weights == pytest.approx([float(lam) ** distance for distance in range(60)], rel=1e-4)


def test_kl_estimators(concepts, values) -> None:
    """k1 and k3 have the KL as their mean; the deviation of k1 is that of the log-ratio."""
    found = concepts["kl_estimators"]()
    assert found["kl"] == pytest.approx(values["kl"]["kl"])
    for kl, k1, k3 in zip(found["kl"], found["k1"], found["k3"], strict=True):
        assert k1[0] == pytest.approx(kl, rel=1e-5, abs=1e-7)
        assert k3[0] == pytest.approx(kl, rel=1e-5, abs=1e-7)
    small = found["kl"][0]
    assert found["k3"][0][1] < found["k1"][0][1]
    # Near the reference the log-ratio is small: its variance is twice the KL, and k2 is half of its square.
    assert found["k1"][0][1] == pytest.approx(math.sqrt(2 * small), rel=0.1)
