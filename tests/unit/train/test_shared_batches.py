"""The distribution of an epoch's micro-batches over ranks changes no optimizer step."""

from __future__ import annotations

import pytest
import torch

from align.train.shared_batches import ROW_WEIGHT, SharedBatches, SharedLoader, gather_uneven


class Order(list):
    def set_epoch(self, epoch: int) -> None:
        self[:] = self[epoch:] + self[:epoch]


def epoch(rows: int, ranks: int, micro_batches: int = 4, micro_batch_size: int = 2) -> list[list]:
    return [
        list(
            SharedBatches(
                Order(range(rows)),
                micro_batch_size=micro_batch_size,
                micro_batches=micro_batches,
                rank=rank,
                ranks=ranks,
            )
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rows", range(1, 34))
def test_each_step_has_the_mean_gradient_of_one_process(rows: int, ranks: int) -> None:
    """The gradient of a micro-batch or a step is represented by the mean of `value` over its rows."""
    value = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))

    def micro(batch: list) -> float:
        return value[[row for row, _ in batch]].mean().item()

    (single,), shared = epoch(rows, 1), epoch(rows, ranks)
    assert len({len(batches) for batches in shared}) == 1, "a rank would wait for one that has finished its epoch"
    per_rank = 4 // ranks
    for step, start in enumerate(range(0, len(single), 4)):
        rows_of_step = [row for batch in single[start : start + 4] for row, _ in batch]
        several = [
            [batch[0][1] * micro(batch) for batch in batches[step * per_rank : (step + 1) * per_rank]]
            for batches in shared
        ]
        mean_over_ranks = sum(sum(values) / len(values) for values in several) / ranks
        assert mean_over_ranks == pytest.approx(value[rows_of_step].mean().item(), rel=1e-12)
    counted = sorted(row for batches in shared for batch in batches for row, share in batch if share)
    assert counted == list(range(rows))


def test_the_number_of_batches_and_the_epoch() -> None:
    batches = SharedBatches(Order(range(11)), micro_batch_size=2, micro_batches=4, rank=1, ranks=2)
    assert len(batches) == len(list(batches))
    first = [row for row, _ in next(iter(batches))]
    batches.set_epoch(3)
    assert [row for row, _ in next(iter(batches))] == [row + 3 for row in first]


def test_a_repeated_batch_has_weight_0_and_no_labels() -> None:
    rows = [{"labels": row} for row in range(2)]

    def collate(batch: list[dict]) -> dict:
        return {"labels": torch.tensor([row["labels"] for row in batch])}

    loaders = [
        SharedLoader(
            rows,
            SharedBatches(Order(range(2)), micro_batch_size=2, micro_batches=2, rank=rank, ranks=2),
            collate,
        )
        for rank in range(2)
    ]
    ((first,), (second,)) = map(list, loaders)
    assert first["labels"].tolist() == [0, 1]
    assert first[ROW_WEIGHT] == 2.0
    assert second["labels"].tolist() == [-100, -100]
    assert second[ROW_WEIGHT] == 0.0


def test_tensors_of_different_lengths_are_gathered() -> None:
    """`gather` stands in for two ranks; the other rank always has the values 7, 7, 7."""

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        other = torch.tensor([3]) if tensor.dtype == torch.int64 else torch.zeros_like(tensor)
        if tensor.dtype != torch.int64:
            other[:3] = 7.0
        return torch.cat([tensor, other])

    assert gather_uneven(gather)(torch.tensor([1.0])).tolist() == [1.0, 7.0, 7.0, 7.0]
    assert gather_uneven(lambda scalar: scalar.view(1))(torch.tensor(2.0)).tolist() == [2.0]
