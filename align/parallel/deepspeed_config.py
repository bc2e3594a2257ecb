"""Translate the recipe's `parallel` section to DeepSpeed's configuration. Does not import DeepSpeed."""

from __future__ import annotations

from typing import Any

from align.config.parallel import Parallel
from align.config.paths import local_path

BUCKET = 50_000_000
"""Elements per all-gather or reduction. DeepSpeed's default of 500 million takes 2 GB per buffer in float32."""


def deepspeed_config(
    parallel: Parallel, *, micro_batch_size: int, accumulation: int, max_grad_norm: float, dtype: str
) -> dict[str, Any]:
    """DeepSpeed's configuration for a model.

    Optimizer, schedule and expert parallelism are not part of it: `align.train.optimizer` builds the first two, and
    `align.parallel.experts` assigns parameters to process groups.
    """
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "contiguous_gradients": True,
    }
    if parallel.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            # DeepSpeed gathers persistent parameters together, but parameters of different groups must not be mixed.
            "stage3_param_persistence_threshold": 0,
        }
    offload = parallel.offload
    for key, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if device is not None:
            zero[key] = {"device": device, "pin_memory": True}
            if device == "nvme":
                zero[key]["nvme_path"] = str(local_path(str(offload.path)))
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * parallel.processes,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        # Use torch's AdamW under CPU offload as well, because DeepSpeed's CPU Adam needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
