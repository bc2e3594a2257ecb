"""The page of `align compare` in a real browser: at two widths, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.eval.comparison.build import compare_sides
from align.eval.comparison.curves import curve_groups
from align.eval.comparison.page import render_comparison
from align.eval.comparison.sides import Side, read_sides
from align.eval.reward_model.pairs import ScoredPair
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow
from tests.unit.eval.made_pairs import write_pairs_evaluation
from tests.unit.eval.test_comparison import SCORES, write_run

NAMES = ["a", "b", "a-run-with-a-rather-long-name-of-its-own"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [str(write_run(folder / n, 0.1 * (k + 1), SCORES["one"][k:] + [k] * k)) for k, n in enumerate(NAMES)]
    return rendered(read_sides(runs), folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reward models on forty pairs: the second one is wrong on the first half, the third one on ten pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    wrong = dict(zip(NAMES, (0, 20, 10)))
    models = {
        name: [
            (f"pair {k}", ScoredPair(-0.5 if k < wrong[name] else 1.0, 0.0, 9 - k % 5, 7, "ab"[k % 2], k % 3 == 0))
            for k in range(40)
        ]
        for name in NAMES
    }
    return rendered(read_sides([str(write_pairs_evaluation(folder / "out", models))]), folder)


def rendered(sides: list[Side], folder: Path) -> Path:
    (folder / "page.html").write_text(render_comparison(compare_sides(sides), curve_groups(sides)), encoding="utf-8")
    return folder / "page.html"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_is_legible(browser: Any, file: Path, width: int, scheme: str) -> None:
    with opened(browser, file, width=width, scheme=scheme) as page:
        assert overflow(page) == []
        assert low_contrast(page) == []
        assert page.locator("nav a").all_inner_texts() == [
            "Metrics",
            "Curves",
            "Last values of the training",
            "Settings that differ",
        ]
        assert [name.replace("\u200b", "") for name in page.locator(".legend b").all_inner_texts()] == NAMES
        assert "No interval of a difference excludes zero." in page.locator(".verdict").inner_text()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_of_reward_models(browser: Any, pairs: Path, width: int, scheme: str) -> None:
    """The second model is right on half of the pairs, the first one on all: −1/2, whose interval excludes zero."""
    with opened(browser, pairs, width=width, scheme=scheme) as page:
        assert overflow(page) == []
        assert low_contrast(page) == []
        assert page.locator("nav a").all_inner_texts() == ["Metrics", "Bias and calibration", "Settings that differ"]
        assert "Accuracy on pairs: b − a −0.500 [" in page.locator(".verdict").inner_text()
        assert page.locator("#metrics figure svg").count() >= 3
        rows = {
            row.locator("th").inner_text(): row.locator("td").count() for row in page.locator("#figures tbody tr").all()
        }
        assert rows["Prefers the longer completion: model minus labels"] == 3
        assert rows["Calibration error"] == 3


def test_every_side_has_a_curve_in_the_colour_of_the_legend(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        dots = page.eval_on_selector_all(".legend .dot", "dots => dots.map((dot) => dot.className)")
        strokes = page.eval_on_selector_all(
            "#curves figure:first-of-type svg path",
            r"paths => [...new Set(paths.flatMap((p) => (p.getAttribute('style') || '').match(/--m\d/g) || []))]",
        )
    assert dots == ["dot m0", "dot m1", "dot m2"]
    assert sorted(strokes) == ["--m0", "--m1", "--m2"]
