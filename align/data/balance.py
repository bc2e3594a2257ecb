"""Numbers of desirable and undesirable rows, and the weights that balance them in KTO's loss."""

from __future__ import annotations

from align.config.stages import KtoStage
from align.errors import UserError

LARGEST = 4 / 3
"""Largest advised ratio of the weighted numbers of desirable and undesirable rows; the smallest is 1."""


def require_both_labels(stage: KtoStage, desirable: int, undesirable: int) -> None:
    """Raise `UserError` if all rows have the same label, unless the weight of the other label is 0."""
    for rows, own, other in ((desirable, "desirable", "undesirable"), (undesirable, "undesirable", "desirable")):
        if rows == desirable + undesirable and getattr(stage, f"{other}_weight"):
            raise UserError(
                f"data.train: all {rows:,} rows are {own}, but KTO compares desirable with undesirable completions. "
                f"Check the column label or kto_tag, or set {other}_weight to 0 to train on {own} rows alone."
            )


def weight_note(stage: KtoStage, desirable: int, undesirable: int) -> str | None:
    """Advice if the labels are not balanced; None if they are, or if a weight is 0.

    Ethayarajh et al. (arXiv 2402.01306, equation 8) advise that the number of desirable rows times their weight be 1 to
    4/3 times that of the undesirable rows.
    """
    good, bad = desirable * stage.desirable_weight, undesirable * stage.undesirable_weight
    if not (good and bad) or 1 <= good / bad <= LARGEST:
        return None
    return (
        f"desirable rows have {good / bad:.2f} times the weight of undesirable ones; KTO's authors advise 1 to "
        f"{LARGEST:.2f}: set desirable_weight to {_range(bad / desirable, LARGEST)}, or undesirable_weight to "
        f"{_range(good / undesirable / LARGEST, LARGEST)}"
    )


def _range(smallest: float, factor: float) -> str:
    return f"{smallest:.3g} to {smallest * factor:.3g}"
