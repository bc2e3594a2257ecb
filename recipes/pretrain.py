"""Pre-training: next-token prediction on packed text."""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from align.config.stages import PretrainStage
from align.data.prepare import prepare_text
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.fit import train_and_save
from align.train.trl import AlignTrainer, trainer_arguments


class PretrainTrainer(AlignTrainer, SFTTrainer):  # type: ignore[misc]  # both have an attribute `optimizer`
    """TRL's SFT trainer with a loss on every token."""


def run(stage: PretrainStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_text(stage.data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs)
    context.say(f"  data: {data.report.summary()}")
    trainer = PretrainTrainer(
        stage=stage,
        model=load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora),
        args=SFTConfig(**trainer_arguments(stage, context), router_aux_loss_coef=0.0, max_length=stage.data.max_length),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context)
