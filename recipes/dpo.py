"""Direct preference optimisation and its variants: make the chosen completion likelier than the rejected one."""

from __future__ import annotations

from dataclasses import replace

from align.config.stages import DpoStage
from align.data.prepare import prepare_stage
from align.models.family import load_config
from align.recipes.evaluate_during import during_training
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.fit import train_and_save
from align.train.objectives import Preference, can_share
from align.train.references import reference_logprobs
from align.train.trainer import PackedTrainer


def run(stage: DpoStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_stage(stage, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=context.progress)
    context.say(f"  data: {data.report.summary()}")
    objective = held_out = Preference(stage, shares=can_share(load_config(parent)))
    if stage.needs_reference:
        # The reference is the parent itself, also under LoRA. It is freed before the policy is loaded.
        references = reference_logprobs(parent, stage, context, data, objective)
        objective, held_out = (replace(objective, references=r) for r in (references.train, references.held_out))
    trainer = PackedTrainer(
        stage=stage,
        context=context,
        objective=objective,
        held_out_objective=held_out,
        model=load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora),
        data=data,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context, during_training(trainer, context))
