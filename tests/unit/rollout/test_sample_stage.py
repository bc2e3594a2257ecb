"""Preference pairs of the `sample` stage for a chat template that separates an answer's parts by special tokens."""

from __future__ import annotations

from typing import Any

from align.config.stages import SampleStage
from align.data.chat import ConversationEncoder
from align.data.prepare import PromptRow
from align.recipes.sample import _pairs
from align.rollout.base import Completion
from tests.chat_templates import SHAPES, tokenizer_for

FINAL, ANALYSIS, NEXT = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
SAMPLED = [
    f"{ANALYSIS}one{NEXT}{FINAL} bc <|return|>",
    f"{FINAL}right<|return|>",  # equal to the reference
    f"{ANALYSIS}one",  # truncated in the reasoning
    f"{FINAL}bc",
]


class Engine:
    """Stand-in engine that samples fixed texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def generate(self, prompts: list[list[int]], sampling: Any) -> list[list[Completion]]:
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLED]
        ends = [text.endswith("<|return|>") for text in SAMPLED]
        return [[Completion(p, i, [0.0] * len(i), end, 0)] for p, i, end in zip(prompts, ids, ends, strict=True)]


def test_channels_stay_apart_in_the_rejected_answer() -> None:
    tokenizer = tokenizer_for(SHAPES["gptoss"])
    user = {"role": "user", "content": "a"}
    stage = SampleStage.model_validate(
        {"kind": "sample", "init_from": "base", "train": [{"kind": "python_docs", "view": "prompts"}], "neighbours": 0}
    )
    rows = [PromptRow((1, 2), [user], "right", {}) for _ in SAMPLED]
    pairs, unreadable = _pairs(rows, stage, Engine(tokenizer), tokenizer, 0)  # type: ignore[arg-type]
    assert unreadable == 1
    first, last = (pair["rejected"] for pair in pairs)
    assert first == [{"role": "assistant", "content": "bc", "reasoning_content": "one"}]
    assert last == [{"role": "assistant", "content": "bc"}]
    trained = ConversationEncoder(tokenizer).answer([user], first).ids
    assert tokenizer.decode(trained) == f"{ANALYSIS}one{NEXT}{FINAL}bc<|return|>"
