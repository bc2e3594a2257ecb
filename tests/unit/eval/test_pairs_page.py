"""pairs.html of `align eval --pairs` in a real browser: it fits, is legible, and has the numbers of the scores."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from align.eval.reward_model.page import render_pairs
from align.eval.reward_model.pairs import ScoredPair
from align.eval.reward_model.score import Preference, ranked_wrongly, statistics
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow

ATTACK = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
MODELS = ("careful", "a-reward-model-with-a-long-name")
RIGHT = {"careful": 0.9, "a-reward-model-with-a-long-name": 0.6}


def made(model: str, count: int = 120) -> list[ScoredPair]:
    """Pairs of two subsets. One of ten is wrong for the first model, and four for the second, which likes length."""
    draw = random.Random(7)
    pairs = []
    for number in range(count):
        right = number % 10 < 10 * RIGHT[model]
        margin = draw.uniform(0.2, 3.0) * (1 if right else -1)
        longer = right if model != "careful" else (number // 10) % 2 == 0
        lengths = (20, 10) if longer else (10, 20)
        pairs.append(
            ScoredPair(margin, 0.0, *lengths, "chat" if number < 80 else "code, with a long name", None, number)
        )
    return pairs


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scored = {model: made(model) for model in MODELS}
    preferences = [
        Preference(
            n, (([{"role": "user", "content": f"{ATTACK} {n}"}], f"good {n}"), ([], f"bad {n} " * 60)), {}, "", None
        )
        for n in range(120)
    ]
    content = {
        "source": "pairs.jsonl",
        "pairs": 120,
        "dropped": {"chosen equals rejected": 3},
        "models": {model: statistics(pairs) for model, pairs in scored.items()},
        "agreement": {" ".join(MODELS): None},
    }
    wrong = {model: ranked_wrongly(preferences, pairs, 10) for model, pairs in scored.items()}
    path = tmp_path_factory.mktemp("page") / "pairs.html"
    path.write_text(render_pairs(content, wrong), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_is_legible(browser: Any, file: Path, width: int, scheme: str) -> None:
    with opened(browser, file, width=width, scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert overflow(page) == []
        assert low_contrast(page) == []
        assert page.evaluate("window.hit") is None


def test_the_numbers_are_those_of_the_scores(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        rows = [row.inner_text() for row in page.locator("#accuracy tbody tr").all()]
        assert re.search(r"careful\s+0\.900", rows[0])
        assert re.search(r"long-name\s+0\.600", rows[1].replace("\u200b", ""))
        biases = [row.inner_text() for row in page.locator("#biases tbody tr").all()]
        # The pairs that the second model ranks rightly are those whose chosen completion is longer.
        assert ["not shown" in row for row in biases] == [True, False]
        bars = page.locator("#accuracy .bar .fill").all()
        assert len(bars) == 4  # two subsets of two models
        assert "3 rows dropped: chosen equals rejected" in page.locator(".notes").inner_text()


def test_points_of_the_reliability_diagram_lie_where_the_bins_say(browser: Any, file: Path) -> None:
    bins = statistics(made("careful"))["calibration"]["bins"]
    with opened(browser, file) as page:
        svg = page.locator("#calibration svg").first
        lines = [
            {key: float(line.get_attribute(key)) for key in ("x1", "y1", "x2", "y2")}
            for line in svg.locator("line").all()
        ]
        zero, one = lines[0]["y1"], lines[4]["y1"]  # the grid at accuracy 0 and 1
        left, right = lines[0]["x1"], lines[0]["x2"]  # confidence 0.5 and 1
        points = [(float(c.get_attribute("cx")), float(c.get_attribute("cy"))) for c in svg.locator("circle").all()]
    assert len(points) == len(bins)
    for (x, y), entry in zip(points, bins, strict=True):
        assert 0.5 + 0.5 * (x - left) / (right - left) == pytest.approx(entry["confidence"], abs=1e-3)
        assert (zero - y) / (zero - one) == pytest.approx(entry["accuracy"]["mean"], abs=1e-3)


def test_the_most_wrong_pairs_come_first(browser: Any, file: Path) -> None:
    margins = sorted((pair.margin, number) for number, pair in enumerate(made("careful")) if pair.margin < 0)[:10]
    with opened(browser, file) as page:
        page.locator("#wrong summary").first.click()
        cards = page.locator("#wrong details").first.locator(".card")
        assert [
            int(re.match(r"row (\d+)", text)[1])
            for text in cards.locator("h3:first-child").all_inner_texts()
            if text.startswith("row")
        ] == [number for _, number in margins]
        assert f"good {margins[0][1]}" in cards.first.inner_text()
