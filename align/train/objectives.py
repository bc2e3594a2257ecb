"""Losses of the trainers: rows of the data as sequences of tokens, and the loss of a pass.

Shapes: N tokens with a loss, S sequences, B rows; a pair has two sequences, chosen and rejected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.config.stages import DpoStage
from align.losses.preference import bradley_terry_loss, preference_loss
from align.models.forward import unwrap
from align.models.lora.adapters import AnyModel
from align.models.routing import RouterReport
from align.train.passes import Example, PackedPass, Totals, common_start

IGNORED = -100
"""Label of a token without a loss."""


@dataclass
class Measured:
    """Result of a pass.

    loss: the pass's share of the step's loss, without router losses; the shares of a step's passes add up.
    router: statistics of the routers; None in evaluation and for dense models.
    means: {metric: (sum over the pass, number of values)}.
    largest: {metric: largest value of the pass}; a smallest value is negated.
    """

    loss: Tensor
    router: RouterReport | None = None
    means: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A trainer's loss.

    columns: columns of the data that `example` reads.
    uses_dropout: False if the model's dropout is disabled, so that both sides of a comparison use the same network.
    """

    columns: tuple[str, ...]
    uses_dropout: bool

    def example(self, row: dict[str, Any], number: int) -> Example:
        """The row of the data as sequences. number: index of the row in its data set."""

    def measure(self, model: AnyModel, packed: PackedPass, totals: Totals) -> Measured:
        """Forward pass: loss and metrics."""


class CrossEntropy:
    """Mean of -log p(token) over the step's tokens with a label."""

    columns: tuple[str, ...] = ("input_ids", "labels")
    uses_dropout = True

    def example(self, row: dict[str, Any], number: int) -> Example:
        mask = torch.tensor(row["labels"]) != IGNORED
        mask[0] = False  # nothing predicts the first token
        return Example((torch.tensor(row["input_ids"]),), (mask,))

    def measure(self, model: AnyModel, packed: PackedPass, totals: Totals) -> Measured:
        policy = unwrap(model)
        output = packed.forward(policy.model, output_router_logits=torch.is_grad_enabled())
        hidden = packed.predicting(output.last_hidden_state)
        loss, scores = policy.lm_head(hidden, packed.predicted_N, count=max(1, totals.loss_tokens))
        means = {"entropy": scores.entropy_N, "mean_token_accuracy": scores.top1_N.float()}
        return Measured(loss, output.router, {name: (value.sum(), len(value)) for name, value in means.items()})


class SeparateDocuments(CrossEntropy):
    """Cross entropy for rows of several documents, each of which is a sequence of its own.

    No token attends to another document, and nothing predicts a document's first token.
    """

    columns: tuple[str, ...] = ("input_ids", "documents")

    def example(self, row: dict[str, Any], number: int) -> Example:
        parts = torch.tensor(row["input_ids"]).split(row["documents"])
        parts = tuple(part for part in parts if len(part) > 1) or parts  # one token alone has no loss
        return Example(parts, tuple(torch.arange(len(part)) > 0 for part in parts))


@dataclass
class BradleyTerry:
    """Mean over the step's pairs of -log sigmoid(chosen - rejected) + center_coef * (chosen + rejected)^2.

    shares: compute the common prefix of both sides once.
    """

    center_coef: float
    shares: bool = True
    columns: tuple[str, ...] = ("chosen_ids", "rejected_ids")
    uses_dropout: bool = False

    def example(self, row: dict[str, Any], number: int) -> Example:
        chosen, rejected = (torch.tensor(row[name]) for name in self.columns)
        return Example((chosen, rejected), shared=common_start(chosen, rejected) if self.shares else 0)

    def measure(self, model: AnyModel, packed: PackedPass, totals: Totals) -> Measured:
        scorer = unwrap(model)
        output = packed.forward(scorer.model, output_router_logits=torch.is_grad_enabled())
        scores = scorer.score(packed.last(output.last_hidden_state)).squeeze(-1).float()
        chosen, rejected = scores[0::2], scores[1::2]
        loss, metrics = bradley_terry_loss(chosen, rejected, center_coef=self.center_coef, count=totals.rows)
        scores = scores.detach()
        means: dict[str, tuple[Tensor, float]] = {"mean_reward": (scores.sum(), len(scores))}
        means |= {name: (value * len(chosen), len(chosen)) for name, value in metrics.items()}
        return Measured(loss, output.router, means, {"max_reward": scores.max(), "min_reward": -scores.min()})


@dataclass
class Preference:
    """The stage's loss on pairs, from `align.losses.preference`, and its SFT term.

    stage: the stage, for the loss and its options.
    references: log-probabilities of the chosen and rejected completions under the reference, for each row of the data
        set that is read [rows, 2]; None if the loss has no reference.
    shares: compute the prompt of a pair once.
    """

    stage: DpoStage
    references: np.ndarray | None = None
    shares: bool = True
    columns: tuple[str, ...] = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_labels", "rejected_labels")
    uses_dropout: bool = False

    def example(self, row: dict[str, Any], number: int) -> Example:
        values = () if self.references is None else tuple(self.references[number].tolist())
        return pair(row, shares=self.shares, values=values)

    def measure(self, model: AnyModel, packed: PackedPass, totals: Totals) -> Measured:
        stage, policy = self.stage, unwrap(model)
        output = packed.forward(policy.model, output_router_logits=torch.is_grad_enabled())
        hidden = packed.predicting(output.last_hidden_state)
        scores = policy.lm_head(hidden, packed.predicted_N, mean_logits=True)
        logprobs = packed.by_sequence(scores.logprobs_N)
        tokens = packed.by_sequence(torch.ones_like(scores.logprobs_N))
        tensors = by_side(logprobs, "logprobs_B") | by_side(tokens, "tokens_B")
        if packed.values.numel():
            references = packed.values.float().unbind(1)
            tensors |= dict(zip(("ref_chosen_logprobs_B", "ref_rejected_logprobs_B"), references, strict=True))
        options = {"beta": stage.beta, "count": totals.rows, **stage.loss_options}
        loss, metrics = preference_loss(stage.loss_type, tensors, options)
        if stage.sft_coef:
            loss = loss - stage.sft_coef * tensors["chosen_logprobs_B"].sum() / max(1, totals.first_loss_tokens)
        pairs = len(packed.packing.lengths) // 2
        means: dict[str, tuple[Tensor, float]] = {n: (value * pairs, pairs) for n, value in metrics.items()}
        means["entropy"] = (scores.entropy_N.sum(), len(scores.entropy_N))
        top1 = packed.by_sequence(scores.top1_N.float())[0::2].sum()
        counts = {"chosen": int(packed.loss_tokens_S[0::2].sum()), "rejected": int(packed.loss_tokens_S[1::2].sum())}
        means["mean_token_accuracy"] = (top1, counts["chosen"])
        sides = by_side(packed.by_sequence(scores.mean_logits_N), "logits_B")
        for side, count in counts.items():
            means[f"logps/{side}"] = (tensors[f"{side}_logprobs_B"].detach().sum(), pairs)
            means[f"logits/{side}"] = (sides[f"{side}_logits_B"].sum(), count)
        return Measured(loss, output.router, means)


def pair(row: dict[str, Any], *, shares: bool, values: tuple[float, ...] = ()) -> Example:
    """A prompt's two completions; the loss needs the log-probabilities of the completions' tokens with a label."""
    prompt, sides = row["prompt_ids"], ("chosen", "rejected")
    ids = [torch.tensor(prompt + row[f"{side}_ids"]) for side in sides]
    masks = [torch.tensor([IGNORED] * len(prompt) + row[f"{side}_labels"]) != IGNORED for side in sides]
    return Example(tuple(ids), tuple(masks), common_start(*ids) if shares else 0, values)


def by_side(values_S: Tensor, name: str) -> dict[str, Tensor]:
    """The values of a pass's pairs under "chosen_" + name and "rejected_" + name."""
    return {f"chosen_{name}": values_S[0::2], f"rejected_{name}": values_S[1::2]}


def can_share(config: Any) -> bool:
    """True if computing the tokens that two sequences share once gives the same result as computing them twice.

    With a capacity limit an expert's assignments depend on how many tokens the pass has.
    """
    return not getattr(config, "moe_drop_tokens", False)
