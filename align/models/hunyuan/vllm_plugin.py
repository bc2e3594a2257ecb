"""HunYuan in vLLM. vLLM calls `register`, the entry point `vllm.general_plugins`, in each of its processes.

Heavy imports are inside the functions: vLLM loads this module in processes that may never run the model.
"""

from __future__ import annotations

from contextlib import suppress

ARCHITECTURE = "HunYuanForCausalLM"
TRANSFERS = {"align_host": "HostTransfer", "align_nccl": "LiveNccl", "align_ipc": "LiveIpc"}
"""Weight-transfer engines: {name in vLLM: class in `align.rollout.sync.vllm_side`}."""


def register() -> None:
    """Register HunYuan's configuration, model class and weight transfers by name; vLLM imports them when needed."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from align.models.hunyuan.configuration import HunYuanConfig

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "align.models.hunyuan.vllm:HunYuanForCausalLM")
    for name, engine in TRANSFERS.items():
        with suppress(ValueError):  # already registered in this process
            WeightTransferEngineFactory.register_engine(name, "align.rollout.sync.vllm_side", engine)


def prepare() -> None:
    """Register the model class itself for an engine in this process. For a class registered by name, vLLM would start a
    second process to inspect it."""
    from vllm import ModelRegistry

    from align.models.hunyuan.vllm import HunYuanForCausalLM

    register()
    ModelRegistry.register_model(ARCHITECTURE, HunYuanForCausalLM)
