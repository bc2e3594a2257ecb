"""The page of `align compare` in a real browser: at two widths, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.eval.comparison.build import compare_sides
from align.eval.comparison.curves import curve_groups
from align.eval.comparison.page import render_comparison
from align.eval.comparison.sides import read_sides
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow
from tests.unit.eval.test_comparison import SCORES, write_run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    names = ["a", "b", "a-run-with-a-rather-long-name-of-its-own"]
    runs = [str(write_run(folder / n, 0.1 * (k + 1), SCORES["one"][k:] + [k] * k)) for k, n in enumerate(names)]
    sides = read_sides(runs)
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


def test_every_side_has_a_curve_in_the_colour_of_the_legend(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        dots = page.eval_on_selector_all(".legend .dot", "dots => dots.map((dot) => dot.className)")
        strokes = page.eval_on_selector_all(
            "#curves figure:first-of-type svg path",
            r"paths => [...new Set(paths.flatMap((p) => (p.getAttribute('style') || '').match(/--m\d/g) || []))]",
        )
    assert dots == ["dot m0", "dot m1", "dot m2"]
    assert sorted(strokes) == ["--m0", "--m1", "--m2"]
