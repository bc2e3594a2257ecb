"""GRPO in one page: sample groups of completions, score them with a verifier, compare within each group, update.

    align run tiny
    python examples/grpo_in_one_page.py runs/tiny/sft/model runs/tiny/pairs/data/train.jsonl

The verifier rewards completions of 2 to 8 tokens, so that the mean score of a small model rises within twenty steps.
For mathematics, replace `score` with `align.reward.verifiers.math_score`. `--engine vllm` samples with vLLM.

Shapes: B completions, T tokens of the longest completion.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from align.config.parts import FileSource
from align.config.rollout import Rollout
from align.data.chat import stop_token_ids
from align.data.experience import Experience, build_experience
from align.data.prepare import prepare_prompts
from align.errors import UserError
from align.losses.advantages import grpo
from align.losses.kl import kl_loss
from align.losses.ppo import policy_loss
from align.models.forward import policy_output
from align.models.weights import published_weights
from align.reward.verifiers import length_score
from align.rollout.base import Completion, SamplingSettings
from align.rollout.build import build_engine
from align.train.checkpoint import load_policy, load_tokenizer


def score(completion: Completion) -> float:
    """1 for 2 to 8 tokens; 1/24 less per token outside that range, at least 0."""
    return length_score(len(completion.token_ids), min_tokens=2, max_tokens=8, buffer=23)


def to_batch(completions: list[Completion]) -> Experience:
    """The completions as padded tensors."""
    return build_experience(
        [c.prompt_ids for c in completions], [c.token_ids for c in completions], [c.logprobs for c in completions]
    )


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, batch: Experience) -> Tensor:
    """Log-probabilities [B, T] of the completions' tokens, without gradient."""
    return policy_output(model, batch, temperature=1.0).logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a checkpoint by GRPO on a verifier.")
    parser.add_argument("checkpoint", type=Path, help="folder with config.json")
    parser.add_argument("prompts", help="JSONL with the column prompt")
    parser.add_argument("--engine", choices=("huggingface", "vllm"), default="huggingface")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a step")
    parser.add_argument("--group-size", type=int, default=8, help="completions per prompt")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.checkpoint)
    prompts, report = prepare_prompts([FileSource(path=options.prompts)], tokenizer, max_prompt_length=64, seed=0)
    print(report.summary())
    policy = load_policy(options.checkpoint, "float32").train()
    ref_model = load_policy(options.checkpoint, "float32").eval()
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rollout = Rollout(engine=options.engine, max_new_tokens=options.max_new_tokens, max_model_length=128)
    engine = build_engine(options.checkpoint, rollout, dtype="float32", seed=0)

    for step in range(options.steps):
        sampling = SamplingSettings(
            options.max_new_tokens, seed=step, stop_token_ids=tuple(stop_token_ids(tokenizer)), n=options.group_size
        )
        drawn = [prompts[(step * options.batch_size + i) % len(prompts)] for i in range(options.batch_size)]
        groups = engine.generate([list(row.ids) for row in drawn], sampling)
        completions = [completion for group in groups for completion in group]
        batch = to_batch(completions)
        scores = torch.tensor([score(completion) for completion in completions])
        advantages = grpo(scores, batch.mask, options.group_size)
        old_logprobs, ref_logprobs = logprobs_of(policy, batch), logprobs_of(ref_model, batch)

        for mini in torch.randperm(len(batch)).chunk(2):  # two updates per step
            rows = batch.rows(mini)
            width, tokens = rows.mask.shape[1], rows.mask.sum().item()
            old, ref, advantage = (tensor[mini, :width] for tensor in (old_logprobs, ref_logprobs, advantages))
            output = policy_output(policy, rows, temperature=1.0)
            loss, metrics = policy_loss(output.logprobs, old, advantage, rows.mask, clip_range=0.2, count=tokens)
            loss = loss + options.kl_coef * kl_loss(output.logprobs, ref, rows.mask, estimator="k3", count=tokens)
            if output.router is not None:
                loss = loss + output.router.loss(policy.config)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        engine.update_weights(published_weights(policy), version=step + 1)
        length, clipped = batch.mask.sum(1).mean(), metrics["clip_fraction"]
        print(f"step {step + 1:3d}  score {scores.mean():.3f}  tokens {length:.1f}  clipped {clipped:.3f}", flush=True)
    engine.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
