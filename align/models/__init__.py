"""Models. Importing this registers HunYuan with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.models.hunyuan import (
    HunYuanConfig,
    HunYuanForCausalLM,
    HunYuanForSequenceClassification,
    HunYuanModel,
)
from align.models.hunyuan.checkpoint import register_published_layout

AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
AutoModel.register(HunYuanConfig, HunYuanModel, exist_ok=True)
AutoModelForCausalLM.register(HunYuanConfig, HunYuanForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HunYuanConfig, HunYuanForSequenceClassification, exist_ok=True)
register_published_layout()
