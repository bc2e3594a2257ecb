"""Chat with a checkpoint in a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer

from align.data.answers import AnswerReader
from align.data.chat import encode_prompt, stop_token_ids
from align.data.shapes import DropRow, Message
from align.data.template_defaults import set_template_defaults
from align.errors import UserError
from align.models.lora.adapters import AnyModel
from align.models.lora.folder import require_fitting
from align.models.lora.stock import load_adapter
from align.run.adapted import require_base
from align.serve.client import converse
from align.train.checkpoint import load_policy, load_tokenizer
from align.train.quiet import quieten


def chat(
    folder: Path,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    variables: dict[str, Any],
    adapter: Path | None = None,
) -> None:
    """Read lines and stream completions, keeping the conversation; an empty line or the end of input stops.

    variables: values for the chat template's own variables.
    adapter: folder of a LoRA adapter on the model.
    """
    quieten()
    tokenizer = load_tokenizer(folder)
    set_template_defaults(tokenizer, variables, "--chat-template-kwargs")
    model = load_policy(folder, "float32").eval()
    if adapter is not None:
        require_fitting(adapter, model.config)
        require_base(adapter, folder)
        model = load_adapter(model, adapter)
    torch.manual_seed(seed)
    converse(system, lambda messages: _complete(model, tokenizer, messages, max_new_tokens, temperature))


@torch.no_grad()
def _complete(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    max_new_tokens: int,
    temperature: float,
) -> Message:
    """Stream the assistant's next turn to the terminal and return it.

    Special tokens that separate the parts of an answer, such as gpt-oss's channels, are shown.
    """
    reader = AnswerReader(tokenizer)
    ids = encode_prompt(tokenizer, messages)
    free = model.config.max_position_embeddings - len(ids)
    if free < 1:
        context = model.config.max_position_embeddings
        raise UserError(
            f"the conversation has {len(ids)} tokens and fills the context of {context}; start a new conversation."
        )
    prompt = torch.tensor([ids])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=DynamicCache(),
        max_new_tokens=min(max_new_tokens, free),
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=not reader.separators),
        **sampling,
    )
    answer = output[0, len(ids) :].tolist()
    try:
        return reader.message(answer)
    except DropRow as reason:
        print(f"(kept as plain text: {reason})", file=sys.stderr)
        return {"role": "assistant", "content": str(tokenizer.decode(answer, skip_special_tokens=True))}
