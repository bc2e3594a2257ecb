"""Bytes that a forward pass saves for the backward pass.

The method follows Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv
2205.05198). They count 34 T D bytes for a dense layer in fp16, plus the attention matrix. Here a family's `Activations`
give the bytes of its layers: HunYuan's by formulas, those of other families by a forward pass on torch's meta device.

Letters: T tokens, D hidden size, k experts per token, a bytes per activation value.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.lora import Lora
from align.plan.sizes import LayerShape, ModelShape

SHORT = 128
"""Longest sequence, in tokens, for which attention on a CPU uses our own code. That code saves the attention weights.

Equals `LONGEST` of `align.models.short_attention`, which is not imported because that loads torch."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of one rank.

    tokens: tokens of the micro-batch, padding included.
    length: tokens per sequence, padding included.
    padded: sequences are padded, so attention takes a mask.
    bytes_per_value: bytes per activation value.
    bytes_per_weight: bytes per weight.
    """

    tokens: int
    length: int
    padded: bool
    bytes_per_value: int
    bytes_per_weight: int
    lora: Lora | None = None
    """LoRA settings; None without adapters. Under LoRA, frozen norms and matrices save nothing for weight gradients."""
    bytes_per_adapter: int = 4
    """Bytes per weight of the adapters."""
    looped: bool = False
    """The experts run one after another (on a CPU, or in fp32) instead of in one grouped matrix multiplication."""
    pairs: bool = False
    """Every second sequence shares its first tokens with the one before it, so attention works on a padded copy."""
    on_cpu: bool = False
    """Attention runs on a CPU, where it saves attention weights [H, T, T] in some cases."""

    @property
    def short(self) -> bool:
        """True if attention runs the code for short sequences."""
        return self.on_cpu and not self.padded and self.bytes_per_value == 4 and self.length <= SHORT


def mlp_bytes(width: int, a: int, *, trained: bool = True) -> int:
    """Bytes per token that a SwiGLU MLP saves: gate, up and, if its matrices are trained, gate times up."""
    return (3 if trained else 2) * width * a


def routed_bytes(hidden_size: int, layer: LayerShape, run: Pass) -> int:
    """Bytes per token that routed experts save: k copies of the hidden state, k times the activations, k outputs.

    The copies are sorted by expert. Frozen experts in a grouped matrix multiplication do not save these copies.
    """
    if not layer.experts:
        return 0
    a, k, trained = run.bytes_per_value, layer.top_k, run.looped or run.lora is None or run.lora.experts
    return (2 if trained else 1) * k * hidden_size * a + k * mlp_bytes(layer.expert_width, a, trained=trained)


def layer_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> float:
    """Bytes that one layer saves for all tokens of the pass."""
    return run.tokens * sum(shape.activations.layer(layer, run))


def feed_forward_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> float:
    """The part of `layer_bytes` that experts and MLP save, which is freed once their gradients are complete."""
    return run.tokens * shape.activations.layer(layer, run).feed_forward


def checkpoint_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes that a layer saves under activation checkpointing: its input, router values, and kept keys and values."""
    kept = shape.hidden_size + shape.keeps_kv * layer.cache
    routing = (4 * layer.num_experts + 20 * layer.top_k) if layer.experts else 0
    return run.tokens * (run.bytes_per_value * kept + routing)


def backward_bytes(shape: ModelShape, layer: LayerShape, run: Pass, *, scorer: bool = False) -> int:
    """Bytes of the activation gradients that exist at the same time inside a layer's widest MLP.

    The gradients of gate, up and their product exist at the same time, but the saved product has been freed, so two
    widths and two hidden states count. In a language model a third width and a third hidden state count, which include
    the gradient that its loss leaves.
    """
    width, copies = max(layer.mlp_width, layer.top_k * layer.expert_width if layer.experts else 0), 2 if scorer else 3
    return copies * run.tokens * run.bytes_per_value * (width + shape.hidden_size)
