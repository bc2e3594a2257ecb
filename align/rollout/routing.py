"""Expert routing recorded during generation, for the trainer to replay.

On a GPU vLLM returns the routing itself. Its CPU build cannot, because only the V2 model runner returns the routing,
and that runner needs Triton. On a CPU our model class and the routers of vLLM's own classes report the experts of each
forward pass, and the recorder assigns them to requests.

Shapes: T tokens of one forward pass (of all running sequences), k experts per token. A completion's routing is int16
[layers, tokens - 1, k], -1 where a layer has no routed experts or fewer than k.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from align.models.family import FamilyConfig, routed_layers


def moe_layers(config: FamilyConfig) -> list[int]:
    """Experts per token in each layer; 0 for a layer without routed experts."""
    return [layer.top_k if layer.experts > 1 else 0 for layer in routed_layers(config)]


class RoutingRecorder:
    """Records the routing of a vLLM model runner in this process.

    Each forward pass mixes tokens of many requests: whole prompts, pieces of them, single new tokens. The runner knows
    the request of each token; the token's position is its index in the sequence. A pre-empted request computes its
    tokens again, and the later routing replaces the earlier one. Tokens served from the prefix cache are not
    recomputed, so their routing cannot be recorded; the engine must not read that cache.

    top_k: experts per token in each layer, see `moe_layers`.
    """

    def __init__(self, runner: Any, top_k: list[int]):
        self.runner = runner
        self.top_k = top_k
        self.layers = len(self.top_k)
        self._step: Tensor | None = None
        self._pieces: dict[str, list[tuple[numpy.ndarray, numpy.ndarray]]] = defaultdict(list)
        model: Any = runner.get_model()
        routed = {layer for layer, k in enumerate(top_k) if k}
        if missing := sorted(routed - capture_from_routers(model, self._capture)):
            raise RuntimeError(f"vLLM's {type(model).__name__} has no router in layers {missing} that reports experts")
        # Not hooks of `model.model`: vLLM's own classes may call its `forward` directly.
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, with_kwargs=True)

    def take(self, request_id: str, tokens: int) -> numpy.ndarray:
        """Return the routing [layers, tokens, k] of a finished request and discard its record."""
        routing = numpy.full((self.layers, tokens, max(1, *self.top_k)), -1, dtype=numpy.int16)
        seen = numpy.zeros(tokens, dtype=bool)
        for positions, piece in self._pieces.pop(request_id, []):
            # vLLM schedules ahead, so it may have computed one token after the last sampled one.
            inside = positions < tokens
            routing[:, positions[inside]] = piece[:, inside]
            seen[positions[inside]] = True
        if not seen.all():
            raise RuntimeError(f"the routing of {int((~seen).sum())} of {tokens} tokens was not recorded")
        return routing

    def _begin(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self._positions = arguments[1] if len(arguments) > 1 else named["positions"]
        self._step = torch.full((self.layers, len(self._positions), max(1, *self.top_k)), -1, dtype=torch.int16)

    def _capture(self, layer: int, experts_Tk: Tensor) -> None:
        if self._step is not None:
            self._step[layer, :, : experts_Tk.shape[1]] = experts_Tk

    def _end(self, module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        batch = self.runner.input_batch
        step, positions = self._step, self._positions.numpy().copy()
        self._step = None
        assert step is not None
        starts = self.runner.query_start_loc.np[: batch.num_reqs + 1]
        for request, start, end in zip(batch.req_ids, starts[:-1], starts[1:]):
            # vLLM appends a random suffix to the request's number.
            self._pieces[request.rpartition("-")[0]].append((positions[start:end], step[:, start:end].numpy()))


def capture_from_routers(model: nn.Module, capture: Callable[[int, Tensor], None]) -> set[int]:
    """Let each router call `capture(layer, experts [T, k])`; returns the layers that have routers."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    found: set[int] = set()
    module: Any
    for module in model.modules():
        if hasattr(module, "capture_fn"):  # our class
            module.capture_fn = partial(capture, module.layer_id)
        elif isinstance(module, MoERunner):
            module.router.set_capture_fn(partial(capture, module.layer_id))
        else:
            continue
        found.add(module.layer_id)
    return found


def checked_routing(returned: numpy.ndarray | None, top_k: list[int]) -> numpy.ndarray:
    """Convert routing as vLLM returns it, [tokens - 1, layers, k], to a completion's, and check that it is complete.

    A token whose entries are all zero was not recorded by vLLM (vLLM issue 54730). With k > 1 this is certain, because
    the experts of a token differ. With k = 1, expert 0 is a valid choice, so it is an error only if more than half of
    the tokens have zeros in every layer.
    """
    if returned is None:
        raise RuntimeError("rollout.return_routing is set, but vLLM returned no routed experts")
    routing = returned.astype(numpy.int16).transpose(1, 0, 2)
    routed = [layer for layer, k in enumerate(top_k) if k]
    empty = (routing[routed] == 0).all(axis=(0, 2))
    several = any(k > 1 for k in top_k)
    if empty.any() and (several or empty.mean() > 0.5):
        raise RuntimeError(
            f"vLLM returned no routing for {int(empty.sum())} of {len(empty)} tokens (their rows are all zero). "
            "Set rollout.return_routing: false."
        )
    for layer, k in enumerate(top_k):
        routing[layer, :, k:] = -1
    return routing
