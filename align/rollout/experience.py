"""Completions as padded tensors, and what a model says about their tokens.

Shapes: B sequences, T completion tokens (right-padded), L prompt and completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from align.models.hunyuan.moe import RouterReport
from align.models.hunyuan.packing import Packing
from align.models.lora import AnyModel

OF_ALL_TOKENS = ("input_ids", "routed_experts")
"""Fields that have a column for each token of the prompt too."""


@dataclass
class Experience:
    """One round of completions. Every [B, T] tensor is zero where `mask` is.

    input_ids [B, L] prompt and completion, right-padded; lengths [B] of both; prompt_lengths [B]; mask [B, T], 1 on
    real tokens; loss_mask [B, T], 1 on those that count in the losses;
    rollout_logprobs by the sampler; old_logprobs before the update, by the trainer or the sampler as the recipe says;
    ref_logprobs by the reference, values by the critic; score [B], one a completion; advantages and returns; features
    [B, T, D], the critic's hidden states when its trunk is frozen; routed_experts [B, L, layers, k], int16, where the
    policy's tokens are to go, -1 for wherever its router chooses.
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
        """The rows at `index`, with padding that none of them needs cut off."""
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
        """Every tensor on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            moved[field.name] = None if tensor is None else tensor.to(device)
        return Experience(**moved)

    def micro_batches(self, index: Tensor, max_tokens: int) -> Iterator[Tensor]:
        """Split rows into groups of similar length, of at most max_tokens each (or one row)."""
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
    """Pad to tensors. Lengths, not pad ids, say what is real: pad may equal EOS.

    routed_experts: none, or for each sequence the sampler's [layers, tokens - 1, k].
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
    """[B, length, layers, k]; -1 at the last token, which the sampler never computed, and behind it."""
    layers, _, width = routed_experts[0].shape
    table = torch.full((len(routed_experts), length, layers, width), -1, dtype=torch.int16)
    for row, routing in enumerate(routed_experts):
        table[row, : routing.shape[1]] = torch.from_numpy(routing.transpose(1, 0, 2).copy())
    return table


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    width = max(1, max(len(row) for row in rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], dtype=dtype)


class PackedRows:
    """A batch's tokens without its padding, as a model reads them, and where the answers stand in its hidden states."""

    def __init__(self, batch: Experience):
        positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        self.real_BL = positions < batch.lengths[:, None]
        self.packing = Packing(batch.lengths)
        row, token = batch.mask.bool().nonzero(as_tuple=True)
        self.predicting_N = self.packing.starts_S[row] + batch.prompt_lengths[row] - 1 + token
        self.batch = batch

    def read_by(self, model: AnyModel, **options: Any) -> Any:
        """The trunk's output; its hidden states are [1, tokens, D]."""
        return model.model(
            input_ids=self.batch.input_ids[self.real_BL][None], packing=self.packing, use_cache=False, **options
        )

    def predicting(self, hidden_1LD: Tensor) -> Tensor:
        """Hidden states [N, D] from which each of the N valid completion tokens is predicted, row after row."""
        return hidden_1LD[0].index_select(0, self.predicting_N)

    def last(self, hidden_1LD: Tensor) -> Tensor:
        """Hidden states [B, D] of the rows' last tokens."""
        return hidden_1LD[0].index_select(0, self.packing.last_S)

    def padded(self, values: Tensor, fill: int) -> Tensor:
        """[1, tokens, ...] to [B, L, ...]."""
        table = values.new_full((*self.real_BL.shape, *values.shape[2:]), fill)
        table[self.real_BL] = values[0]
        return table


def completion_tokens(batch: Experience) -> Tensor:
    """The N valid completion tokens, in the order of `PackedRows.predicting`."""
    row, token = batch.mask.bool().nonzero(as_tuple=True)
    return batch.input_ids[row, batch.prompt_lengths[row] + token]


def spread(values_N: Tensor, batch: Experience) -> Tensor:
    """[N] values of valid tokens back to [B, T], zero elsewhere."""
    return torch.zeros_like(batch.mask).masked_scatter(batch.mask.bool(), values_N.float())


class PolicyOutput(NamedTuple):
    """logprobs and (without gradient) entropy, both [B, T]; for mixtures of experts the routers' report and
    routed_experts [B, L, layers, k]."""

    logprobs: Tensor
    entropy: Tensor
    router: RouterReport | None
    routed_experts: Tensor | None


def policy_output(policy: AnyModel, batch: Experience, temperature: float, *, replay: bool = False) -> PolicyOutput:
    """The completion's log-probabilities under the distribution that was sampled.

    Only completion tokens meet the vocabulary; adapters inside the policy take part. replay: tokens go to the experts
    that the batch has for them.
    """
    model, packed = unwrap(policy), PackedRows(batch)
    routed_experts = None
    if replay and batch.routed_experts is not None:
        routed_experts = batch.routed_experts[packed.real_BL][None]
    outputs = packed.read_by(model, output_router_logits=True, routed_experts=routed_experts)
    hidden = packed.predicting(outputs.last_hidden_state)
    logprobs, entropy = model.lm_head(hidden, completion_tokens(batch), temperature)
    routed_experts = None if outputs.routed_experts is None else packed.padded(outputs.routed_experts, fill=-1)
    return PolicyOutput(spread(logprobs, batch), spread(entropy, batch), outputs.router, routed_experts)


def critic_features(critic: AnyModel, batch: Experience) -> Tensor:
    """Hidden state [B, T, D] from which the value of each completion token's state is read."""
    packed = PackedRows(batch)
    features = packed.predicting(packed.read_by(unwrap(critic)).last_hidden_state)
    padded = features.new_zeros(*batch.mask.shape, features.shape[-1])
    padded[batch.mask.bool()] = features
    return padded


def critic_values(critic: AnyModel, batch: Experience) -> Tensor:
    """Value [B, T] of the state in which each completion token was chosen; reuses stored features of a frozen trunk."""
    features = batch.features if batch.features is not None else critic_features(critic, batch)
    head = unwrap(critic).score
    return head(features.to(next(head.parameters()).dtype)).squeeze(-1).float() * batch.mask


def sequence_scores(scorer: AnyModel, batch: Experience) -> Tensor:
    """The reward model's score [B], read at the last completion token."""
    model, packed = unwrap(scorer), PackedRows(batch)
    return model.score(packed.last(packed.read_by(model).last_hidden_state)).squeeze(-1).float()


def unwrap(model: AnyModel) -> AnyModel:
    """The model inside a PEFT wrapper; its adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
