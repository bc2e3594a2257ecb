"""DPO in one page: load a model, tokenise preference pairs, compute the loss, step AdamW.

    align run tiny
    python examples/dpo_in_one_page.py runs/tiny/sft/model runs/tiny/pairs/data/train.jsonl

The losses it prints are those of a `kind: dpo` stage on the same batches of pairs. Policy and reference are equal at
first, so the first loss is ln 2 = 0.6931, plus the router's losses if the model's configuration has them.

Shapes: B pairs, L tokens of the longest sequence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from align.config.parts import Data, FileSource
from align.data.prepare import prepare_dpo_pairs
from align.errors import UserError
from align.losses.logprobs import token_logprobs
from align.losses.preference import dpo_loss
from align.train.checkpoint import load_policy, load_tokenizer

Pair = dict[str, list[int]]


def sequence_logprobs(model: torch.nn.Module, batch: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [B] of the chosen and of the rejected completions, and the router's loss (a scalar)."""
    rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in batch]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask, loss_mask = torch.zeros_like(ids), torch.zeros(len(rows), length)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        loss_mask[row, len(prompt) : end] = 1
    output = model(input_ids=ids, attention_mask=attention_mask, output_router_logits=True)
    # The logits at position t predict token t + 1.
    logprobs = (token_logprobs(output.logits[:, :-1], ids[:, 1:]) * loss_mask[:, 1:]).sum(1)
    chosen, rejected = logprobs.chunk(2)
    router = output.router.loss(model.config) if output.router is not None else torch.zeros(())
    return chosen, rejected, router


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a checkpoint on preference pairs by DPO.")
    parser.add_argument("checkpoint", type=Path, help="folder with config.json")
    parser.add_argument("pairs", type=Path, help="JSONL with the columns prompt, chosen, rejected")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.checkpoint)
    source = FileSource(path=str(options.pairs))
    data = prepare_dpo_pairs(Data(train=[source], max_length=options.max_length), tokenizer, seed=0)
    pairs: list[Pair] = list(data.train)
    policy = load_policy(options.checkpoint, "float32").train()
    ref_model = load_policy(options.checkpoint, "float32").eval()
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    for step in range(options.steps):
        start = step * options.batch_size % len(pairs)
        batch = pairs[start : start + options.batch_size]
        with torch.no_grad():
            ref_chosen, ref_rejected, _ = sequence_logprobs(ref_model, batch)
        chosen, rejected, router_loss = sequence_logprobs(policy, batch)
        loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=options.beta)
        (loss + router_loss).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step + 1:3d}  loss {loss + router_loss:.6f}  accuracy {metrics['rewards/accuracies']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
