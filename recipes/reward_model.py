"""Reward modelling: train a model with a scalar head to score chosen above rejected completions (Bradley-Terry)."""

from __future__ import annotations

import torch
from trl import RewardConfig, RewardTrainer

from align.config.stages import RewardModelStage
from align.data.prepare import prepare_reward_pairs
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_scorer, load_tokenizer
from align.train.fit import train_and_save
from align.train.trl import AlignTrainer, trainer_arguments


class AlignRewardTrainer(AlignTrainer, RewardTrainer):  # type: ignore[misc]  # both have an attribute `optimizer`
    """TRL's reward trainer for pairs that are already tokenised."""


def run(stage: RewardModelStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_reward_pairs(stage.data, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs)
    context.say(f"  data: {data.report.summary()}")
    torch.manual_seed(context.seed)  # the new head is random
    model = load_scorer(parent, context.trained_dtype(stage.lora), parallel=context.recipe.parallel, lora=stage.lora)
    trainer = AlignRewardTrainer(
        stage=stage,
        model=model,
        args=RewardConfig(
            **trainer_arguments(stage, context),
            max_length=stage.data.max_length,
            center_rewards_coefficient=stage.center_coef or None,
        ),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context)
