"""KTO: make desirable completions likelier than under the reference, and undesirable ones less likely."""

from __future__ import annotations

from align.config.stages import KtoStage
from align.data.prepare import prepare_stage
from align.recipes.evaluate_during import during_training
from align.run.context import StageContext, StageResult
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.fit import train_and_save
from align.train.kto import KtoTrainer, kto_objectives


def run(stage: KtoStage, context: StageContext) -> StageResult:
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    data = prepare_stage(stage, tokenizer, seed=context.seed, stage_dirs=context.stage_dirs, show=context.progress)
    context.say(f"  data: {data.report.summary()}")
    # The reference is the parent itself, also under LoRA. It is freed before the policy is loaded.
    objective, held_out = kto_objectives(parent, stage, context, data)
    trainer = KtoTrainer(
        stage=stage,
        context=context,
        objective=objective,
        held_out_objective=held_out,
        model=load_policy(parent, context.trained_dtype(stage.lora), context.recipe.parallel, stage.lora),
        data=data,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, data.report, context, during_training(trainer, context))
