"""Policy optimisation: draw completions, score them, look back, update, send the new weights to the sampler."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from align.config.ppo import PpoStage
from align.data.chat import stop_token_ids
from align.data.prepare import prepare_prompts
from align.losses.kl import adapted_kl_coef
from align.parallel.sharding import world
from align.reward.mixture import Scorer
from align.rl.checkpoint import Checkpoint, Progress
from align.rl.complete import look_back
from align.rl.follow import follow, is_follower, tell
from align.rl.log import RoundLog
from align.rl.models import Models, build_models, load_reward_models
from align.rl.sample import Sampler
from align.rl.score import scored_round
from align.rl.update import update
from align.rollout.base import RolloutEngine
from align.rollout.build import build_engine
from align.run.context import StageContext, StageResult
from align.run.folder import remove_folder
from align.train.checkpoint import count_parameters, load_tokenizer, save_model


def run(stage: PpoStage, context: StageContext) -> StageResult:
    if is_follower():
        return follow(stage, context)
    parent = context.checkpoint(stage.init_from)
    tokenizer = load_tokenizer(parent)
    prompts, report = prepare_prompts(
        stage.prompts,
        tokenizer,
        max_prompt_length=stage.max_prompt_length,
        seed=context.seed,
        stage_dirs=context.stage_dirs,
    )
    context.say(f"  data: {report.summary()}")
    with ExitStack() as stack:
        scorer = Scorer(
            stage.rewards,
            prompts,
            tokenizer,
            load_models=partial(load_reward_models, stage, context),
            announce=partial(tell, "score"),
            say=context.say,
        )
        stack.callback(scorer.close)
        models = build_models(stage, context)
        policy = models.policy.model
        parameters = count_parameters(policy)
        engine = build_engine(
            parent, stage.rollout, dtype=context.recipe.dtype, seed=context.seed, beside_ranks=world()[1] > 1
        )
        stack.callback(engine.close)
        sampler = Sampler(engine, prompts, stage, stop_ids=stop_token_ids(tokenizer), seed=context.seed)
        stack.callback(sampler.close)

        checkpoint = Checkpoint(context.dir / "checkpoints", models, sampler, scorer)
        progress = Progress(step=0, kl_coef=stage.kl.coef)
        if not context.resume:
            remove_folder(checkpoint.folder)  # of an earlier run of this stage
        elif checkpoint.exists:
            progress = checkpoint.load()
            send_weights(engine, models, version=progress.step)
            context.say(f"  resuming at step {progress.step}")
        else:
            checkpoint.resume_sampler(position=0)
        log = RoundLog(stage, context, policy, tokenizer, first_step=progress.step)
        stack.callback(log.close)

        metrics: dict[str, float] = {}
        while progress.step < stage.steps:
            with log.clock("generate"):
                drawn = sampler.draw()
            if not stage.overlap and progress.step % stage.checkpoint_every == 0:
                checkpoint.save_drawn(drawn)
            with log.clock("score"):
                scored = scored_round(stage, sampler, drawn, scorer)
            if not stage.overlap:
                engine.sleep()
            elif progress.step + 1 < stage.steps:
                sampler.begin()
            with log.clock("logprobs"):
                tell("look_back", scored.batch, progress.kl_coef)
                metrics = scored.metrics | look_back(stage, models, scored.batch, progress.kl_coef)
            with log.clock("update"):
                tell("update", progress.step, progress.kl_coef)
                metrics |= update(
                    stage, models, scored.batch, step=progress.step, seed=context.seed, kl_coef=progress.kl_coef
                )
            if stage.overlap:
                with log.clock("generate"):
                    sampler.wait()
            with log.clock("sync"):
                engine.wake()
                metrics |= send_weights(engine, models, version=progress.step + 1)
            progress = advanced(stage, progress, metrics)
            log.finish_round(scored, metrics)
            if progress.step % stage.checkpoint_every == 0:
                checkpoint.save(progress)
    tell("finish")
    models.policy.swap_ema()  # for good: saving merges adapters into the model
    save_model(policy, tokenizer, context.dir, context.recipe.dtype, context.recipe.parallel)
    return StageResult(metrics, report.to_dict(), parameters)


def send_weights(engine: RolloutEngine, models: Models, version: int) -> dict[str, float]:
    """Give the sampler the policy's weights; what it took."""
    tell("send")
    engine.update_weights(models.policy.published_weights(), version=version)
    if not models.policy.collective:  # their ranks do not stand by to send the weights again
        engine.offer_weights(models.policy.published_weights)
    return engine.last_sync.metrics() if engine.last_sync is not None else {}


def advanced(stage: PpoStage, progress: Progress, metrics: dict[str, float]) -> Progress:
    """After one more round, with the KL coefficient for the next."""
    coef = progress.kl_coef
    if stage.kl.target is not None:
        coef = adapted_kl_coef(coef, metrics["kl"], stage.kl.target, stage.batch_size, stage.kl.horizon)
    return Progress(progress.step + 1, coef)
