"""Bytes that a forward pass saves for the backward pass, counted operation by operation.

The method follows Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv
2205.05198). They count 34 T D bytes for a dense layer in fp16, plus the attention matrix. This module counts the
operations of `align.models.hunyuan`.

Letters: T tokens, D hidden size, k experts per token, a bytes per activation value.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.parts import Lora
from align.plan.shape import LayerShape, ModelShape


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
    looped: bool = False
    """The experts run one after another (on a CPU, or in fp32) instead of in one grouped matrix multiplication."""


def norm_bytes(size: int, run: Pass) -> int:
    """Bytes per token that an RMSNorm with fp32 weights saves: input, 1 / rms(x) and output.

    With bf16 weights, x / rms(x) in fp32 is saved instead of the input, and also in bf16 if the weight is trained.
    """
    a = run.bytes_per_value
    rounded = a if run.bytes_per_weight < 4 and not run.lora else 0
    return (4 + rounded + a) * size + 4


def attention_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes per token that attention saves: queries, output, log-sum-exp, and the keys and values that the layer owns.

    Rotary embeddings save nothing. With QK norm, the normalised queries and keys are saved in fp32, besides the values
    that attention uses. With a mask, every layer saves its keys and values repeated for all query heads, and the mask
    in the dtype of the activations.
    """
    a, query, kv = run.bytes_per_value, shape.query_size, shape.kv_size
    rounded = a if a < 4 else 0
    queries = (4 + (0 if run.lora else rounded) + a if shape.qk_norm else a) * query
    attended = 0 if run.padded else (rounded if shape.qk_norm else a) + a
    owner = ((4 if shape.qk_norm else 0) + attended) * kv * layer.owns_kv
    repeated = 2 * a * query + a * run.length if run.padded else 0
    norms = 4 * (shape.heads + shape.kv_heads * layer.owns_kv) if shape.qk_norm else 0
    return queries + owner + repeated + a * query + 4 * shape.heads + norms


def mlp_bytes(width: int, a: int, *, trained: bool = True) -> int:
    """Bytes per token that a SwiGLU MLP saves: gate, up and, if its matrices are trained, gate times up."""
    return (3 if trained else 2) * width * a


def experts_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes per token that routed experts save: k copies of the hidden state, activations, k outputs, router values.

    The copies are sorted by expert. Frozen experts in a grouped matrix multiplication do not save them.
    """
    if not layer.experts:
        return 0
    a, k, trained = run.bytes_per_value, layer.top_k, run.looped or run.lora is None or run.lora.experts
    copies = (2 if trained else 1) * k * shape.hidden_size * a + k * mlp_bytes(shape.expert_width, a, trained=trained)
    router = (4 * shape.hidden_size if a < 4 else 0) + 3 * 4 * layer.num_experts + 32 * k
    return copies + router


def layer_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes that one layer saves for all tokens of the pass."""
    rest = 2 * norm_bytes(shape.hidden_size, run) + attention_bytes(shape, layer, run) + _adapter_bytes(layer, run)
    return run.tokens * rest + feed_forward_bytes(shape, layer, run)


def feed_forward_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """The part of `layer_bytes` that experts and MLP save. It is freed once their gradients are complete."""
    trained = run.lora is None or run.lora.shared_mlp
    mlp = mlp_bytes(layer.mlp_width, run.bytes_per_value, trained=trained)
    return run.tokens * (experts_bytes(shape, layer, run) + mlp)


def _adapter_bytes(layer: LayerShape, run: Pass) -> int:
    """Bytes per token that adapters on attention and MLP save: the `rank` outputs of each A matrix."""
    if run.lora is None:
        return 0
    pairs = (2 + 2 * layer.owns_kv) * run.lora.attention + 3 * run.lora.shared_mlp * bool(layer.mlp_width)
    return pairs * run.lora.rank * run.bytes_per_value


def merged_experts(layer: LayerShape, run: Pass) -> int:
    """Bytes of a layer's expert weights with the adapters added, which PEFT saves for the backward pass.

    Zero without LoRA on experts. Counted under DeepSpeed too, although `align.models.lora.experts` does not build these
    weights there.
    """
    return layer.experts * run.bytes_per_value if run.lora is not None and run.lora.experts else 0


def checkpoint_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes that a layer saves under activation checkpointing: its input, router values, and own keys and values."""
    kept = shape.hidden_size + 2 * shape.kv_size * layer.owns_kv
    routing = (4 * layer.num_experts + 20 * layer.top_k) if layer.experts else 0
    return run.tokens * (run.bytes_per_value * kept + routing)


def backward_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes of the activation gradients that exist at the same time inside a layer's widest MLP."""
    width = max(layer.mlp_width, layer.top_k * shape.expert_width if layer.experts else 0)
    return run.tokens * run.bytes_per_value * (3 * width + 3 * shape.hidden_size)
