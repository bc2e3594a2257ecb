"""How completions are generated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.config.parts import Part, Positive


class Rollout(Part):
    """How completions are generated."""

    engine: Literal["vllm", "huggingface"] = "vllm"
    """vllm: the in-process engine; huggingface: `generate`, slow, for machines without vLLM."""
    max_new_tokens: Positive = 64
    """Tokens after which a completion without an end-of-sequence token is cut off."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Logits are divided by this before sampling, in the rollout and in the trainer's log-probabilities alike."""
    max_model_length: Positive = 512
    """Prompt and completion together, in tokens."""
    cache_gib: Annotated[float, Field(gt=0)] = 0.5
    """Memory for the key/value cache."""
    max_sequences: Positive = 64
    """Sequences decoded at a time."""

    def require_room_for_prompts(self) -> None:
        if self.max_new_tokens >= self.max_model_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_model_length {self.max_model_length}; lower one or raise the other"
            )
