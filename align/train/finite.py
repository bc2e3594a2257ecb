"""Check that all weights of a model are finite."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import UserError
from align.models.lora.adapters import AnyModel
from align.models.quantized import quantized_weights
from align.parallel.sharding import local_values, world


@torch.no_grad()
def require_finite(model: AnyModel, stage_dir: Path) -> None:
    """Raise `UserError` on every rank if a weight on any rank is not finite; all ranks must call this."""
    device = next(model.parameters()).device
    count = torch.zeros((), dtype=torch.int64, device=device)
    quantized = quantized_weights(model)  # read from a checkpoint whose values were checked
    for parameter in model.parameters():
        if id(parameter) in quantized:
            continue
        count += (~local_values(parameter).isfinite()).sum().to(device)
    if world()[1] > 1:
        dist.all_reduce(count)
    if count:
        raise UserError(
            f"{stage_dir}: {int(count):,} weights are infinite or not a number, so the model is not saved; lower "
            f"stages.{stage_dir.name}.optimizer.learning_rate, and start with --from {stage_dir.name}."
        )
