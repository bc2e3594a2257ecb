"""HunYuan as a model family."""

from __future__ import annotations

from align.models.family import Family, LoraTargets
from align.models.hunyuan.checkpoint import conversion
from align.models.hunyuan.configuration import HunYuanConfig, size_problem
from align.models.hunyuan.layout import STACKS, place, published, published_shapes
from align.models.hunyuan.modeling import HunYuanForCausalLM, HunYuanForSequenceClassification, HunYuanModel
from align.models.hunyuan.vllm_plugin import prepare

HUNYUAN = Family(
    config=HunYuanConfig,
    trunk=HunYuanModel,
    policy=HunYuanForCausalLM,
    scorer=HunYuanForSequenceClassification,
    place=place,
    published=published,
    conversion=conversion,
    published_shapes=published_shapes,
    size_problem=size_problem,
    lora=LoraTargets(
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=("gate_proj", "up_proj", "down_proj"),
        experts=tuple(f"mlp.experts.{stack}" for stack in STACKS),
        router=("mlp.gate",),
    ),
    prepare_vllm=prepare,
)
