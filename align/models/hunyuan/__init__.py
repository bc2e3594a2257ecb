"""The Hunyuan-Large family, as transformers models."""

from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.modeling import (
    HunYuanCausalLMOutput,
    HunYuanForCausalLM,
    HunYuanForSequenceClassification,
    HunYuanModel,
)

__all__ = [
    "HunYuanCausalLMOutput",
    "HunYuanConfig",
    "HunYuanForCausalLM",
    "HunYuanForSequenceClassification",
    "HunYuanModel",
]
