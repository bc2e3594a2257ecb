"""LoRA adapters (PEFT) on a HunYuan model."""

from __future__ import annotations

from typing import Any

from align.config.parts import Lora

AnyModel = Any
"""A transformers model, perhaps inside a PEFT wrapper, whose attributes a type checker cannot follow."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora_config(lora: Lora, model: AnyModel, *, task: str) -> Any:
    """PEFT's configuration for a HunYuan model; task is CAUSAL_LM or SEQ_CLS (which also trains the score head)."""
    from peft import LoraConfig

    linear = (ATTENTION if lora.attention else []) + (["gate_proj", "up_proj", "down_proj"] if lora.shared_mlp else [])
    names = [name for name, _ in model.named_modules()]
    has_experts = any(name.endswith("mlp.experts") for name in names)
    saved = ["mlp.gate"] if has_experts and lora.train_router else []
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a float
        lora_dropout=lora.dropout,
        bias="none",
        task_type=task,
        target_modules=linear,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        if has_experts and lora.experts
        else None,
        modules_to_save=(saved + (["score"] if task == "SEQ_CLS" else [])) or None,
    )


def add_lora(model: AnyModel, lora: Lora, *, task: str) -> AnyModel:
    """Wrap the model; only adapters (and the router, if asked) train."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(lora, model, task=task))


def merge_lora(model: AnyModel) -> AnyModel:
    """The plain model with the adapters folded into its weights; a plain model is returned as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
