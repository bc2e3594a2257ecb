"""Forward passes over a rollout batch: log-probabilities, values, scores.

Shapes: B sequences, T completion tokens (right-padded), L prompt and completion tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.data.experience import Experience
from align.models.hunyuan.moe import RouterReport
from align.models.hunyuan.packing import Packing
from align.models.lora.adapters import AnyModel


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
    values: Tensor = head(features.to(next(head.parameters()).dtype))
    return values.squeeze(-1).float() * batch.mask


def sequence_scores(scorer: AnyModel, batch: Experience) -> Tensor:
    """The reward model's score [B], read at the last completion token."""
    model, packed = unwrap(scorer), PackedRows(batch)
    scores: Tensor = model.score(packed.last(packed.read_by(model).last_hidden_state))
    return scores.squeeze(-1).float()


def unwrap(model: AnyModel) -> AnyModel:
    """The model inside a PEFT wrapper; its adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
