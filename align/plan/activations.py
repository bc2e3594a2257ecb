"""Bytes that a forward pass saves for the backward pass, counted operation by operation.

The method is that of Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv
2205.05198), who count 34 T D bytes for a dense layer in fp16, besides the attention matrix. Here the operations are
those of `align.models.hunyuan`.

Letters: T tokens, D hidden, A = H d query size, K key/value size, F MLP width, E experts, k experts per token, a bytes
per activation value.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.parts import Lora
from align.plan.shape import LayerShape, ModelShape


@dataclass(frozen=True)
class Pass:
    """One forward pass of one rank.

    tokens: padding included.
    length: tokens of a sequence.
    padded: the pass has an attention mask.
    bytes_per_value, bytes_per_weight: of activations and weights.
    """

    tokens: int
    length: int
    padded: bool
    bytes_per_value: int
    bytes_per_weight: int
    lora: Lora | None = None
    """Adapters; frozen norms and matrices then save nothing for a gradient of their own."""
    looped: bool = False
    """The experts run one after another (on a CPU, or in fp32) instead of as one grouped product."""


def norm_bytes(size: int, run: Pass) -> int:
    """RMSNorm, per token: 1 / rms(x), its input (for fp32 weights), and its output.

    With bf16 weights, x / rms(x) in fp32 takes the place of the input; it is also saved in bf16 if the weight is
    trained.
    """
    a = run.bytes_per_value
    rounded = a if run.bytes_per_weight < 4 and not run.lora else 0
    return (4 + rounded + a) * size + 4


def attention_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Attention, per token: normalised and final queries, keys and values if the layer owns them, output, log-sum-exp.

    Rotations save nothing. Values narrower than fp32 are saved together with the fp32 values they were rounded from.
    With a mask, the keys and values of every layer are repeated for all heads, and the mask is saved as numbers.
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
    """SwiGLU, per token: gate, up, and their product, which only the gradient of a trained matrix needs."""
    return (3 if trained else 2) * width * a


def experts_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Routed experts, per token: k sorted copies, the experts' activations, k outputs, and the router's values.

    Frozen experts in a grouped product do not save the copies.
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
    """The share of `layer_bytes` saved by experts and MLP; it is freed once their gradients are complete."""
    trained = run.lora is None or run.lora.shared_mlp
    mlp = mlp_bytes(layer.mlp_width, run.bytes_per_value, trained=trained)
    return run.tokens * (experts_bytes(shape, layer, run) + mlp)


def _adapter_bytes(layer: LayerShape, run: Pass) -> int:
    """Low-rank products, per token."""
    if run.lora is None:
        return 0
    pairs = (2 + 2 * layer.owns_kv) * run.lora.attention + 3 * run.lora.shared_mlp * bool(layer.mlp_width)
    return pairs * run.lora.rank * run.bytes_per_value


def merged_experts(layer: LayerShape, run: Pass) -> int:
    """The sum of expert matrices and adapters, which PEFT saves for the backward pass under LoRA on experts.

    It is counted under DeepSpeed too, where `align.models.lora.experts` does not build it.
    """
    return layer.experts * run.bytes_per_value if run.lora is not None and run.lora.experts else 0


def checkpoint_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Bytes that a checkpointed layer saves: its input, and its own keys and values, which the next layers read."""
    kept = shape.hidden_size + 2 * shape.kv_size * layer.owns_kv
    routing = (4 * layer.num_experts + 20 * layer.top_k) if layer.experts else 0
    return run.tokens * (run.bytes_per_value * kept + routing)


def backward_bytes(shape: ModelShape, layer: LayerShape, run: Pass) -> int:
    """Gradients of activations that are live at the same time, inside the widest MLP of a layer."""
    width = max(layer.mlp_width, layer.top_k * shape.expert_width if layer.experts else 0)
    return run.tokens * run.bytes_per_value * (3 * width + 3 * shape.hidden_size)
