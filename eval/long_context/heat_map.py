"""The grid as SVG: one row for each depth, one column for each length. Right on a light and on a dark page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from align.eval.long_context.grid import Cell

WIDTH, HEIGHT, LEFT, TOP = 56, 34, 60, 26
"""Size of a cell, and of the margins for the labels, in pixels."""
LOW, HIGH = (0x8C, 0x2D, 0x04), (0xD9, 0xEF, 0xFB)
"""Colours of the scores 0 and 1; they differ in lightness, so that they are told apart without colour."""
STYLE = (
    ".heat text{font:12px system-ui,sans-serif;fill:#2a2e33}.heat .soft{fill:#4b5057}"
    ".heat .light{fill:#fff}.heat .dark{fill:#000}"
    "@media(prefers-color-scheme:dark){.heat text{fill:#e4e6e9}.heat .soft{fill:#b3b8bf}"
    ".heat .light{fill:#fff}.heat .dark{fill:#000}}"
)


def heat_map(cells: Sequence[Cell], title: str) -> str:
    """SVG of the cells of one task and language. A cell without a score is hatched and says why."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells}, key=lambda depth: -1.0 if depth is None else depth)
    width, height = LEFT + WIDTH * len(lengths) + 6, TOP + HEIGHT * len(depths) + 6
    parts = [
        f'<svg class="heat" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{html.escape(title, quote=True)}">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        '<defs><pattern id="none" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<path d="M0 6L6 0" stroke="#8a9099"/></pattern></defs>',
    ]
    parts.append(_text(LEFT - 8, TOP - 9, "tokens", "soft", "end"))
    for column, length in enumerate(lengths):
        parts.append(_text(LEFT + WIDTH * (column + 0.5), TOP - 9, f"{length:,}", "soft", "middle"))
    for row, depth in enumerate(depths):
        label = "all" if depth is None else f"{depth:g} %"
        parts.append(_text(LEFT - 8, TOP + HEIGHT * (row + 0.5) + 4, label, "soft", "end"))
    for cell in cells:
        x, y = LEFT + WIDTH * lengths.index(cell.length), TOP + HEIGHT * depths.index(cell.depth)
        parts.append(_cell(cell, x, y))
    parts.append("</svg>")
    return "".join(parts)


def _cell(cell: Cell, x: int, y: int) -> str:
    summary = cell.summary
    where = f"{cell.length:,} tokens" + ("" if cell.depth is None else f", depth {cell.depth:g} %")
    box = f'x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="3"'
    if summary.mean is None:
        said = f"{where}: no score, {summary.unscored} unscored"
        return f'<g><title>{said}</title><rect {box} fill="url(#none)"/></g>'
    ends = "" if summary.low is None else f", 95 % interval {summary.low:.2f} to {summary.high:.2f}"
    unscored = f", {summary.unscored} unscored" if summary.unscored else ""
    said = f"{where}: {summary.mean:.2f}{ends}, n {summary.n}{unscored}"
    color = tuple(round(low + (high - low) * min(max(summary.mean, 0), 1)) for low, high in zip(LOW, HIGH, strict=True))
    ink = "dark" if _luminance(color) > 0.18 else "light"
    mark = "*" if summary.unscored else ""
    number = _text(x + WIDTH / 2, y + HEIGHT / 2 + 4, f"{summary.mean:.2f}{mark}", ink, "middle")
    return f'<g><title>{said}</title><rect {box} fill="#{color[0]:02x}{color[1]:02x}{color[2]:02x}"/>{number}</g>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _luminance(color: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour, from 0 to 1 (WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
