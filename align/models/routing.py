"""Routing of one forward pass: each layer's assignments and the report over all layers.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from align.losses.moe import balance_loss, expert_load, router_entropy, router_z_loss


class Routing(NamedTuple):
    """Assignments of one layer.

    logits_TE: router logits, fp32.
    chosen_Tk: experts chosen by the router or replayed, int64.
    experts_Tk: experts that compute the token, int64: `chosen_Tk` after the capacity limit; -1 if dropped.
    weights_Tk: combine weights, fp32.
    complete: True if no capacity limit was applied, so that no assignment was dropped.
    sigmoid: True if the router scores experts by a sigmoid instead of a softmax.
    """

    logits_TE: Tensor
    chosen_Tk: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor
    complete: bool = False
    sigmoid: bool = False

    @property
    def scores_TE(self) -> Tensor:
        """Logits whose softmax is the distribution over the experts; for sigmoid scores s that is s / sum(s)."""
        return torch.nn.functional.logsigmoid(self.logits_TE) if self.sigmoid else self.logits_TE


class RouterCoefficients(Protocol):
    """The configuration's weights of the router losses in the training loss."""

    router_aux_loss_coef: float
    router_z_loss_coef: float


class RouterReport(NamedTuple):
    """Router statistics of one forward pass, averaged over MoE layers and valid tokens.

    balance_loss, z_loss: scalars with a gradient.
    load: per layer, the share of assignments per expert [E], before the capacity limit.
    entropy: entropy of the routers' distributions in nats.
    recycled, dropped: shares of assignments that moved to another expert, or were dropped, because their expert was
        full.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: tuple[Tensor, ...]
    entropy: Tensor
    recycled: Tensor
    dropped: Tensor

    def loss(self, config: RouterCoefficients) -> Tensor:
        """The term that is added to the training loss."""
        return config.router_aux_loss_coef * self.balance_loss + config.router_z_loss_coef * self.z_loss

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for the log, without gradient, on the report's device.

        expert_load_max: largest expert load times E, averaged over layers; 1 is uniform.
        """
        return {
            "aux_loss": self.balance_loss.detach(),
            "router_z_loss": self.z_loss.detach(),
            "router_entropy": self.entropy,
            "expert_load_max": torch.stack([load.max() * load.numel() for load in self.load]).mean(),
            "recycled_share": self.recycled,
            "dropped_share": self.dropped,
        }


def report_routing(routings: list[Routing], mask_T: Tensor) -> RouterReport:
    """Summarise the layers' routings; tokens whose mask is 0 do not count."""
    mask = mask_T.float()

    def mean(measure: Callable[[Routing], Tensor]) -> Tensor:
        return torch.stack([measure(routing) for routing in routings]).mean()

    def share(moved: Callable[[Routing], Tensor]) -> Tensor:
        return mean(lambda r: (moved(r) * mask[:, None]).sum() / (mask.sum() * r.chosen_Tk.shape[1]).clamp_min(1.0))

    balance = mean(lambda r: balance_loss(r.scores_TE, r.chosen_Tk, mask))
    z_loss = mean(lambda r: router_z_loss(r.logits_TE, mask))
    with torch.no_grad():
        return RouterReport(
            balance_loss=balance,
            z_loss=z_loss,
            load=tuple(expert_load(r.chosen_Tk, r.logits_TE.shape[-1], mask) for r in routings),
            entropy=mean(lambda r: router_entropy(r.scores_TE, mask)),
            recycled=share(lambda r: (r.experts_Tk != r.chosen_Tk) & (r.experts_Tk >= 0)),
            dropped=share(lambda r: r.experts_Tk < 0),
        )


def choices_of_layers(routings: list[Routing | None]) -> Tensor:
    """Experts chosen by the routers [T, layers, k], int16; -1 in layers without a router and beyond a layer's k."""
    known = [routing.chosen_Tk for routing in routings if routing is not None]
    width = max(chosen.shape[1] for chosen in known)
    table = known[0].new_full((len(known[0]), len(routings), width), -1, dtype=torch.int16)
    for layer, routing in enumerate(routings):
        if routing is not None:
            table[:, layer, : routing.chosen_Tk.shape[1]] = routing.chosen_Tk
    return table
