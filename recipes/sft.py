"""Supervised fine-tuning on conversations; by default only the assistant's turns are in the loss."""

from __future__ import annotations

from align.config.stages import SftStage
from align.data.prepare import prepare_stage
from align.recipes.evaluate_during import during_training
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.fit import train_and_save
from align.train.objectives import CrossEntropy
from align.train.trainer import PackedTrainer


def run(stage: SftStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_stage(stage, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=context.progress)
    context.say(f"  data: {data.report.summary()}")
    trainer = PackedTrainer(
        stage=stage,
        context=context,
        objective=CrossEntropy(),
        model=load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora),
        data=data,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context, during_training(trainer, context))
