"""A tiny checkpoint, local tasks of each kind in the harness's format, and a model that answers without weights."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from align.data.tokenizer import train_tokenizer
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.rollout.requests import Generation, Pair, Request, Scored, decode_completion

SENTENCE = "the cat sat on a mat and the dog ran to the old red house by the sea while it rained for an hour"
WORDS = SENTENCE.split()
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
TASKS = ("al_choice", "al_letters", "al_generate", "al_shots", "al_target", "al_rolling")


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer; with `bos`, one that writes `<|im_start|>` before each text, as Llama's does."""
    tokenizer = train_tokenizer([" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(20)], 300)
    if bos:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    return tokenizer


@torch.no_grad()
def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A random model whose norms have an effect, and whose next token is neither certain nor uniform."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, documents: int = 16) -> list[str]:
    """Write a YAML file and a JSONL file for each of `TASKS`; returns the YAML files."""
    draw = random.Random(3)
    rows = [
        {
            "question": " ".join(draw.choices(WORDS, k=draw.randint(3, 12))),
            "choices": [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(4)],
            "answer": "ABCD"[draw.randrange(4)],
            "text": " ".join(draw.choices(WORDS, k=draw.randint(5, 400))),
        }
        for _ in range(documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "metadata": {"version": 1.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    gold = "{{['A','B','C','D'].index(answer)}}"
    generate = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0][0]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match", **mean}],
        "filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {
                "name": "letter",
                "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
            },
        ],
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_target": gold,
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    kinds: dict[str, dict[str, Any]] = {
        "al_choice": {**choice, "doc_to_choice": "{{choices}}"},
        "al_letters": {**choice, "doc_to_choice": ["A", "B", "C", "D"], "target_delimiter": ""},
        "al_generate": generate,
        "al_shots": {**generate, "num_fewshot": 2, "fewshot_split": "test"},
        "al_target": {
            "output_type": "loglikelihood",
            "doc_to_target": " {{choices[1]}}",
            "metric_list": [
                {"metric": "acc", **mean},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        "al_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        },
    }
    files = []
    for name, settings in kinds.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"task": name, **base, **settings}), encoding="utf-8")
        files.append(str(file))
    return files


class StandIn:
    """A model whose answer is a hash of the request; counts the requests that it answers.

    stop_after: raise KeyboardInterrupt after so many answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 500, stop_after: int | None = None):
        self.tokenizer, self.max_length, self.stop_after = tokenizer, max_length, stop_after
        self.answered: list[Request | Pair] = []

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        for index in reversed(range(len(requests))):  # not in the order of the requests
            request = requests[index]
            self._count(request)
            numbers = hashlib.sha256(repr((request.prompt_ids, request.temperature, request.seed)).encode()).digest()
            ids = tuple(3 + number for number in numbers)[: request.max_new_tokens]
            text = decode_completion(self.tokenizer, ids, request)
            yield index, Generation(ids, text, numbers[0] < 128)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        for index, pair in enumerate(pairs):
            self._count(pair)
            numbers = hashlib.sha256(repr(pair).encode()).digest()
            logprobs = tuple(-1 - numbers[i % 32] / 64 for i in range(len(pair.target_ids)))
            yield index, Scored(sum(logprobs), logprobs, numbers[0] < 64)

    def load(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
        return False

    def close(self) -> None:
        pass

    def _count(self, request: Request | Pair) -> None:
        if self.stop_after is not None and len(self.answered) >= self.stop_after:
            raise KeyboardInterrupt
        self.answered.append(request)
