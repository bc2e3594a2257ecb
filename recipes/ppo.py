"""Policy optimisation: draw completions, score them, look back, update, send the new weights to the sampler."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial

from align.config.ppo import PpoStage
from align.data import prepare_prompts, stop_token_ids
from align.losses.kl import adapted_kl_coef
from align.models.lora import AnyModel
from align.rl.draw import Sampler
from align.rl.log import RoundLog
from align.rl.look_back import look_back
from align.rl.score import scored_round
from align.rl.state import Checkpoint, Progress
from align.rl.team import build_team
from align.rl.update import update
from align.rollout.base import RolloutEngine
from align.rollout.build import build_engine
from align.rollout.scoring import Scorer
from align.rollout.weights import published_weights
from align.train.checkpoint import count_parameters, load_tokenizer, save_model
from align.train.ema import Ema
from align.train.run_folder import StageContext, remove_folder


def run(context: StageContext) -> dict:
    stage: PpoStage = context.stage
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
            checkpoint=context.checkpoint,
            dtype=context.recipe.dtype,
            micro_batch_tokens=stage.micro_batch_tokens,
            say=context.say,
        )
        stack.callback(scorer.close)
        team = build_team(context)
        policy = team.policy.model
        parameters = count_parameters(policy)
        ema = Ema(policy, stage.ema_decay) if stage.ema_decay is not None else None
        engine = build_engine(parent, stage.rollout, dtype=context.recipe.dtype, seed=context.seed)
        stack.callback(engine.close)
        sampler = Sampler(engine, prompts, stage, stop_ids=stop_token_ids(tokenizer), seed=context.seed)
        stack.callback(sampler.close)

        checkpoint = Checkpoint(context.dir / "checkpoints", team, sampler, scorer, ema)
        progress = Progress(step=0, kl_coef=stage.kl.coef)
        if not context.resume:
            remove_folder(checkpoint.folder)  # of an earlier run of this stage
        elif checkpoint.exists:
            progress = checkpoint.load()
            send_weights(engine, policy, version=progress.step)
            context.say(f"  resuming at step {progress.step}")
        else:
            checkpoint.resume_sampler(position=0)
        log = RoundLog(context, policy, tokenizer, first_step=progress.step)
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
                metrics = scored.metrics | look_back(stage, team, scored.batch, progress.kl_coef)
            with log.clock("update"):
                metrics |= update(
                    stage, team, scored.batch, step=progress.step, seed=context.seed, kl_coef=progress.kl_coef
                )
                if ema is not None:
                    ema.update(policy)
            if stage.overlap:
                with log.clock("generate"):
                    sampler.wait()
            with log.clock("sync"):
                engine.wake()
                metrics |= send_weights(engine, policy, version=progress.step + 1)
            progress = advanced(stage, progress, metrics)
            log.finish_round(scored, metrics)
            if progress.step % stage.checkpoint_every == 0:
                checkpoint.save(progress)
    with ema.applied(policy) if ema is not None else nullcontext():
        save_model(policy, tokenizer, context.dir, context.recipe.dtype)
    return {"metrics": metrics, "data": report.to_dict(), "parameters": parameters}


def send_weights(engine: RolloutEngine, policy: AnyModel, version: int) -> dict[str, float]:
    """Give the sampler the policy's weights; what it took."""
    engine.update_weights(published_weights(policy), version=version)
    engine.offer_weights(partial(published_weights, policy))
    return engine.last_sync.metrics() if engine.last_sync is not None else {}


def advanced(stage: PpoStage, progress: Progress, metrics: dict[str, float]) -> Progress:
    """After one more round, with the KL coefficient for the next."""
    coef = progress.kl_coef
    if stage.kl.target is not None:
        coef = adapted_kl_coef(coef, metrics["kl"], stage.kl.target, stage.batch_size, stage.kl.horizon)
    return Progress(progress.step + 1, coef)
