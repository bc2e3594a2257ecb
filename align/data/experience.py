"""The rollout batch: completions as padded tensors, with the values that scoring and forward passes add.

Shapes: B sequences, T completion tokens, L prompt and completion tokens, D hidden size, k experts per token. T and L
are those of the longest sequence; shorter ones are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy
import torch
from torch import Tensor

from align.data.transfer import to_device

OF_ALL_TOKENS = ("input_ids", "routed_experts")
"""Fields with a column for each token of prompt and completion, not only of the completion."""
ON_THE_HOST = ("lengths", "prompt_lengths")
"""Fields that stay on the CPU, because indices are computed from them there."""


@dataclass
class Experience:
    """A rollout batch. Every [B, T] tensor is zero where `mask` is zero.

    input_ids         [B, L] prompt and completion
    lengths           [B] tokens of prompt and completion; always on the CPU
    prompt_lengths    [B] tokens of the prompt; always on the CPU
    mask              [B, T] 1 on completion tokens, 0 on padding
    rollout_logprobs  [B, T] log-probabilities of the sampler
    loss_mask         [B, T] 1 on tokens that the losses include
    score             [B] score per completion
    old_logprobs      [B, T] log-probabilities before the update, by trainer or sampler (set by `old_logprobs`)
    ref_logprobs      [B, T] log-probabilities of the reference
    values            [B, T] values of the critic
    advantages        [B, T]
    returns           [B, T] regression targets of the critic
    features          [B, T, D] the critic's hidden states if only its head is trained
    routed_experts    [B, L, layers, k] int16, experts that the policy must use; -1 lets its router choose
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    loss_mask: Tensor
    score: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    features: Tensor | None = None
    routed_experts: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, index: Tensor) -> Experience:
        """The rows at `index`, padded to the longest of them."""
        length = int(self.lengths[index].max())
        completion = int((self.lengths - self.prompt_lengths)[index].max())
        picked = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                tensor = tensor[index]
                if tensor.ndim > 1:
                    tensor = tensor[:, : length if field.name in OF_ALL_TOKENS else completion]
            picked[field.name] = tensor
        return Experience(**picked)

    def to(self, device: torch.device) -> Experience:
        """A copy on `device`; `lengths` and `prompt_lengths` stay on the CPU."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            stays = tensor is None or field.name in ON_THE_HOST
            moved[field.name] = tensor if stays else to_device(tensor, device)
        return Experience(**moved)

    def micro_batches(self, index: Tensor, max_tokens: int) -> Iterator[Tensor]:
        """Sort the rows at `index` by length and split them into micro-batches of at most `max_tokens` tokens. A longer
        row is a micro-batch of its own. Yields the row indices of each micro-batch."""
        order = index[self.lengths[index].argsort(descending=True, stable=True)]
        start = tokens = 0
        for end, length in enumerate(self.lengths[order].tolist()):
            if end > start and tokens + length > max_tokens:
                yield order[start:end]
                start, tokens = end, 0
            tokens += length
        if len(order):
            yield order[start:]


def build_experience(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    routed_experts: Sequence[numpy.ndarray] = (),
) -> Experience:
    """Pad prompts and completions to a rollout batch. The lengths identify the padding, because the pad id may be EOS.

    routed_experts: empty, or for each sequence the experts that the sampler used, [layers, tokens - 1, k].
    """
    sequences = [list(p) + list(c) for p, c in zip(prompts, completions, strict=True)]
    mask = _pad([[1.0] * len(c) for c in completions], torch.float32)
    return Experience(
        input_ids=_pad(sequences, torch.long),
        lengths=torch.tensor([len(s) for s in sequences]),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        mask=mask,
        rollout_logprobs=_pad(logprobs, torch.float32),
        loss_mask=mask,
        routed_experts=_pad_routing(routed_experts, max(len(s) for s in sequences)) if len(routed_experts) else None,
    )


def _pad_routing(routed_experts: Sequence[numpy.ndarray], length: int) -> Tensor:
    """Experts [B, length, layers, k]; -1 on padding and on the last token, which the sampler never fed to its model."""
    layers, _, width = routed_experts[0].shape
    table = torch.full((len(routed_experts), length, layers, width), -1, dtype=torch.int16)
    for row, routing in enumerate(routed_experts):
        table[row, : routing.shape[1]] = torch.from_numpy(routing.transpose(1, 0, 2).copy())
    return table


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    width = max(1, max(len(row) for row in rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], dtype=dtype)
