"""Numbers, durations and sampled text as a report shows them, the same in Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

NOTHING = "–"
"""Shown for an unknown value."""
NOT_FINITE = "not finite"
"""Shown for NaN and infinity."""


def number(value: Any, *, signed: bool = False) -> str:
    """A number for display, for example 12,345, 123.4, 1.23, 0.123 or 3.0e-06."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING if value is None else str(value)
    if not math.isfinite(value):
        return NOT_FINITE
    sign = "+" if signed and value > 0 else ""
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        text = f"{int(value):,}"
    elif value == 0:
        text = "0"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) >= 100:
        text = f"{value:.1f}"
    elif abs(value) >= 1:
        text = f"{value:.2f}"
    elif abs(value) >= 1e-3:
        text = f"{value:.3f}"
    else:
        text = f"{value:.1e}"
    return (sign + text).replace("-", "−") if "e" not in text else sign + text


def mean(cell: dict[str, Any], *, signed: bool = False) -> str:
    """The mean of a cell of the comparison."""
    return NOT_FINITE if cell.get("not_finite") else number(cell["mean"], signed=signed)


def interval(cell: Mapping[str, Any] | None) -> str:
    """The ends of a cell's interval as [low, high]; empty if the cell has no interval."""
    if not cell or cell.get("low") is None:
        return ""
    return f"[{number(cell['low'])}, {number(cell['high'])}]"


def certainty(cell: dict[str, Any]) -> str:
    """The p-value of a difference, and the smallest difference that its test detects in four of five cases."""
    if cell.get("p_value") is None:
        return ""
    detects = "" if cell.get("detectable") is None else f", detects {number(cell['detectable'])}"
    return f" p {number(cell['p_value'])}{detects}"


def mark(cell: dict[str, Any]) -> str:
    """Sign of a difference: ▲ if its interval is above zero, ▼ if below, ≈ if it includes zero, ? without interval."""
    if cell.get("low") is None:
        return "?"
    return "▲" if cell["low"] > 0 else "▼" if cell["high"] < 0 else "≈"


def duration(seconds: Any) -> str:
    """Seconds as text: 8.2 s, 3 min 05 s, 2 h 07 min."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(text: Any) -> str:
    """Text that a UTF-8 file and a browser can show: control characters and lone surrogates are replaced.

    A list of messages becomes one paragraph per turn.
    """
    if isinstance(text, list):
        return "\n\n".join(f"{turn.get('role', '?')}: {plain(turn.get('content', ''))}" for turn in text)
    cleaned = "" if text is None else str(text)
    cleaned = cleaned.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "�" for c in cleaned)


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their dotted names."""
    if isinstance(values, dict):
        children: Any = values.items()
    elif isinstance(values, list):
        children = [(_label(i, child), child) for i, child in enumerate(values)]
    else:
        yield prefix, values
        return
    for key, child in children:
        yield from flat(child, f"{prefix}.{key}" if prefix else str(key))


def _label(position: int, child: Any) -> str:
    return str(child["name"]) if isinstance(child, dict) and "name" in child else str(position)
