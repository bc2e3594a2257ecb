"""Pages in a headless Chromium. `opened` fails if the page logs an error or requests anything but itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium of this machine; skips the test if there is none. Nothing is downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'align-moe[dev]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install the package `chromium` of the distribution")
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium's own sandbox refuses to start as root
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """The page of a file. width: of the window in pixels. scheme: `light` or `dark`."""
    phone = width < 600
    context = browser.new_context(
        viewport={"width": width, "height": 844 if phone else 900}, color_scheme=scheme, has_touch=phone
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors, requests = recorded(page)
    try:
        page.goto(file.as_uri())
        yield page
        assert not errors, errors
        assert requests == [file.as_uri()], requests
    finally:
        context.close()


def recorded(page: Any) -> tuple[list[str], list[str]]:
    """(errors and warnings, addresses of requests) of a page; both lists grow while the page is used."""
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    return errors, requests


def overflow(page: Any) -> list[str]:
    """Elements that reach beyond the window, except those in a box that scrolls."""
    found: list[str] = page.evaluate(OVERFLOW)
    return found


def low_contrast(page: Any) -> list[str]:
    """Texts whose contrast is below WCAG's 4.5, or 3 for large text. Texts on drawings are not measured."""
    found: list[str] = page.evaluate(CONTRAST)
    return found


OVERFLOW = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push(`page: ${document.documentElement.scrollWidth}`);
  for (const node of document.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (!box.width || (box.right <= width + 0.5 && box.left >= -0.5)) continue;
    let around = node.parentElement;
    while (around && getComputedStyle(around).overflowX === "visible") around = around.parentElement;
    const name = `${node.tagName}.${node.className}: ${box.left} to ${box.right}`;
    if (!around || around === document.body) found.push(name);
  }
  return found;
}"""

CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const layers = [];
    for (let around = node; around; around = around.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(around).backgroundColor);
      layers.push([[r, g, b], a]);
      if (a === 1) break;
    }
    return layers.reduceRight((under, [over, a]) => over.map((c, k) => a * c + (1 - a) * under[k]), [255, 255, 255]);
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || node.disabled || node.closest("script, noscript")) continue;
    if (node.closest("svg") && node.closest("g")?.querySelector("rect")) continue;
    const style = getComputedStyle(node);
    const ink = channels(node.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [light, dark] = [luminance(ink), luminance(behind(node))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const name = `${node.tagName}.${node.className}: ${ratio.toFixed(2)}: ${node.textContent.slice(0, 40)}`;
    if (ratio < (large ? 3 : 4.5)) found.push(name);
  }
  return found;
}"""
