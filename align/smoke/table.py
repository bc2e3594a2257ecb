"""The table of `align smoke`: checks, verdicts, and the printed rows. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "skipped", "slow", "WRONG"]
ORDER: tuple[Verdict, ...] = ("skipped", "ok", "slow", "WRONG")
"""Verdicts from best to worst. A line has its worst check's verdict, but at best slow if it exceeds its budget."""


@dataclass(frozen=True)
class Check:
    """One row of the table.

    what: what was measured.
    expected: the bound, as text; "(estimate)" marks a bound that was computed rather than measured.
    measured: the measured value, or why the check was skipped.
    """

    what: str
    expected: str
    measured: str
    verdict: Verdict


@dataclass
class LineResult:
    """Result of one line.

    seconds, budget: measured time, and the time that the line should take at most.
    log: file with the line's output.
    machine: device and hardware that the line ran on; empty if the line ended without a result.
    """

    number: int
    title: str
    checks: list[Check]
    seconds: float
    budget: float
    log: str
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        verdicts = [check.verdict for check in self.checks]
        if self.seconds > self.budget and verdicts != ["skipped"]:
            verdicts.append("slow")
        return worst(verdicts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of `verdicts`; WRONG if there are none, because nothing was checked."""
    return max(verdicts, key=ORDER.index, default="WRONG")


def below(what: str, **values: tuple[float, float]) -> Check:
    """A check that is WRONG unless every value is finite and below its bound; `values` are name=(value, bound)."""
    right = all(math.isfinite(value) and value < bound for value, bound in values.values())
    expected = ", ".join(f"{name} < {bound:g}" for name, (_, bound) in values.items())
    measured = ", ".join(f"{name} {value:.2g}" for name, (value, _) in values.items())
    return Check(what, expected, measured, "ok" if right else "WRONG")


def holds(what: str, expected: str, measured: str, right: bool) -> Check:
    """A check that is WRONG unless `right`."""
    return Check(what, expected, measured, "ok" if right else "WRONG")


def fast(what: str, value: float, bound: float | None, unit: str, *, at_most: bool = False) -> Check:
    """A check that is slow if a rate is below its estimated bound, or with `at_most` if a duration is above its bound.

    A value that is not a positive number is WRONG. bound: None if no bound is known for this device.
    """
    measured = f"{number(value)} {unit}"
    if not (math.isfinite(value) and value > 0):
        return Check(what, "a positive number", measured, "WRONG")
    if bound is None:
        return Check(what, "measured only", measured, "ok")
    enough = value <= bound if at_most else value >= bound
    sign = "<=" if at_most else ">="
    return Check(what, f"{sign} {number(bound)} {unit} (estimate)", measured, "ok" if enough else "slow")


def fact(what: str, value: object) -> Check:
    """A row with a property of the machine, without a bound."""
    return Check(what, "", str(value), "ok")


def skipped(what: str, reason: str) -> Check:
    """A check that cannot run on this machine."""
    return Check(what, "", reason, "skipped")


def failed(reason: str) -> Check:
    """The check of a line that ended without a result."""
    return Check("the line ends", "a result", reason, "WRONG")


def number(value: float) -> str:
    """Text of a number: an integer from 100 on, three digits from 0.001 on, below that two digits and an exponent."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rows(result: LineResult, paint: Mapping[Verdict, str] | None = None) -> list[str]:
    """Printed rows of a line: title, time and verdict, then one row per check. paint: coloured text of each verdict."""
    head = f"{result.number}  {result.title}"
    lines = [f"{head:<58}{result.seconds:>6.0f} s of {result.budget:.0f}   {shown(result.verdict, paint)}"]
    for check in result.checks:
        verdict = shown(check.verdict, paint)
        if not check.expected:
            lines.append(f"   {check.what:<32}{check.measured:<64} {verdict}")
        else:
            lines.append(f"   {check.what:<32}{check.expected:<32}{check.measured:<32} {verdict}")
    if result.verdict == "WRONG":
        lines.append(f"   log: {result.log}")
    return lines


def shown(verdict: Verdict, paint: Mapping[Verdict, str] | None) -> str:
    return verdict if paint is None else paint[verdict]
