"""Curves of any length in bounded memory: blocks of neighbouring points, each with its smallest and largest value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.eval.report.smoothing import smoothing_window

BLOCKS = 256
"""A curve with at least this many points has from this many to twice as many blocks."""
LOW_STEP, LOW, HIGH_STEP, HIGH, SUM, END = range(6)
"""Columns of a block: smallest and largest value with their steps, sum, last step."""

Floats = NDArray[np.float64]


class Drawn(NamedTuple):
    """A decimated curve.

    steps, values: logged points by step, including the extremes of every block.
    smooth: (steps, running means) of a rough curve; None otherwise.
    window: points of the running mean; 0 without one.
    """

    steps: Floats
    values: Floats
    smooth: tuple[Floats, Floats] | None
    window: int


class Curve:
    """The values of one metric by step.

    A block has `width` points. When there are twice `BLOCKS` blocks, they are merged in pairs, so that memory does not
    depend on the length of the run, and blocks that are complete never change.

    not_finite: number of values that are NaN or infinite. They are not drawn.
    """

    def __init__(self) -> None:
        self.not_finite = 0
        self.width = 1
        self._first: Floats = np.empty((0, 2))  # (step, value) of the first point
        self._blocks: Floats = np.empty((0, 6))
        self._rest: Floats = np.empty((0, 2))  # points after the last block, at least one
        self._travel = 0.0

    @property
    def count(self) -> int:
        """Number of finite points."""
        return len(self._blocks) * self.width + len(self._rest)

    @property
    def last_step(self) -> float:
        return float(self._rest[-1, 0])

    def extend(self, steps: Sequence[float], values: Sequence[float]) -> None:
        """Add points ordered by step.

        If a step is logged twice, its later value counts. Points before the last step are ignored.
        """
        added = np.array([steps, values], dtype=float).T
        finite = np.isfinite(added).all(axis=1)
        self.not_finite += int((~finite).sum())
        points = np.concatenate([self._rest, added[finite]])
        points = points[points[:, 0] >= np.maximum.accumulate(points[:, 0])]
        points = points[np.append(points[1:, 0] != points[:-1, 0], True)[: len(points)]]
        if not len(self._first):
            self._first = points[:1]
        while True:
            # The last point may still be replaced, so it is not put into a block.
            blocks = min((len(points) - 1) // self.width, 2 * BLOCKS - len(self._blocks))
            if blocks < 1:
                break
            end = blocks * self.width
            self._travel += float(np.abs(np.diff(points[: end + 1, 1])).sum())
            self._blocks = np.concatenate([self._blocks, _blocks(points[:end].reshape(blocks, self.width, 2))])
            points = points[end:]
            if len(self._blocks) == 2 * BLOCKS:
                self._blocks, self.width = _merged(self._blocks), 2 * self.width
        self._rest = points

    def means(self) -> tuple[Floats, Floats]:
        """(last step, mean) of every block. Metrics that are logged on the same lines have the same steps."""
        blocks, counts = self._all_blocks()
        return blocks[:, END], blocks[:, SUM] / counts

    def drawn(self) -> Drawn:
        """The curve with at most 2 * (2 * BLOCKS + 2) points."""
        blocks, counts = self._all_blocks()
        extremes = blocks[:, : HIGH + 1].reshape(-1, 2)
        points = np.concatenate([self._first, extremes, self._rest[-1:]])
        _, kept = np.unique(points[:, 0], return_index=True)  # sorted by step
        steps, values = points[kept].T
        if not len(steps):
            return Drawn(steps, values, None, 0)
        span = float(blocks[:, HIGH].max() - blocks[:, LOW].min())
        travel = self._travel + float(np.abs(np.diff(self._rest[:, 1])).sum())
        window = smoothing_window(self.count, travel, span)
        smooth = running_mean(blocks, counts, round(window / self.width)) if window else None
        return Drawn(steps, values, smooth, window)

    def _all_blocks(self) -> tuple[Floats, Floats]:
        """(blocks, number of points in each); the points after the last block form a further one."""
        if not len(self._rest):
            return self._blocks, np.empty(0)
        counts = np.append(np.full(len(self._blocks), float(self.width)), float(len(self._rest)))
        return np.concatenate([self._blocks, _blocks(self._rest[None])]), counts


def running_mean(blocks: Floats, counts: Floats, window: int) -> tuple[Floats, Floats]:
    """(last step, mean over the block and those before it) of every block. window: number of blocks."""
    ends = np.arange(1, len(blocks) + 1)
    starts = np.maximum(ends - max(1, window), 0)
    sums, numbers = (np.concatenate([[0.0], np.cumsum(of)]) for of in (blocks[:, SUM], counts))
    return blocks[:, END], (sums[ends] - sums[starts]) / (numbers[ends] - numbers[starts])


def _blocks(points: Floats) -> Floats:
    """One block per row of points [blocks, width, 2]."""
    every = np.arange(len(points))
    values = points[:, :, 1]
    low, high = points[every, values.argmin(axis=1)], points[every, values.argmax(axis=1)]
    return np.column_stack([low, high, values.sum(axis=1), points[:, -1, 0]])


def _merged(blocks: Floats) -> Floats:
    """Merge neighbouring blocks in pairs."""
    first, second = blocks[::2], blocks[1::2]
    lower, higher = second[:, LOW] < first[:, LOW], second[:, HIGH] > first[:, HIGH]
    return np.column_stack(
        [
            np.where(lower[:, None], second[:, [LOW_STEP, LOW]], first[:, [LOW_STEP, LOW]]),
            np.where(higher[:, None], second[:, [HIGH_STEP, HIGH]], first[:, [HIGH_STEP, HIGH]]),
            first[:, SUM] + second[:, SUM],
            second[:, END],
        ]
    )
