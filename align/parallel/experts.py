"""Expert parallelism: each rank of a group holds some of a layer's experts; an all-to-all dispatches tokens to them.

Only the module `Experts` is replaced. Its inputs include the router's choices, so router, shared expert, capacity,
recycling and metrics are unchanged. ZeRO shards a rank's experts over the ranks that hold the same experts.

Shapes: T tokens, D hidden, E experts, k experts per token, G ranks in an expert-parallel group, L experts per rank,
N dispatched rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from align.models.experts import (
    Correction,
    ExpertRows,
    Experts,
    Gather,
    in_autocast_dtype,
    mix_outputs,
    sorting,
)
from align.parallel.sharding import ExpertShard


class AllToAll(torch.autograd.Function):
    """All-to-all of rows within a group: `sent[r]` rows go to rank r. The backward pass returns the gradients."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows_ND, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad_ND, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows_ND: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows_ND.new_empty(sum(received), rows_ND.shape[1])
    dist.all_to_all_single(arrived, rows_ND.contiguous(), received, sent, group=group)
    return arrived


class ShardedExperts(Experts):
    """This rank's experts of a layer, `first` to `first + local - 1`, with the interface of `Experts`.

    `sharded_class` combines it with the class of the whole layer, which computes the experts' outputs.
    """

    def __init__(self, whole: Experts, group: Any, group_name: str):
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(whole).items() if name not in vars(self)})
        for name, module in whole.named_children():  # the activation
            self.add_module(name, module)
        self.group, self.group_name, self.ranks = group, group_name, dist.get_world_size(group)
        self.local = whole.num_experts // self.ranks
        self.first = self.local * dist.get_rank(group)
        for name, stacked in whole.named_parameters(recurse=False):
            shard = stacked.detach()[self.first : self.first + self.local].clone()
            parameter = nn.Parameter(shard, requires_grad=stacked.requires_grad)
            self.register_parameter(name, mark(parameter, group_name, ExpertShard(self.num_experts, self.ranks)))
        self.train(whole.training)

    @property
    def local_experts(self) -> slice:
        return slice(self.first, self.first + self.local)

    def forward(
        self,
        hidden_TD: Tensor,
        experts_Tk: Tensor,
        weights_Tk: Tensor,
        *,
        complete: bool = False,
        **corrections: Correction,
    ) -> Tensor:
        """As `Experts.forward`: the sum over a token's experts of weight * expert(token); index -1 means no expert.

        Collective within the group: a rank without tokens must call it as well.
        """
        (hidden_TD,) = in_autocast_dtype(hidden_TD)
        dispatched = partial(self.dispatched, partial(self.outputs, corrections=corrections))
        return mix_outputs(hidden_TD, experts_Tk, weights_Tk, self.num_experts, dispatched, complete=complete)

    def dispatched(
        self, compute: Callable[[Tensor, ExpertRows], Tensor], rows_ND: Tensor, division: ExpertRows
    ) -> Tensor:
        """Dispatch rows that are sorted by expert, compute them on their experts' ranks and return the outputs [N, D].

        Rows without an expert are not dispatched; their output is zero.
        """
        leaving_E = torch.diff(division.ends_E, prepend=division.ends_E.new_zeros(1)).long()
        arriving_E = torch.empty_like(leaving_E)
        dist.all_to_all_single(arriving_E, leaving_E, group=self.group)
        # The collectives need the sizes on the host. This copy is the layer's only wait for the GPU.
        both_2GL = torch.stack((leaving_E, arriving_E)).view(2, self.ranks, self.local).tolist()
        sent, received = ([sum(counts) for counts in of_ranks] for of_ranks in both_2GL)
        rows = AllToAll.apply(rows_ND[: sum(sent)], sent, received, self.group)
        # Rows arrive ordered by sending rank, then by expert; the computation needs them ordered by expert.
        expert = torch.arange(self.local, device=rows.device).repeat(self.ranks)
        _, order, inverse = sorting(expert.repeat_interleave(arriving_E, output_size=len(rows)))
        ends_L = arriving_E.view(self.ranks, self.local).sum(0).cumsum(0).to(torch.int32)
        counts_L = [sum(counts) for counts in zip(*both_2GL[1], strict=True)]
        local = ExpertRows(ends_L, len(rows), complete=True, on_host=[*counts_L, 0])
        outputs = compute(Gather.apply(rows, order, inverse, 1), local)
        returned: Tensor = AllToAll.apply(Gather.apply(outputs, inverse, order, 1), received, sent, self.group)
        if division.complete:
            return returned
        return torch.cat([returned, returned.new_zeros(len(rows_ND) - len(returned), returned.shape[1])])


class TrainedShardedExperts(ShardedExperts, AutoEPMoELayer):
    """Sharded experts that train.

    DeepSpeed reduces the gradients of expert-parallel parameters separately only if the model has a layer of its class
    `AutoEPMoELayer`; without such a layer it refuses these parameters below ZeRO 3. Nothing else of the class is used.
    """

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """No-op: the constructor has set the groups."""


_SHARDED: dict[tuple[type, bool], type[ShardedExperts]] = {}


def sharded_class(whole: type[Experts], trained: bool) -> type[ShardedExperts]:
    """Class of the sharded experts of a layer whose class is `whole`."""
    kind = TrainedShardedExperts if trained else ShardedExperts
    if whole is Experts:
        return kind
    if (whole, trained) not in _SHARDED:
        _SHARDED[whole, trained] = type(f"Sharded{whole.__name__}", (kind, whole), {})
    return _SHARDED[whole, trained]


def mark(parameter: nn.Parameter, group_name: str, shard: ExpertShard) -> nn.Parameter:
    """Mark a parameter as expert-parallel for DeepSpeed: ZeRO then shards it over the ranks with the same experts."""
    parameter.expert_shard = shard
    parameter.allreduce = False  # ZeRO 1 and 2
    parameter.group_name = group_name
    parameter.ds_zero_placement_family = "autoep_expert"  # ZeRO 3
    parameter.ds_zero_partition_group_name = group_name
    parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(group_name)
    return parameter


def shard_experts(model: nn.Module, size: int, *, trained: bool = True) -> None:
    """Replace every `Experts` of a model by this rank's shard; `size` consecutive ranks form a group.

    size: 1 leaves the model unchanged.
    trained: True if the experts or their adapters train.
    """
    if size == 1:
        return
    name = f"ep_size_{size}"
    groups._create_expert_and_data_parallel(size)
    group = groups._get_expert_parallel_group(name)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, Experts):
                setattr(parent, key, sharded_class(type(child), trained)(child, group, name))


def mark_adapters(model: nn.Module) -> None:
    """Mark the adapters of sharded experts as expert-parallel, like the experts themselves."""
    from align.models.lora.experts import ExpertAdapter

    for module in model.modules():
        if isinstance(module, ExpertAdapter) and isinstance(experts := module.get_base_layer(), ShardedExperts):
            for parameter in module.factors():
                mark(parameter, experts.group_name, ExpertShard(experts.num_experts, experts.ranks))
