"""PPO and its critic-free relatives: sample completions, score them, complete the batch, update, send the weights.

Every rank calls `run`. Only rank 0 samples, calls reward functions and servers, and writes metrics. Under `parallel`
the models are sharded, so all ranks take part in scoring by reward models, log-probabilities, updates and saving.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from align.config.ppo import PpoStage
from align.data.chat import stop_token_ids
from align.data.prepare import prepare_prompts
from align.losses.kl import adapted_kl_coef
from align.models.quantized import quantized_weights
from align.models.shared_weights import SharedWeights
from align.parallel.group import from_rank_0, should_stop
from align.parallel.sharding import world
from align.recipes.evaluate_during import during_ppo
from align.reward.mixture import Scorer
from align.rl.checkpoint import Checkpoint, Progress
from align.rl.complete import compare_samples, complete_batch
from align.rl.log import RunLog
from align.rl.models import build_models, load_reward_models
from align.rl.sample import RolloutSampler
from align.rl.score import score_batch, to_experience
from align.rl.update import update
from align.rollout.build import build_engine, require_placement
from align.rollout.self_check import SelfCheck
from align.run import interrupt
from align.run.context import StageContext, StageResult
from align.train.checkpoint import count_parameters, load_tokenizer, save_model
from align.train.fit import say_trained


def run(stage: PpoStage, context: StageContext) -> StageResult:
    """Run the stage to its end, or to the end of the current iteration if the run is asked to stop."""
    parent, dtype, parallel = context.checkpoint(stage.init_from), context.recipe.dtype, context.recipe.parallel
    beside_ranks = world()[1] > 1
    from_rank_0("placing the rollout engine", lambda: require_placement(stage.rollout, beside_ranks=beside_ranks))
    tokenizer = load_tokenizer(parent)
    prompts, report = prepare_prompts(
        stage.prompts,
        tokenizer,
        max_prompt_length=stage.max_prompt_length,
        seed=context.seed,
        stage_dirs=context.stage_dirs,
        filters=stage.filters,
        show=context.progress,
    )
    context.say(f"  data: {report.summary()}")
    with ExitStack() as stack:
        shared = SharedWeights() if stage.share_trunk and parallel is None else None
        load_scorers = partial(load_reward_models, stage, context, shared)
        scorer = Scorer(stage.rewards, prompts, tokenizer, load_models=load_scorers, say=context.say)
        stack.callback(scorer.close)
        models = build_models(stage, context, shared)
        if shared is not None and shared.shared:
            context.say(
                f"  {shared.shared:,} of {shared.loaded:,} loaded parameters are another model's: in memory once"
            )
        parameters = count_parameters(models.policy.model)
        weights = {
            role: table
            for role, learner in models.learners.items()
            if (table := say_trained(learner.model, context, count_parameters(learner.model)["total"], role))
        }
        engine = partial(
            build_engine,
            parent,
            stage.rollout,
            dtype=dtype,
            seed=context.seed,
            beside_ranks=beside_ranks,
            detokenizes=stage.evaluate is not None,
        )
        sampler = RolloutSampler(engine, prompts, stage, stop_ids=stop_token_ids(tokenizer), seed=context.seed)
        stack.callback(sampler.close)

        checkpoint = Checkpoint(context.dir / "checkpoints", models, sampler, scorer)
        progress = Progress(step=0, kl_coef=stage.kl.coef)
        if not context.resume:
            checkpoint.clear()
        elif (saved := checkpoint.load()) is not None:
            progress = saved
            sampler.update_weights(models.policy, version=progress.step)
            context.say(f"  resuming at step {progress.step}")
        if progress.step == 0 and quantized_weights(models.policy.model):
            # The engine has read the weights of the checkpoint, which are not quantised.
            sampler.update_weights(models.policy, version=0)
        log = RunLog(stage, context, models.policy.model, tokenizer, first_step=progress.step)
        stack.callback(log.close)
        evaluations = during_ppo(stage, context, models, sampler, tokenizer, log)
        if evaluations is not None:
            evaluations.begin(progress.step)

        check = SelfCheck(models.policy.model.config, dtype, enabled=stage.self_check)
        metrics: dict[str, float] = {}
        while progress.step < stage.steps:
            with log.clock("generate"):
                samples = sampler.sample()
            if not stage.overlap and progress.step % stage.checkpoint_every == 0:
                checkpoint.save_samples(samples)
            with log.clock("score"):
                batch = score_batch(stage, sampler, samples, scorer)
            if not stage.overlap:
                sampler.sleep()
            elif progress.step + 1 < stage.steps:
                sampler.begin()
            with log.clock("logprobs"):
                # Under `overlap` the completions come from earlier weights, except at the start.
                current = all(c.weight_version == progress.step for c in batch.completions)
                compare = check.compare if check.pending and current else None
                metrics = batch.metrics | complete_batch(stage, models, batch.experience, progress.kl_coef, compare)
            with log.clock("update"):
                metrics |= update(
                    stage, models, batch.experience, step=progress.step, seed=context.seed, kl_coef=progress.kl_coef
                )
            if stage.overlap:
                with log.clock("generate"):
                    sampler.wait()
            with log.clock("sync"):
                sampler.wake()
                metrics |= sampler.update_weights(models.policy, version=progress.step + 1)
            check.note_update(metrics)
            if stage.overlap and check.pending:
                compare_samples(stage, models, to_experience(sampler.probe()), check.compare)
            progress = next_progress(stage, progress, metrics)
            log.finish_iteration(batch, metrics)
            last = progress.step == stage.steps
            if evaluations is not None and evaluations.after_step(progress.step, last=last):
                break
            stopping = should_stop() and progress.step < stage.steps
            if stopping or progress.step % stage.checkpoint_every == 0:
                checkpoint.save(progress)
            if stopping:
                interrupt.stop()
        handed_on = evaluations.finish() if evaluations is not None else {}
    models.policy.swap_ema()  # not swapped back: saving may merge the adapters, so training ends here
    save = "merged" if stage.lora is None else stage.lora.save
    save_model(models.policy.model, tokenizer, context.dir, dtype, parallel, save=save)
    return StageResult(metrics | handed_on, report.to_dict(), parameters, weights=weights or None)


def next_progress(stage: PpoStage, progress: Progress, metrics: dict[str, float]) -> Progress:
    """Progress after one more iteration, with the adapted KL coefficient if the recipe has a KL target."""
    coef = progress.kl_coef
    if stage.kl.target is not None:
        coef = adapted_kl_coef(coef, metrics["kl"], stage.kl.target, stage.batch_size, stage.kl.horizon)
    return Progress(progress.step + 1, coef)
