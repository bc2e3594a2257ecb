"""Talking to a checkpoint in a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer

from align.data.chat import encode_prompt, stop_token_ids
from align.errors import UserError
from align.models.lora.adapters import AnyModel
from align.train.checkpoint import checkpoint_folder, load_policy, load_tokenizer
from align.train.quiet import quieten


def chat(checkpoint: Path, *, system: str | None, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Read lines, stream answers, keep the conversation; an empty line or the end of input stops."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1.")
    quieten()
    folder = checkpoint_folder(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, "float32").eval()
    torch.manual_seed(seed)
    messages = [{"role": "system", "content": system}] if system else []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        messages.append(
            {"role": "assistant", "content": _answer(model, tokenizer, messages, max_new_tokens, temperature)}
        )


@torch.no_grad()
def _answer(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
) -> str:
    ids = encode_prompt(tokenizer, messages)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(f"the conversation has {len(ids)} tokens, more than the model's context; start a new one.")
    prompt = torch.tensor([ids])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=DynamicCache(),
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
