"""GSM8K: grade-school word problems, greedy decoding, the final answer compared as a number (Cobbe et al. 2021)."""

from __future__ import annotations

from align.config.parts import HubSource
from align.config.rewards import MathReward
from align.eval.task import PromptTask

TASK = PromptTask(
    name="gsm8k",
    prompts=(HubSource(kind="hub", id="openai/gsm8k", name="main", split="test", columns={"prompt": "question"}),),
    metrics=(MathReward(kind="math", column="answer"),),
    temperature=0.0,
    max_new_tokens=256,
)
