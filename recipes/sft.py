"""Supervised fine-tuning: the assistant's turns, given the rest of the conversation."""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from align.config.stages import SftStage
from align.data import prepare_sft
from align.run.context import StageContext, StageResult
from align.train.checkpoint import count_parameters, load_policy, load_tokenizer, save_model
from align.train.trl import AlignTrainer, fit, trainer_arguments


class AlignSftTrainer(AlignTrainer, SFTTrainer):  # type: ignore[misc]  # both name `optimizer`
    """TRL's SFT trainer on data that is tokenised and masked already."""


def run(stage: SftStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_sft(
        stage.data,
        tokenizer,
        assistant_only_loss=stage.assistant_only_loss,
        seed=context.seed,
        stage_dirs=context.stage_dirs,
    )
    context.say(f"  data: {data.report.summary()}")
    model = load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora)
    parameters = count_parameters(model)
    trainer = AlignSftTrainer(
        stage=stage,
        model=model,
        args=SFTConfig(**trainer_arguments(stage, context), router_aux_loss_coef=0.0, max_length=stage.data.max_length),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
    )
    metrics = fit(trainer, context)
    save_model(trainer.model, tokenizer, context.dir, context.recipe.dtype, context.recipe.parallel)
    return StageResult(metrics, data.report.to_dict(), parameters)
