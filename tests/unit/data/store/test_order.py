"""Mixtures as index arithmetic: the order that `datasets` gives to the rows themselves, and counts by hand."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest

from align.config.parts import FileSource, Mixture
from align.data.store.order import chosen_rows, mixed_order, mixture_shares


@pytest.mark.parametrize(
    "options",
    [
        [{}],
        [{"limit": 30}],
        [{}, {"limit": 20}, {}],
        [{"weight": 3}, {"limit": 20}, {"weight": 0.5}],
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_order_is_that_of_the_rows_themselves(options, seed):
    """Witness: `datasets` on data sets of texts. A change of this order would change every existing recipe."""
    sizes = [70, 50, 40][: len(options)]
    parts = []
    for number, (size, option) in enumerate(zip(sizes, options)):
        texts = datasets.Dataset.from_dict({"text": [f"{number} {row}" for row in range(size)]}).shuffle(seed=seed)
        parts.append(texts.select(range(option.get("limit", size))))
    if len(parts) == 1:
        expected = parts[0]
    elif "weight" in options[0]:
        shares = [3 / 4.5, 1 / 4.5, 0.5 / 4.5]
        expected = datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="first_exhausted")
    else:
        expected = datasets.concatenate_datasets(parts).shuffle(seed=seed)
    order = mixed_order(sizes, [FileSource(path="x", **option) for option in options], Mixture(), seed)
    assert [f"{source} {row}" for source, row in zip(order.source, order.row)] == expected["text"][:]


def test_limit_keeps_the_rows_that_the_order_has():
    source = FileSource(path="x", limit=7)
    kept = chosen_rows(50, 7, seed=3)
    assert sorted(mixed_order([50], [source], Mixture(), 3).row) == kept.tolist()
    assert chosen_rows(7, 7, seed=3) is None


@pytest.mark.parametrize(("epochs", "rows"), [(0.01, 1), (0.5, 5), (1, 10), (2, 20), (2.3, 23)])
def test_epochs_repeat_a_source(epochs, rows):
    order = mixed_order([10, 4], [FileSource(path="a", epochs=epochs), FileSource(path="b")], Mixture(), 0)
    counts = Counter(zip(order.source.tolist(), order.row.tolist()))
    own = [counts[0, row] for row in range(10)]
    assert sum(own) == rows
    assert max(own) - min(own) <= 1
    assert [counts[1, row] for row in range(4)] == [1] * 4
    if epochs == 2:  # each pass has its own order
        passes = mixed_order([10], [FileSource(path="a", epochs=2)], Mixture(), 0).row.reshape(2, 10)
        assert passes[0].tolist() != passes[1].tolist()


def test_first_occurrences():
    order = mixed_order([10], [FileSource(path="a", epochs=2)], Mixture(), 0)
    assert order.first_occurrences().row.tolist() == order.row[:10].tolist()


@pytest.mark.parametrize(
    ("stop", "largest", "smallest"),
    [
        ("first_exhausted", (1, 1), (0, 1)),
        ("all_exhausted", (2, 99), (1, 99)),
        ("all_exhausted_without_replacement", (1, 1), (1, 1)),
    ],
)
def test_the_end_of_a_mixture(stop, largest, smallest):
    """Bounds of the number of occurrences of the most and the least frequent row."""
    sources = [FileSource(path="a", weight=1), FileSource(path="b", weight=1)]
    order = mixed_order([60, 15], sources, Mixture(stop=stop), 1)
    counts = Counter(zip(order.source.tolist(), order.row.tolist()))
    times = [counts[source, row] for source, size in enumerate((60, 15)) for row in range(size)]
    assert largest[0] <= max(times) <= largest[1]
    assert smallest[0] <= min(times) <= smallest[1]


@pytest.mark.parametrize(
    ("temperature", "shares"), [(1, [0.8, 0.2]), (2, [2 / 3, 1 / 3]), (1000, [0.5, 0.5]), (None, None)]
)
def test_temperature(temperature, shares):
    """Sizes 400 and 100: at temperature 2 the shares are as 20 to 10."""
    sources = [FileSource(path="a"), FileSource(path="b")]
    assert mixture_shares([400, 100], sources, Mixture(temperature=temperature)) == (
        shares and pytest.approx(shares, abs=1e-3)
    )
    if temperature == 2:
        order = mixed_order([400, 100], sources, Mixture(temperature=2), 0)
        assert np.mean(order.source == 0) == pytest.approx(2 / 3, abs=0.08)
