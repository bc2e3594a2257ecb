"""HunYuan for vLLM: the model of `modeling.py` on vLLM's paged cache, with weights that can be updated in place.

Every forward pass reads the parameters themselves. vLLM's CPU layers compute with copies that they repack once, after
the first load. The copies go stale when weights change (measured: reloading the same weights moved a log-probability by
0.19). Here linear layers, head and experts compute with their parameters, so an update is a plain `load_weights`.

On a CPU vLLM's fused kernel computes the routed experts if it supports them; their parameters are then stored in the
kernel's order. Otherwise `mix_experts` computes them, as in training. On a GPU vLLM's fused kernels may be faster, but
have not been compared with our model.

Tensor parallelism shards heads and the MLPs' width; the router is replicated. It has been tested with two CPU ranks.
Pipeline parallelism and quantization are not supported.

Shapes: T tokens of all running sequences, D hidden, H query heads, K key/value heads, d head size, E experts,
k experts per token, F expert width; H, K and F are rank-local.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.platforms import current_platform

from align.losses.linear_head import linear_logits
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.layout import VLLM_MERGED, VllmPlace, layer_of, vllm_pieces, vllm_place
from align.models.hunyuan.moe import route
from align.models.hunyuan.vllm_experts import Experts
from align.models.hunyuan.vllm_kernels import RMSNorm, Rotation, rms_norm


class LiveLinear(UnquantizedLinearMethod):
    """Compute x W^T + b with the parameter itself. A repacked copy would be stale after an update."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LiveHead(UnquantizedEmbeddingMethod):
    """As `LiveLinear`, for the output head, which may be tied to the embedding.

    Logits are fp32, as in the trainer. Rounded to bf16, they would differ from the trainer's by up to 0.4 %.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear_logits(x, layer.weight)
        return logits if bias is None else logits + bias


Layer = TypeVar("Layer", bound=nn.Module)


def live(layer: Layer) -> Layer:
    """Make a vLLM linear layer compute with its parameter."""
    layer.quant_method = LiveLinear()  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """Grouped-query attention; the layers of a cross-layer group attend to the cache of its first layer.

    The cache stores rotated keys divided by their rms, without the norm's weight; each layer multiplies its queries by
    its own key-norm weight instead (see `modeling.Attention`). Sharing one cache per group is therefore exact.
    """

    def __init__(self, vllm_config: VllmConfig, config: HunYuanConfig, layer: int, prefix: str):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.config = config
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        owner = config.kv_owner(layer)
        self.owns_kv = owner == layer
        self.query_size = heads // ranks * self.head_dim
        # With more ranks than key/value heads, each head is replicated on several ranks.
        self.kv_size = max(1, kv_heads // ranks) * self.head_dim
        bias = config.attention_bias
        if self.owns_kv:
            self.qkv_proj = live(
                QKVParallelLinear(
                    config.hidden_size, self.head_dim, heads, kv_heads, bias=bias, prefix=f"{prefix}.qkv_proj"
                )
            )
        else:
            self.q_proj = live(
                ColumnParallelLinear(config.hidden_size, heads * self.head_dim, bias=bias, prefix=f"{prefix}.q_proj")
            )
        self.o_proj = live(
            RowParallelLinear(heads * self.head_dim, config.hidden_size, bias=bias, prefix=f"{prefix}.o_proj")
        )
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        model: Any = vllm_config.model_config
        self.padding = _kernel_head_dim(self.head_dim, model.dtype) - self.head_dim
        self.attn = PagedAttention(
            heads // ranks,
            self.head_dim + self.padding,
            self.head_dim**-0.5,
            num_kv_heads=self.kv_size // self.head_dim,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=None if self.owns_kv else _name_of(owner, prefix) + ".attn",
        )
        self.attn.use_direct_call = True  # the custom op is for torch.compile, which is not used

    def forward(self, hidden_TD: Tensor, positions: Tensor, rotate: Rotation) -> Tensor:
        eps = self.config.rms_norm_eps
        key = value = None
        if self.owns_kv:
            projected, _ = self.qkv_proj(hidden_TD)
            query, key, value = projected.split([self.query_size, self.kv_size, self.kv_size], dim=-1)
            rotate(positions, query, key)
            key, value = self._heads(key), self._heads(value).contiguous()
            if self.config.use_qk_norm:
                key = rms_norm(key, None, eps)
        else:
            query, _ = self.q_proj(hidden_TD)
            rotate(positions, query, None)
        query = self._heads(query)
        if self.config.use_qk_norm:
            query = rms_norm(query, self.query_layernorm.weight * self.key_layernorm.weight, eps)
        return self.o_proj(self._attend(query, key, value))[0]

    def _attend(self, query: Any, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Query [T, H, d] and, in a layer that owns keys and values, key and value [T, K, d] -> [T, H * d]."""
        if not self.padding:
            return self.attn(query, key, value)
        # Padding with zeros changes neither q . k nor the first d components of the weighted values.
        query, key, value = (
            None if x is None else nn.functional.pad(x, (0, self.padding)) for x in (query, key, value)
        )
        return self.attn(query, key, value).unflatten(-1, query.shape[1:])[..., : self.head_dim].flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _kernel_head_dim(head_dim: int, dtype: torch.dtype) -> int:
    """Head size to which heads are padded: the smallest that the kernel on this device supports, at least
    `head_dim`."""
    if not current_platform.is_cpu():
        # In float32 vLLM has two backends: Triton for heads of at least 32, and FlexAttention, which must be compiled.
        return max(32, head_dim) if dtype == torch.float32 else head_dim
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return min(size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_dim)


def _name_of(layer: int, prefix: str) -> str:
    """Name of another layer's module: `prefix` with the layer index replaced."""
    return re.sub(r"(?<=\.layers\.)\d+", str(layer), prefix)


class SwiGlu(nn.Module):
    """down(act(gate(x)) * up(x)): the dense MLP and the shared expert."""

    def __init__(self, config: HunYuanConfig, width: int, prefix: str):
        super().__init__()
        bias = config.mlp_bias
        self.gate_up_proj = live(
            MergedColumnParallelLinear(config.hidden_size, [width, width], bias=bias, prefix=f"{prefix}.gate_up_proj")
        )
        self.down_proj = live(RowParallelLinear(width, config.hidden_size, bias=bias, prefix=f"{prefix}.down_proj"))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(self.act(gate).mul_(up))[0]


class Router(nn.Module):
    """Linear router in fp32; its weight has the published name."""

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.wg = nn.Linear(config.hidden_size, config.experts_in(layer), bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return nn.functional.linear(hidden_TD.float(), self.wg.weight.float())


class MoeBlock(nn.Module):
    """Shared expert plus weighted routed experts.

    `layer_id` and `capture_fn` are those of vLLM's RoutedExpertsCaptureSource: if `capture_fn` is set, it is called
    with the chosen experts [T, k] of each forward pass.
    """

    def __init__(self, config: HunYuanConfig, layer: int, prefix: str):
        super().__init__()
        self.layer_id = layer
        self.capture_fn: Callable[[Tensor], None] | None = None
        self.top_k = config.top_k_in(layer)
        self.gate = Router(config, layer)
        self.experts = Experts(config, layer)
        width = config.shared_width(layer)
        self.shared_mlp = SwiGlu(config, width, f"{prefix}.shared_mlp") if width else None

    def forward(self, hidden_TD: Tensor) -> Tensor:
        routing = route(self.gate(hidden_TD), self.top_k)
        if self.capture_fn is not None:
            self.capture_fn(routing.chosen_Tk)
        output = self.experts(hidden_TD, routing.experts_Tk, routing.weights_Tk)
        return output if self.shared_mlp is None else output.add_(self.shared_mlp(hidden_TD))


class DecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, config: HunYuanConfig, layer: int, prefix: str):
        super().__init__()
        self.self_attn = Attention(vllm_config, config, layer, f"{prefix}.self_attn")
        is_moe = config.experts_in(layer) > 1
        self.mlp = (
            MoeBlock(config, layer, f"{prefix}.mlp")
            if is_moe
            else SwiGlu(config, config.intermediate_size, f"{prefix}.mlp")
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_TD: Tensor | None, sum_TD: Tensor, positions: Tensor, rotate: Rotation) -> Tensor:
        """Add the previous layer's output (None in the first layer) and this layer's attention to the residual stream
        `sum_TD` in place; returns the MLP's output."""
        norm = self.input_layernorm
        hidden_TD = norm(sum_TD) if hidden_TD is None else norm.add(hidden_TD, sum_TD)
        hidden_TD = self.self_attn(hidden_TD, positions, rotate)
        return self.mlp(self.post_attention_layernorm.add(hidden_TD, sum_TD))


class HunYuanModel(nn.Module):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                DecoderLayer(vllm_config, config, layer, f"{prefix}.layers.{layer}")
                for layer in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        model: Any = vllm_config.model_config
        self.rotate = Rotation(config, model.max_model_len, model.dtype)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        # The layers add to the residual in place.
        residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        hidden = None
        for layer in self.layers:
            hidden = layer(hidden, residual, positions, self.rotate)
        return self.norm(residual) if hidden is None else self.norm.add(hidden, residual)


@dataclass
class Update:
    """A weight update in progress.

    digest: function that fingerprints a tensor.
    pieces: published names received so far, per parameter.
    digests: digest of each published weight.
    """

    digest: Callable[[Tensor], str]
    pieces: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    digests: dict[str, str] = field(default_factory=dict)


class HunYuanForCausalLM(nn.Module, SupportsLoRA):
    """Language model with vLLM's model interface.

    vLLM's LoRA is supported on attention, on dense or shared MLPs and on routed experts. A trained router must be
    merged into the checkpoint.
    """

    packed_modules_mapping = {merged: list(projections) for merged, projections in VLLM_MERGED.items()}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        if vllm_config.quant_config is not None:
            raise ValueError("quantization is not supported for HunYuan: its layers compute with their parameters")
        self.config: Any = vllm_config.model_config.hf_config
        self.model = HunYuanModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        self.lm_head.quant_method = LiveHead()
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.model.embed_tokens.quant_method = LiveHead()
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self._update: Update | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """input_ids, positions [T] -> hidden states [T, D]."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def begin_update(self, digest: Callable[[Tensor], str]) -> None:
        """Begin an update: until `finish_update`, each call of `load_weights` may load a part of the weights.

        digest: function that fingerprints a tensor; sender and receiver use the same one.
        """
        self._update = Update(digest)

    def finish_update(self) -> dict[str, str]:
        """End an update, which must be complete; returns a digest per published name.

        With one rank the digests are those of the parameters, so they also verify the copy. With several ranks they are
        those of the received tensors.
        """
        update, self._update = self._update, None
        if update is None:
            raise RuntimeError("finish_update was called without begin_update")
        self._require_all(update.pieces)
        if get_tensor_model_parallel_world_size() > 1:
            return update.digests
        parameters = dict(self.named_parameters())
        return {name: update.digest(self._live(parameters, name)) for name in update.digests}

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy published weights into the parameters: all of them at the start, or some of them during an update.

        Returns the names of the loaded parameters. Raises `ValueError` for an unknown name and, outside an update, for
        an incomplete parameter. During an update `finish_update` checks completeness: a half-updated model would sample
        from a policy that never existed.
        """
        parameters = dict(self.named_parameters())
        pieces = defaultdict(set) if self._update is None else self._update.pieces
        several = get_tensor_model_parallel_world_size() > 1
        loaded = set()
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            place = vllm_place(name, self.config)
            if place.parameter not in parameters:
                raise ValueError(f"the weight '{name}' is not part of this model")
            parameter = parameters[place.parameter]
            if place.expert is not None:
                self._experts(place).load(place.expert, place.projection, weight)
            elif place.shard is not None:
                parameter.weight_loader(parameter, weight, place.shard)
            else:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
            pieces[place.parameter].add(name)
            loaded.add(place.parameter)
            if self._update is not None:
                self._update.digests[name] = self._update.digest(weight) if several else ""
        if self._update is None:
            self._require_all(pieces)
        return loaded

    def _require_all(self, pieces: dict[str, set[str]]) -> None:
        for name, parameter in self.named_parameters():
            count = vllm_pieces(name, len(parameter))
            if len(pieces[name]) != count:
                raise ValueError(f"'{name}' got {len(pieces[name])} of its {count} published weights")

    def _live(self, parameters: dict[str, nn.Parameter], name: str) -> Tensor:
        """View of the part of a parameter that a published weight fills; valid with one rank only."""
        place = vllm_place(name, self.config)
        parameter = parameters[place.parameter].data
        if place.expert is not None:
            matrix: Tensor = self._experts(place).matrix(place.expert, place.projection)
            return matrix.flatten(0, -2)
        if place.projection in VLLM_MERGED["qkv_proj"]:
            layer: Any = self.model.layers[layer_of(name)]
            attention = layer.self_attn
            sizes = [attention.query_size, attention.kv_size, attention.kv_size]
            return parameter.split(sizes)[VLLM_MERGED["qkv_proj"].index(place.projection)]
        if place.projection in VLLM_MERGED["gate_up_proj"]:
            return parameter.chunk(2)[VLLM_MERGED["gate_up_proj"].index(place.projection)]
        if place.parameter in ("model.embed_tokens.weight", "lm_head.weight"):
            return parameter[: self.config.vocab_size]  # vLLM pads the vocabulary
        return parameter

    def _experts(self, place: VllmPlace) -> Any:
        """The `Experts` module that owns a stack."""
        return self.get_submodule(place.parameter.rpartition(".")[0])
