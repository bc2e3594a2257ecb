"""Checks of labelled rows: numbers of each label, the weights that balance them in KTO's loss, and their prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np

from align.config.stages import KtoStage
from align.data.store.tokenised import Rows, list_hashes, list_lengths, single_values
from align.errors import UserError

LARGEST = Fraction(4, 3)
"""Largest advised ratio of the weighted numbers of desirable and undesirable rows; the smallest is 1."""


def require_both_labels(stage: KtoStage, desirable: int, undesirable: int) -> None:
    """Raise `UserError` if all rows have the same label, unless the weight of the other label is 0."""
    for rows, own, other in ((desirable, "desirable", "undesirable"), (undesirable, "undesirable", "desirable")):
        if rows == desirable + undesirable and getattr(stage, f"{other}_weight"):
            which = "the only row is" if rows == 1 else f"all {rows:,} rows are"
            raise UserError(
                f"data.train: {which} {own}, but KTO compares desirable with undesirable completions. "
                f"Check the column label or kto_tag, or set {other}_weight to 0 to train on {own} rows alone."
            )


def weight_note(stage: KtoStage, desirable: int, undesirable: int) -> str | None:
    """Advice if the labels are not balanced, or the number of rows whose weight is 0; None if neither applies.

    Ethayarajh et al. (arXiv 2402.01306, equation 8) advise that the number of desirable rows times their weight be 1 to
    4/3 times that of the undesirable rows.
    """
    for rows, label in ((desirable, "desirable"), (undesirable, "undesirable")):
        if rows and not getattr(stage, f"{label}_weight"):
            return f"{label}_weight is 0, so {rows:,} {label} row{'s train' if rows > 1 else ' trains'} nothing"
    # Fractions of the decimals in the recipe: in floating point, a rounded limit could be refused.
    good = desirable * Fraction(str(stage.desirable_weight))
    bad = undesirable * Fraction(str(stage.undesirable_weight))
    if not (good and bad) or 1 <= good / bad <= LARGEST:
        return None
    ratio = _decimal(good / bad, math.floor if good < bad else math.ceil)
    return (
        f"desirable rows have {ratio} times the weight of undesirable ones; KTO's authors advise 1 to "
        f"{float(LARGEST):.2f}: set desirable_weight to {_range(bad / desirable)}, or undesirable_weight to "
        f"{_range(good / undesirable / LARGEST)}"
    )


def prompt_note(stage: KtoStage, rows: Rows) -> str | None:
    """Note that the loss's estimate of the KL is always 0, if all rows have the same prompt."""
    if not stage.needs_kl:
        return None
    if any(len(np.unique(found(rows, "prompt_ids"))) > 1 for found in (list_lengths, list_hashes)):
        return None
    return (
        "all rows have the same prompt, so the estimate of the KL, which needs completions of other prompts, is always "
        "0; add rows with other prompts, or set loss_type to apo_zero_unpaired"
    )


def held_out_note(rows: Rows) -> str | None:
    """Note that `eval_` metrics are missing, if all held-out rows have the same label."""
    labels = np.unique(single_values(rows, "label"))
    if len(labels) > 1:
        return None
    own, other = ("desirable", "undesirable") if labels[0] else ("undesirable", "desirable")
    return (
        f"all held-out rows are {own}, so the eval_ metrics of {other} completions and of the margin are missing; hold "
        "out rows of both labels"
    )


def _range(smallest: Fraction) -> str:
    """Weights from `smallest` to `LARGEST` times it, rounded inwards."""
    return f"{_decimal(smallest, math.ceil)} to {_decimal(smallest * LARGEST, math.floor)}"


def _decimal(value: Fraction, rounded: Callable[[Fraction], int]) -> str:
    """At least three significant digits, without an exponent. rounded: rounds to an integer."""
    digits = max(0, 2 - math.floor(math.log10(value)))
    return format(Decimal(rounded(value * 10**digits)).scaleb(-digits).normalize(), "f")
