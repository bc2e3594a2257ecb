"""The page of a sweep in a real browser: at two widths, light and dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.sweep.plan import Run
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow
from tests.unit.sweep.test_sweep import BETAS, MadeRuns, plan_of, sweep

SETTINGS = [*BETAS, "stages.dpo.max_steps=8,16"]
POINTS = 6


class WithCurves(MadeRuns):
    """Made runs whose stage dpo has a curve of ten steps."""

    def __call__(self, run: Run, recipe: Path) -> int:
        status = super().__call__(run, recipe)
        rows = [{"step": step, "loss": (run.seed + 1) / step} for step in range(1, 11)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run.folder / "dpo" / "metrics.jsonl").write_text(text, encoding="utf-8")
        return status


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six settings with two seeds; beta 0.3 is clearly best, with either number of steps."""
    made = WithCurves(lambda beta, seed: beta + 0.001 * seed)
    found = tmp_path_factory.mktemp("sweeps") / "a-sweep"
    assert sweep(plan_of(*SETTINGS, seeds=2), found, made) == []
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_is_legible(browser: Any, folder: Path, width: int, scheme: str) -> None:
    verdict = json.loads((folder / "report.json").read_text())["verdict"]
    with opened(browser, folder / "report.html", width=width, scheme=scheme) as page:
        assert overflow(page) == []
        assert low_contrast(page) == []
        assert page.locator("nav a").all_inner_texts() == ["Settings, best first", "By setting", "Curves", "Runs"]
        assert page.locator(".verdict").inner_text() == verdict
        assert page.locator("#settings tbody tr").count() == POINTS
        assert page.locator("#seeds tbody tr").count() == 2 * POINTS


def test_every_setting_has_a_plot_and_a_colour(browser: Any, folder: Path) -> None:
    """A plot for each of the two settings. The curves of both seeds of a setting have the colour of its name."""
    with opened(browser, folder / "report.html") as page:
        assert page.locator("#plots h4").all_inner_texts() == [
            "dpo: Reward-model score, by stages.dpo.beta",
            "dpo: Reward-model score, by stages.dpo.max_steps",
        ]
        for number in range(2):
            assert page.locator("#plots svg").nth(number).locator("path").count() > 10
        names = [name.replace("\u200b", "") for name in page.locator("#curves .legend b").all_inner_texts()]
        assert len(names) == POINTS
        assert {"beta=0.05, max_steps=8", "beta=0.3, max_steps=16"} < set(names)
        assert "beta: stages.dpo.beta. max_steps: stages.dpo.max_steps." in page.locator("#settings p").inner_text()
        dots = page.eval_on_selector_all(
            "#curves .legend .dot", r"dots => dots.map((dot) => dot.className.match(/m\d/)[0])"
        )
        strokes = page.eval_on_selector_all(
            "#curves figure:first-of-type svg path",
            r"paths => [...new Set(paths.flatMap((p) => (p.getAttribute('style') || '').match(/--m\d/g) || []))]",
        )
    assert [f"--{dot}" for dot in dots] == sorted(strokes)
