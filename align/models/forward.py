"""Forward passes over a rollout batch: log-probabilities, values, scores.

Shapes: B sequences, T completion tokens (right-padded), L prompt and completion tokens, P real tokens of all
sequences, N valid completion tokens, D hidden, k experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.data.experience import Experience
from align.models.family import Policy, ScoringModel, Trunk, TrunkOutput
from align.models.lora.adapters import AnyModel
from align.models.packing import Packing
from align.models.routing import RouterReport


class PackedRows:
    """A rollout batch as one packed row of P tokens, without padding."""

    def __init__(self, batch: Experience):
        positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        self.real_BL = positions < batch.lengths[:, None]
        self.packing = Packing(batch.lengths)
        row, token = batch.mask.bool().nonzero(as_tuple=True)
        self.predicting_N = self.packing.starts_S[row] + batch.prompt_lengths[row] - 1 + token
        self.batch = batch

    def forward(self, trunk: Trunk, **options: Any) -> TrunkOutput:
        """Forward pass of the trunk; its hidden states are [1, P, D]."""
        return trunk(
            input_ids=self.batch.input_ids[self.real_BL][None], packing=self.packing, use_cache=False, **options
        )

    def predicting(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [N, D] from which each valid completion token is predicted, row after row."""
        return hidden_1PD[0].index_select(0, self.predicting_N)

    def last(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [B, D] of each row's last token."""
        return hidden_1PD[0].index_select(0, self.packing.last_S)

    def padded(self, values: Tensor, fill: int) -> Tensor:
        """[1, P, ...] to [B, L, ...]."""
        table = values.new_full((*self.real_BL.shape, *values.shape[2:]), fill)
        table[self.real_BL] = values[0]
        return table


def completion_tokens(batch: Experience) -> Tensor:
    """The valid completion tokens [N], in the order of `PackedRows.predicting`."""
    row, token = batch.mask.bool().nonzero(as_tuple=True)
    return batch.input_ids[row, batch.prompt_lengths[row] + token]


def unpack(values_N: Tensor, batch: Experience) -> Tensor:
    """Values [N] of valid completion tokens as [B, T], zero elsewhere."""
    return torch.zeros_like(batch.mask).masked_scatter(batch.mask.bool(), values_N.float())


class PolicyOutput(NamedTuple):
    """Result of a policy's forward pass.

    logprobs: [B, T].
    entropy: [B, T], without gradient.
    router: statistics of the routers, for mixtures of experts.
    routed_experts: experts chosen by the routers [B, L, layers, k], for mixtures of experts.
    """

    logprobs: Tensor
    entropy: Tensor
    router: RouterReport | None
    routed_experts: Tensor | None


def policy_output(policy: AnyModel, batch: Experience, temperature: float, *, replay: bool = False) -> PolicyOutput:
    """Log-probabilities of the completions under the distribution they were sampled from.

    The head is applied to completion tokens only. Adapters inside the policy apply.
    replay: route tokens to the experts stored in the batch, if any.
    """
    packed = PackedRows(batch)
    model: Policy = unwrap(policy)
    routed_experts = None
    if replay and batch.routed_experts is not None:
        routed_experts = batch.routed_experts[packed.real_BL][None]
    outputs = packed.forward(model.model, output_router_logits=True, routed_experts=routed_experts)
    hidden = packed.predicting(outputs.last_hidden_state)
    logprobs, entropy = model.lm_head(hidden, completion_tokens(batch), temperature)
    routed_experts = None if outputs.routed_experts is None else packed.padded(outputs.routed_experts, fill=-1)
    return PolicyOutput(unpack(logprobs, batch), unpack(entropy, batch), outputs.router, routed_experts)


def critic_features(critic: AnyModel, batch: Experience) -> Tensor:
    """Hidden states [B, T, D] of the tokens before each completion token, zero where the mask is 0."""
    packed = PackedRows(batch)
    model: ScoringModel = unwrap(critic)
    features = packed.predicting(packed.forward(model.model).last_hidden_state)
    padded = features.new_zeros(*batch.mask.shape, features.shape[-1])
    padded[batch.mask.bool()] = features
    return padded


def critic_values(critic: AnyModel, batch: Experience) -> Tensor:
    """Values [B, T] of the states before each completion token; stored features of a frozen trunk are reused."""
    features = batch.features if batch.features is not None else critic_features(critic, batch)
    head = unwrap(critic).score
    values: Tensor = head(features.to(next(head.parameters()).dtype))
    return values.squeeze(-1).float() * batch.mask


def sequence_scores(scorer: AnyModel, batch: Experience) -> Tensor:
    """The reward model's score [B], read at the last completion token."""
    packed = PackedRows(batch)
    model: ScoringModel = unwrap(scorer)
    scores = model.score(packed.last(packed.forward(model.model).last_hidden_state))
    return scores.squeeze(-1).float()


def unwrap(model: AnyModel) -> AnyModel:
    """The model inside a PEFT wrapper; its adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
