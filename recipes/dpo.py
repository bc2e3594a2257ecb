"""Direct preference optimisation: prefer the chosen answer, measured against the parent model."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

from align.config.stages import DpoStage
from align.data import prepare_dpo_pairs
from align.models.lora.adapters import AnyModel, one_adapter
from align.run.context import StageContext, StageResult
from align.train.checkpoint import count_parameters, load_policy, load_tokenizer, save_model
from align.train.trl import AlignTrainer, fit, trainer_arguments


class AlignDpoTrainer(AlignTrainer, DPOTrainer):  # type: ignore[misc]  # both name `optimizer`
    """TRL's DPO trainer on pairs that are tokenised already."""

    def __init__(self, *, model: AnyModel, **kwargs: Any):
        with one_adapter(model):
            super().__init__(model=model, **kwargs)


def run(stage: DpoStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_dpo_pairs(stage.data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs)
    context.say(f"  data: {data.report.summary()}")
    model = load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora)
    # With adapters the reference is the model with its adapters off; without them it is a second copy.
    ref_model = None if stage.lora else load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel)
    parameters = count_parameters(model)
    losses: dict[str, Any] = (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, stage.sft_coef]} if stage.sft_coef else {}
    )
    trainer = AlignDpoTrainer(
        stage=stage,
        model=model,
        ref_model=ref_model,
        args=DPOConfig(
            **trainer_arguments(stage, context),
            router_aux_loss_coef=0.0,
            beta=stage.beta,
            max_length=stage.data.max_length,
            **losses,
        ),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
    )
    metrics = fit(trainer, context)
    save_model(trainer.model, tokenizer, context.dir, context.recipe.dtype, context.recipe.parallel)
    return StageResult(metrics, data.report.to_dict(), parameters)
