"""Data: read sources, recognise formats, tokenise for each trainer. Nothing here knows a model."""

from align.data.chat import (
    DEFAULT_TEMPLATE,
    SMOLLM2_TEMPLATE,
    chatml_template,
    check_template,
    encode_conversation,
    encode_prompt,
    prepare_chat_template,
    stop_token_ids,
)
from align.data.prepare import (
    DataReport,
    Prepared,
    PromptRow,
    prepare_dpo_pairs,
    prepare_prompts,
    prepare_reward_pairs,
    prepare_sft,
    prepare_text,
)
from align.data.sources import load_rows
from align.data.splits import split_by_prompt_hash
from align.data.tokenizer import corpus, train_tokenizer

# fmt: off
__all__ = [
    "DEFAULT_TEMPLATE", "SMOLLM2_TEMPLATE", "DataReport", "Prepared", "PromptRow", "chatml_template",
    "check_template", "corpus", "encode_conversation", "encode_prompt", "load_rows", "prepare_chat_template",
    "prepare_dpo_pairs", "prepare_prompts", "prepare_reward_pairs", "prepare_sft", "prepare_text",
    "split_by_prompt_hash", "stop_token_ids", "train_tokenizer",
]
