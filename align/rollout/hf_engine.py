"""Generation with the transformers model itself: slow, for machines without vLLM and as a reference.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from align.config.rollout import Rollout
from align.models.lora.adapters import AnyModel
from align.models.weights import load_published
from align.rollout.base import (
    Completion,
    GenerationReport,
    SamplingSettings,
    SyncReport,
    WeightSource,
    check_prompts,
    completion_seed,
)


class HuggingFaceEngine:
    """`RolloutEngine` on its own copy of the model. Random numbers come from its own generators only.

    A completion depends only on its own seed, not on the other sequences in its batch (up to floating-point rounding).
    """

    def __init__(self, model: AnyModel, rollout: Rollout):
        self.rollout = rollout
        self.version = 0
        self.last_generation: GenerationReport | None = None
        self.last_sync: SyncReport | None = None
        self.model = model.eval()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[Completion]]:
        check_prompts(prompts, sampling, self.rollout.max_model_length)
        requests = [
            (prompt, completion_seed(sampling.seed, index, sample))
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        started = time.perf_counter()
        # Prompts of similar length share a batch, which keeps padding small.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.rollout.max_sequences):
            batch = order[start : start + self.rollout.max_sequences]
            sampled = self._decode([requests[i][0] for i in batch], [requests[i][1] for i in batch], sampling)
            completions.update(zip(batch, sampled))
        flat = [completions[i] for i in range(len(requests))]
        self.last_generation = GenerationReport(
            seconds=time.perf_counter() - started,
            completions=len(flat),
            prompt_tokens=sum(len(c.prompt_ids) for c in flat),
            completion_tokens=sum(len(c.token_ids) for c in flat),
        )
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]

    def update_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        start = time.perf_counter()
        size = load_published(self.model, named_tensors)
        self.version = version
        self.last_sync = SyncReport(size, time.perf_counter() - start, version)
        return self.last_sync

    def offer_weights(self, source: WeightSource) -> None:
        """No-op: this engine never restarts without the trainer."""

    def sleep(self) -> None:
        """No-op: this engine keeps its memory."""

    def wake(self) -> None:
        """No-op: this engine never sleeps."""

    def close(self) -> None:
        self.model = None

    def _decode(self, prompts: list[list[int]], seeds: list[int], sampling: SamplingSettings) -> list[Completion]:
        """Decode one batch, padded on the left so that every row's next token is the last column."""
        device = self.model.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        stop = set(sampling.stop_token_ids)
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        cache = None
        for _ in range(sampling.max_new_tokens):
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
            output = self.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            next_B, logprobs_B = _sample(output.logits[:, -1].float(), sampling.temperature, generators)
            for row, (token, logprob) in enumerate(zip(next_B.tolist(), logprobs_B.tolist())):
                if not finished[row]:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    finished[row] = token in stop
            if all(finished):
                break
            ids_BT = next_B[:, None]
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(prompts), 1)), dim=1)
        return [
            Completion(list(prompt), tokens[row], logprobs[row], finished[row], self.version)
            for row, prompt in enumerate(prompts)
        ]


def _sample(logits_BV: Tensor, temperature: float, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B]; row i draws from generators[i], greedy at temperature 0."""
    logprobs_BV = (logits_BV / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        next_B = logprobs_BV.argmax(dim=-1)
    else:
        # The argmax of log p - log(exponential variable) is a sample from p (the Gumbel-max trick).
        noise_BV = torch.stack(
            [torch.empty_like(row).exponential_(generator=g) for row, g in zip(logprobs_BV, generators)]
        )
        next_B = (logprobs_BV - noise_BV.log()).argmax(dim=-1)
    return next_B, logprobs_BV.gather(-1, next_B[:, None])[:, 0]
