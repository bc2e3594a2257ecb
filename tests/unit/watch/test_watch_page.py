"""The live page in a real browser: at two widths, light and dark, with a run of 100,000 steps that continues."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from align.watch import server as watch_server
from align.watch.server import WatchServer
from tests.browsers import SCHEMES, WIDTHS, low_contrast, overflow, recorded
from tests.unit.watch.made_runs import append, start, training_row, write, write_long, write_ppo

STEPS = 100_000


@contextmanager
def watching(folder: Path, token: str | None = None) -> Iterator[WatchServer]:
    with WatchServer(folder, "127.0.0.1", 0, token) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(folder, address) of a run of 100,000 steps; tests append to it."""
    folder = tmp_path_factory.mktemp("runs") / "a-run"
    write_long(folder, STEPS)
    with watching(folder) as server:
        yield folder, server.url


@contextmanager
def opened(browser: Any, url: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """The page in a window; fails if it logs an error or requests anything but its own server."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors, requests = recorded(page)
    try:
        page.goto(url)
        yield page
        server = url.partition("#")[0]
        assert not [message for message in errors if "401" not in message], errors
        assert not [request for request in requests if not request.startswith(server)], requests
    finally:
        context.close()


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition. The page's policy forbids Playwright's own `wait_for_function`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.05)


def drawn(page: Any) -> None:
    """Wait until the whole file is read and drawn."""
    page.locator("figure path.line").first.wait_for(state="attached")
    until(lambda: not page.locator("#status").inner_text().startswith("Reading"))
    until(lambda: page.locator("figcaption", has_text="5,000 points").count() > 0)


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, SCHEMES, strict=True)))
def test_a_run_of_100_000_steps(browser: Any, long_run: tuple[Path, str], width: int, scheme: str) -> None:
    """Fits, is legible, and stays quick: its paths have few points, and it takes a new step within a few seconds."""
    folder, url = long_run
    with opened(browser, url, width=width, scheme=scheme) as page:
        drawn(page)
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        page.locator(".others figure path.line").first.wait_for(state="attached")
        assert overflow(page) == []
        assert low_contrast(page) == []
        lengths = page.eval_on_selector_all(
            "figure path.line", "ps => ps.map((p) => p.getAttribute('d').split('L').length)"
        )
        assert 500 < max(lengths) <= 1030
        assert page.locator("h4", has_text="Load of each expert").count() == 1
        assert page.locator("canvas").count() == 2
        assert page.evaluate(DRAWING_MS) < 2000
        step = int(page.locator(".stage .of").first.inner_text().split()[1].replace(",", ""))
        append(folder / "sft" / "metrics.jsonl", training_row(step + 1, STEPS))
        page.get_by_text(f"step {step + 1:,} of 120,000").first.wait_for()


DRAWING_MS = """() => {
  const start = performance.now();
  document.getElementById("log").click();
  return performance.now() - start;
}"""
"""Milliseconds for drawing all charts of a stage again; about 20 on an idle machine."""


def test_the_curve_is_that_of_the_file(browser: Any, long_run: tuple[Path, str]) -> None:
    """The pointer at the right end shows the last step and its value."""
    with opened(browser, long_run[1]) as page:
        drawn(page)
        chart = page.locator("figure", has_text="Peak memory (GiB)").locator("svg")
        chart.scroll_into_view_if_needed()
        chart.focus()
        page.keyboard.press("ArrowLeft")
        tip = page.locator(".tip").inner_text()
        assert "1.25" in tip
        assert 97_000 < int(tip.split()[1].replace(",", "")) < STEPS


def test_the_page_outlives_the_run_and_its_folder(browser: Any, tmp_path: Path) -> None:
    """It is opened before the run exists; then come a half-written line, the end of the run, and its removal."""
    folder = tmp_path / "later"
    with watching(folder) as server, opened(browser, server.url, width=390) as page:
        page.get_by_text("There is no run in this folder yet").wait_for()
        stage = start(folder, steps=3)
        append(stage / "metrics.jsonl", *(training_row(step, 3) for step in (1, 2)))
        with (stage / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 0.')
        page.get_by_text("step 2 of 3").first.wait_for()
        with (stage / "metrics.jsonl").open("a") as file:
            file.write("5}\n")
        page.get_by_text("step 3 of 3").first.wait_for()
        write(stage / "manifest.json", {"status": "finished", "kind": "sft", "seconds": 75.0})
        page.locator(".stage .time", has_text="1 min 15 s").wait_for()
        shutil.rmtree(folder)
        page.get_by_text("There is no run in this folder yet").wait_for()
        write_ppo(folder)
        page.get_by_text("step 3 of 10").first.wait_for()
        page.get_by_role("heading", name="score 0.500, truncated").first.wait_for()


def test_texts_of_models_stay_texts(browser: Any, tmp_path: Path) -> None:
    write_ppo(tmp_path / "run")
    with watching(tmp_path / "run") as server, opened(browser, server.url) as page:
        page.locator(".samples .text").first.wait_for()
        assert "<script>alert('x')</script>" in page.locator(".samples .text").nth(1).inner_text()
        assert page.locator("main img, main script, header img, header script").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_several_runs_are_on_one_chart(browser: Any, tmp_path: Path, width: int) -> None:
    for name in ("beta=0.1", "beta=0.05", "beta=0.3"):
        append(start(tmp_path / name) / "metrics.jsonl", *(training_row(step, 50) for step in range(1, 31)))
    with watching(tmp_path) as server, opened(browser, server.url, width=width) as page:
        loss = page.locator("figure", has_text="Gradient norm")
        until(lambda: loss.locator("path.line").count() == 3)
        assert loss.locator(".legend span").all_inner_texts() == ["beta=0.05", "beta=0.1", "beta=0.3"]
        colors = page.eval_on_selector_all("#run-rows .dot", "dots => dots.map((dot) => dot.className)")
        assert colors == ["dot m0", "dot m1", "dot m2"]
        page.get_by_label("beta=0.1").uncheck()
        until(lambda: loss.locator("path.line").count() == 2)
        lines = page.eval_on_selector_all(
            "figure path.line", "lines => lines.map((line) => getComputedStyle(line).stroke)"
        )
        assert len(set(lines)) == 2  # each run keeps its colour in all charts
        assert page.locator("#run-rows .dot").nth(2).get_attribute("class") == "dot m2"
        assert overflow(page) == []
        assert low_contrast(page) == []


def test_the_token_is_asked_for_or_is_in_the_address(browser: Any, tmp_path: Path) -> None:
    start(tmp_path / "run")
    with watching(tmp_path / "run", token="right") as server:
        with opened(browser, server.url) as page:
            page.get_by_text("The server requires a token.").wait_for()
            assert page.locator("#main").is_hidden()
            page.get_by_label("Token of the server").fill("wrong")
            page.get_by_role("button", name="Show").click()
            page.get_by_text("This is not the server's token.").wait_for()
            page.get_by_label("Token of the server").fill("right")
            page.keyboard.press("Enter")
            page.get_by_role("heading", name="Stages").wait_for()
        with opened(browser, f"{server.url}#token=right") as page:
            page.get_by_role("heading", name="Stages").wait_for()
            assert page.evaluate("location.hash") == ""


def test_the_page_says_that_the_server_has_ended(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread of a connection that is kept alive would answer until this process ends.
    monkeypatch.setattr(watch_server._Handler, "protocol_version", "HTTP/1.0")
    start(tmp_path / "run")
    with opened_after_end(browser, tmp_path) as page:
        page.get_by_text("The server does not respond").wait_for()
        assert page.get_by_role("heading", name="Stages").is_visible()


@contextmanager
def opened_after_end(browser: Any, folder: Path) -> Iterator[Any]:
    """A page whose server has ended; its failed requests are errors in the console."""
    page = browser.new_page()
    with watching(folder) as server:
        page.goto(server.url)
        page.get_by_role("heading", name="Stages").wait_for()
    yield page
    page.close()
