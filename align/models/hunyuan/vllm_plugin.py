"""Entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

ARCHITECTURE = "HunYuanForCausalLM"


def register() -> None:
    """Tell vLLM where HunYuan's configuration and model class are; the class is imported when needed."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from align.models.hunyuan.configuration import HunYuanConfig

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "align.models.hunyuan.vllm:HunYuanForCausalLM")
