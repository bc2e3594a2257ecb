"""Register HunYuan with vLLM."""

from __future__ import annotations

from importlib.metadata import EntryPoint

ARCHITECTURE = "HunYuanForCausalLM"


def prepare() -> None:
    """Register the model class in this process.

    The class itself is registered, because vLLM would start a second process to inspect a class registered by name.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from align.models.hunyuan.configuration import HunYuanConfig
    from align.models.hunyuan.vllm import HunYuanForCausalLM

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, HunYuanForCausalLM)


def register() -> None:
    """Call `align.rollout.vllm_plugin.register`, for an installation whose metadata still names this entry point."""
    EntryPoint("align", "align.rollout.vllm_plugin:register", "vllm.general_plugins").load()()
