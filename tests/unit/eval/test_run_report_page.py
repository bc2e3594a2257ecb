"""report.html of a run in a real browser: at two widths, light and dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.eval.report.write import write_report
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow
from tests.unit.eval.made_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "a-run")
    write_report(folder)
    return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_is_legible(browser: Any, run: Path, width: int, scheme: str) -> None:
    with opened(browser, run / "report.html", width=width, scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert overflow(page) == []
        assert low_contrast(page) == []
        sizes = page.eval_on_selector_all("figure svg text", TEXT_SIZES)
        assert len(sizes) > 100
        assert min(sizes) >= 9.5


TEXT_SIZES = """texts => texts.map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_curves_are_visible(browser: Any, run: Path, scheme: str) -> None:
    """Each drawn line or bar has WCAG's contrast of 3 for graphics."""
    with opened(browser, run / "report.html", scheme=scheme) as page:
        colors = page.evaluate(COLORS)
    ground = {"light": (255, 255, 255), "dark": (31, 34, 38)}[scheme]
    assert colors["card"] == f"rgb{ground}"
    assert len(colors["curves"]) >= 3
    for color in colors["curves"]:
        light, dark = sorted([luminance(color), luminance(ground)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, color


COLORS = """() => {
  const strokes = [...document.querySelectorAll("figure svg path")].map((path) => path.getAttribute("style") || "");
  const names = new Set(strokes.flatMap((style) => style.match(/--m\\d/g) || []));
  const card = getComputedStyle(document.querySelector("figure")).backgroundColor;
  const probe = document.body.appendChild(document.createElement("i"));
  const curves = [...names].map((name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
  });
  return {card, curves};
}"""


def luminance(color: Any) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bars_of_the_stages_are_on_their_tracks(browser: Any, run: Path, width: int) -> None:
    """Five stages of 30 s: each bar is as high as its track, a fifth as long, and begins where the one before ends."""
    with opened(browser, run / "report.html", width=width) as page:
        tracks = page.eval_on_selector_all(".stage .track", TRACKS)
    assert len(tracks) == 5
    for number, (top, bottom, left, right) in enumerate(tracks):
        assert [top, bottom] == pytest.approx([0, 1], abs=0.01)
        assert [left, right] == pytest.approx([0.98 * number / 5, 0.98 * (number + 1) / 5], abs=0.01)


TRACKS = """tracks => tracks.map((track) => {
  const around = track.getBoundingClientRect(), bar = track.firstElementChild.getBoundingClientRect();
  return [(bar.top - around.top) / around.height, (bar.bottom - around.top) / around.height,
          (bar.left - around.left) / around.width, (bar.right - around.left) / around.width];
})"""


def test_the_links_lead_to_sections(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html", width=390) as page:
        for link in page.locator("nav a").all():
            link.focus()
            page.keyboard.press("Enter")
            target = link.get_attribute("href")
            top = page.eval_on_selector(target, "section => section.getBoundingClientRect().top")
            assert -1 <= top < 844
            assert page.evaluate("location.hash") == target


def test_the_table_has_the_means(browser: Any, run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    (evaluation,) = report["evaluations"]
    with opened(browser, run / "report.html") as page:
        rows = page.eval_on_selector_all("#comparison-0 .scroll", FIRST_TABLE)
    assert [row[0].split(" ")[0] for row in rows] == evaluation["models"]
    column = [m["key"] for m in evaluation["metrics"]].index("scores")
    for row, model in zip(rows, evaluation["models"], strict=True):
        cell = evaluation["metrics"][column]["models"][model]
        assert row[1 + column].startswith(f"{cell['mean']:.2f}"[:4])


FIRST_TABLE = (
    "boxes => [...boxes[0].querySelectorAll('tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
)
