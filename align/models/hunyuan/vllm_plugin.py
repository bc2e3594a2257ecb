"""HunYuan in vLLM."""

from __future__ import annotations

from importlib.metadata import EntryPoint

ARCHITECTURE = "HunYuanForCausalLM"


def prepare() -> None:
    """Register the model class in this process. For a class registered by name, vLLM would start a second process to
    inspect it."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from align.models.hunyuan.configuration import HunYuanConfig
    from align.models.hunyuan.vllm import HunYuanForCausalLM

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, HunYuanForCausalLM)


def register() -> None:
    """Run the plugin from an installation whose metadata names this function as the entry point."""
    EntryPoint("align", "align.rollout.vllm_plugin:register", "vllm.general_plugins").load()()
