"""Forward passes over a rollout batch: log-probabilities, values, scores.

Shapes: B sequences, T completion tokens (right-padded), L prompt and completion tokens, P real tokens of all
sequences, N valid completion tokens, D hidden, k experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.data.experience import Experience
from align.data.transfer import indices_to_device
from align.models.family import Policy, ScoringModel, Trunk, TrunkOutput
from align.models.lora.adapters import AnyModel
from align.models.packing import Packing
from align.models.routing import RouterReport


class PackedRows:
    """A rollout batch as one packed row of P tokens, without padding.

    Indices are computed on the CPU, where the lengths are. On a GPU, `nonzero` would make the host wait for the number
    of indices.
    """

    def __init__(self, batch: Experience):
        lengths, prompts, device = batch.lengths, batch.prompt_lengths, batch.input_ids.device
        (rows, length), width = batch.input_ids.shape, batch.mask.shape[1]
        self.shape_BL, self.shape_BT = (rows, length), (rows, width)
        self.packing = Packing(lengths.tolist(), device)
        real_BL = torch.arange(length) < lengths[:, None]
        row, token = (torch.arange(width) < (lengths - prompts)[:, None]).nonzero(as_tuple=True)
        predicted = self.packing.starts_S[row] + prompts[row] + token
        indices = (real_BL.flatten().nonzero()[:, 0], row * width + token, predicted - 1, predicted)
        self.real_P, self.valid_N, self.predicting_N, self.predicted_N = indices_to_device(indices, device)
        self.tokens_P = self.packed(batch.input_ids)

    def forward(self, trunk: Trunk, **options: Any) -> TrunkOutput:
        """Forward pass of the trunk; its hidden states are [1, P, D]."""
        return trunk(input_ids=self.tokens_P[None], packing=self.packing, use_cache=False, **options)

    def predicting(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [N, D] that predict the valid completion tokens, row by row."""
        return hidden_1PD[0].index_select(0, self.predicting_N)

    def completion_tokens(self) -> Tensor:
        """The valid completion tokens [N], in the order of `predicting`."""
        return self.tokens_P.index_select(0, self.predicted_N)

    def last(self, hidden_1PD: Tensor) -> Tensor:
        """Hidden states [B, D] of each row's last token."""
        return hidden_1PD[0].index_select(0, self.packing.last_S)

    def packed(self, values: Tensor) -> Tensor:
        """Remove the padding: [B, L, ...] to [P, ...]."""
        return values.flatten(0, 1).index_select(0, self.real_P)

    def padded(self, values: Tensor, fill: int) -> Tensor:
        """Add padding with the value `fill`: [1, P, ...] to [B, L, ...]."""
        table = values.new_full((self.shape_BL[0] * self.shape_BL[1], *values.shape[2:]), fill)
        return table.index_copy_(0, self.real_P, values[0]).view(*self.shape_BL, *values.shape[2:])

    def completions(self, values: Tensor) -> Tensor:
        """Values [N, ...] of valid completion tokens as [B, T, ...], zero elsewhere."""
        table = values.new_zeros(self.shape_BT[0] * self.shape_BT[1], *values.shape[1:])
        return table.index_copy(0, self.valid_N, values).view(*self.shape_BT, *values.shape[1:])


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
    """Log-probabilities of the completions under the policy at `temperature`, which is that of sampling.

    The head computes completion tokens only. The policy's active adapters are applied.
    replay: route tokens to the experts stored in the batch, if any.
    """
    packed = PackedRows(batch)
    model: Policy = unwrap(policy)
    routed_experts = None
    if replay and batch.routed_experts is not None:
        routed_experts = packed.packed(batch.routed_experts)[None]
    outputs = packed.forward(model.model, output_router_logits=True, routed_experts=routed_experts)
    hidden = packed.predicting(outputs.last_hidden_state)
    scores = model.lm_head(hidden, packed.completion_tokens(), temperature)
    routed_experts = None if outputs.routed_experts is None else packed.padded(outputs.routed_experts, fill=-1)
    logprobs, entropy = (packed.completions(values.float()) for values in (scores.logprobs_N, scores.entropy_N))
    return PolicyOutput(logprobs, entropy, outputs.router, routed_experts)


def critic_features(critic: AnyModel, batch: Experience) -> Tensor:
    """Hidden state [B, T, D] of the token before each completion token, zero where the mask is 0."""
    packed = PackedRows(batch)
    model: ScoringModel = unwrap(critic)
    return packed.completions(packed.predicting(packed.forward(model.model).last_hidden_state))


def critic_values(critic: AnyModel, batch: Experience) -> Tensor:
    """Values [B, T] of the states before each completion token.

    If the batch has stored features of a frozen trunk, only the head is computed.
    """
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
    """The model inside a PEFT wrapper, if any. Its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
