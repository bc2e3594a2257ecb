"""Markdown tables and their cells."""

from __future__ import annotations

from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(value: Any) -> str:
    """A number with two digits, or the reason why there is none; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def interval(found: dict[str, Any], sign: str = "") -> str:
    """A mean with its interval, if it has one. sign: "+" prints the sign of positive numbers too."""
    if found["low"] is None:
        return f"{found['mean']:{sign}.3f}"
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"
