"""Entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

from contextlib import suppress

ARCHITECTURE = "HunYuanForCausalLM"
TRANSFERS = {"align_host": "HostTransfer", "align_nccl": "LiveNccl", "align_ipc": "LiveIpc"}
"""Weight-transfer engines, vLLM's name of each and the class in `vllm_transfer`."""


def register() -> None:
    """Tell vLLM where HunYuan's configuration, model class and weight transfers are; they are imported when needed."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from align.models.hunyuan.configuration import HunYuanConfig

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "align.models.hunyuan.vllm:HunYuanForCausalLM")
    for name, engine in TRANSFERS.items():
        with suppress(ValueError):  # registered before in this process
            WeightTransferEngineFactory.register_engine(name, "align.rollout.sync.vllm_side", engine)
