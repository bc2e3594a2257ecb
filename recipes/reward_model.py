"""Reward modelling: train a model with a scalar head to score chosen above rejected completions (Bradley-Terry)."""

from __future__ import annotations

import torch

from align.config.stages import RewardModelStage
from align.data.prepare import prepare_stage
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_scorer, load_tokenizer
from align.train.fit import train_and_save
from align.train.objectives import BradleyTerry, can_share
from align.train.trainer import PackedTrainer


def run(stage: RewardModelStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_stage(stage, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=context.progress)
    context.say(f"  data: {data.report.summary()}")
    torch.manual_seed(context.seed)  # the new head is random
    model = load_scorer(parent, context.trained_dtype(stage.lora), parallel=context.recipe.parallel, lora=stage.lora)
    trainer = PackedTrainer(
        stage=stage,
        context=context,
        objective=BradleyTerry(stage.center_coef, shares=can_share(model.config)),
        model=model,
        data=data,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context)
