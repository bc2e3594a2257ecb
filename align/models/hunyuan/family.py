"""The `Family` of HunYuan models."""

from __future__ import annotations

from align.models.family import Family, LoraTargets, RoutedLayer
from align.models.hunyuan import layout
from align.models.hunyuan.checkpoint import conversion
from align.models.hunyuan.configuration import HunYuanConfig, size_problem
from align.models.hunyuan.layout import STACKS, published_shapes
from align.models.hunyuan.modeling import HunYuanForCausalLM, HunYuanForSequenceClassification, HunYuanModel
from align.models.hunyuan.vllm_plugin import prepare

LORA = LoraTargets(
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    experts=tuple(f"mlp.experts.{stack}" for stack in STACKS),
    router=("mlp.gate",),
)
HUNYUAN = Family(
    config=HunYuanConfig,
    trunk=HunYuanModel,
    policy=HunYuanForCausalLM,
    scorer=HunYuanForSequenceClassification,
    names=lambda _: layout,
    published_shapes=published_shapes,
    layers=lambda config: [
        RoutedLayer(config.experts_in(layer), config.top_k_in(layer)) for layer in range(config.num_hidden_layers)
    ],
    size_problem=size_problem,
    lora=lambda _: LORA,
    prepare_vllm=prepare,
    conversion=conversion,
    serves_expert_adapters=True,
)
