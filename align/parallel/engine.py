"""DeepSpeed engines for align's own training loop, which decides itself when a step's gradients are complete."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import nn

from align.config.parallel import Parallel
from align.parallel.deepspeed_config import deepspeed_config


class FunctionOfModel(nn.Module):
    """Root module whose forward pass calls any function of the model.

    DeepSpeed runs its hooks only in the root module's forward pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Any, *arguments: Any, **options: Any) -> Any:
        return function(self.model, *arguments, **options)


def training_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel, *, max_grad_norm: float, dtype: str
) -> Any:
    """Build an engine: `engine(function, ...)` returns function(model, ...), and gradients accumulate until `step`."""
    config = deepspeed_config(parallel, micro_batch_size=1, accumulation=1, max_grad_norm=max_grad_norm, dtype=dtype)
    config["managed_gradient_accumulation"] = False
    config["bf16"]["check_grad_overflow"] = True
    engine, *_ = deepspeed.initialize(model=FunctionOfModel(model), optimizer=optimizer, config=config)
    return engine


def inference_engine(model: nn.Module, parallel: Parallel, *, dtype: str) -> Any:
    """Build an engine for a frozen model; it is called like the engine of `training_engine`."""
    config = deepspeed_config(parallel, micro_batch_size=1, accumulation=1, max_grad_norm=0.0, dtype=dtype)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if parallel.zero_stage < 3:
        config["zero_optimization"] = {"stage": 0}
    engine, *_ = deepspeed.initialize(model=FunctionOfModel(model), config=config)
    engine.eval()
    return engine


def discard_gradients(engine: Any) -> None:
    """Discard the gradients since the last step, as DeepSpeed does after an overflow. All ranks must call this."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        engine.zero_grad()
        return
    optimizer.zero_grad()
    optimizer.reset_cpu_buffers()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer._release_preflattened_grad_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
