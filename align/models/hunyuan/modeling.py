"""HunYuan: grouped-query attention with one cache per cross-layer group, QK norm, mixture of experts.

Shapes: B sequences, T tokens, S tokens in the cache, D hidden, H query heads, K key/value heads, d head size,
E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from align.models.experts import Experts
from align.models.heads import ScoreHead, TokenHead, last_positions
from align.models.hunyuan.checkpoint import device_for_pieces, load_pieces
from align.models.hunyuan.configuration import HunYuanConfig
from align.models.hunyuan.moe import MoeBlock, Router, SwiGlu
from align.models.hunyuan.norm import RMSNorm, unit_rms
from align.models.hunyuan.rope import inverse_frequencies, rotate, rotation_tables
from align.models.packing import Packing
from align.models.routing import RouterReport, Routing, choices_of_layers, report_routing


@dataclass
class HunYuanModelOutput(ModelOutput):
    """Output of the trunk. The last four fields are set with `output_router_logits`.

    last_hidden_state: [B, T, D].
    aux_loss: balance loss, averaged over MoE layers.
    router: statistics of the routers.
    router_logits: [B * T, E] per MoE layer.
    routed_experts: experts chosen by the routers [B, T, layers, k], -1 in dense layers.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router: RouterReport | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routed_experts: Tensor | None = None


@dataclass
class HunYuanCausalLMOutput(ModelOutput):
    """Output of the language model; the other fields are as in `HunYuanModelOutput`.

    loss: cross entropy, if labels are passed. With `output_router_logits` it includes the router losses times their
        coefficients.
    logits: [B, T, V].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router: RouterReport | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class HunYuanSequenceClassifierOutput(ModelOutput):
    """Output of the scorer; `logits` [B, num_labels] are read at each sequence's last attended token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router: RouterReport | None = None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch operations: query [B, H, T, d], key and value [B, K, S, d] -> (output [B, T, H, d],
    weights [B, H, T, S])."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Grouped-query attention. The first layer of a cross-layer group owns keys and values; the others use them.

    The group shares the rotated key divided by its rms, without the norm's weight. The weight is a factor per head
    dimension, so q . (w * k) = (q * w) . k, and every layer multiplies its queries by its own key-norm weight. Sharing
    one key and one value per group is therefore exact.
    """

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.owns_kv = config.kv_owner(layer) == layer
        # Cache slots are numbered by group, so the cache has no empty slots.
        self.cache_slot = layer // config.kv_group_size
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        bias = config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        if self.owns_kv:
            self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        shared_kv: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention output [B, T, D] and the group's (key, value), each [B, K, S, d]."""
        batch, length, _ = hidden_BTD.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, length, -1, self.head_dim).transpose(1, 2)

        query = rotate(heads(self.q_proj(hidden_BTD)), *rotation)
        if self.config.use_qk_norm:
            # Multiply the two weight vectors first, which is cheaper than scaling the large queries twice.
            query = unit_rms(query, self.config.rms_norm_eps) * (
                self.query_layernorm.weight * self.key_layernorm.weight
            )
        if self.owns_kv:
            key = rotate(heads(self.k_proj(hidden_BTD)), *rotation)
            if self.config.use_qk_norm:
                key = unit_rms(key, self.config.rms_norm_eps)
            value = heads(self.v_proj(hidden_BTD))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.cache_slot)
            shared_kv = (key, value)
        assert shared_kv is not None
        dropout = self.config.attention_dropout if self.training else 0.0
        if packing is not None:
            output = packing.attend(query, *shared_kv, scaling=self.scaling, dropout=dropout)
            return self.o_proj(output.reshape(batch, length, -1)), shared_kv
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attend(self, query, *shared_kv, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), shared_kv


class DecoderLayer(GradientCheckpointingLayer):
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: HunYuanConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        is_moe = config.experts_in(layer) > 1
        self.mlp = MoeBlock(config, layer) if is_moe else SwiGlu(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint activations in evaluation mode too, because PPO trains in that mode.

        transformers' layers do so in training mode only. With a key/value cache nothing is checkpointed, because the
        recomputation would append to the cache a second time.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
            return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), *args)
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(
        self, hidden_BTD: Tensor, token_mask: Tensor | None = None, replay_Tk: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Routing | None]:
        """Hidden states, the group's (key, value) and the routing, if any.

        Args:
            token_mask: [B * T], 0 for padding.
            replay_Tk: Experts to use; -1 leaves the choice to the router.
        """
        attended, shared_kv = self.self_attn(self.input_layernorm(hidden_BTD), **kwargs)
        hidden_BTD = hidden_BTD + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_BTD)
        routing = None
        if isinstance(self.mlp, MoeBlock):
            output, routing = self.mlp(normed, token_mask, replay_Tk)
        else:
            output = self.mlp(normed)
        return hidden_BTD + self.dropout(output), shared_kv, routing


class HunYuanPreTrainedModel(PreTrainedModel):
    config: HunYuanConfig
    config_class = HunYuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Enable non-reentrant checkpointing.

        Raises `ValueError` for reentrant checkpointing. It would drop the gradients of the keys, values and routing
        that a layer returns in addition to the hidden state.
        """
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise ValueError("HunYuan models need gradient_checkpointing_kwargs={'use_reentrant': False}")
        super().gradient_checkpointing_enable(settings, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        *args: Any,
    ) -> tuple[LoadStateDictInfo, Any]:
        """Read the weights with `load_pieces` where possible, without a second copy. `from_pretrained` calls this."""
        files = [Path(file) for file in checkpoint_files or [] if file.endswith(".safetensors")]
        device = device_for_pieces(model, load_config)
        if state_dict is None and files and device is not None:
            return load_pieces(model, files, device), None
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, HunYuanModel):
            module.inv_freq.copy_(inverse_frequencies(self.config))
        else:
            super()._init_weights(module)


class HunYuanModel(HunYuanPreTrainedModel):
    """Embedding, decoder layers and the final norm."""

    inv_freq: Tensor

    def __init__(self, config: HunYuanConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        routed_experts: Tensor | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> HunYuanModelOutput:
        """Forward pass of the trunk.

        Args:
            routed_experts: [B, T, layers, k], experts to use; -1 leaves the choice to the router.
            packing: The input is one row of several sequences, each of which attends to itself only. `packing.attend`
                then computes attention, whatever `attn_implementation` is. Raises `ValueError` if combined with a
                cache, a mask or positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if self.gradient_checkpointing and torch.is_grad_enabled():
            use_cache = False
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if packing is not None:
            if hidden.shape[:2] != (1, packing.total):
                raise ValueError(
                    f"input_ids must be one row of the {packing.total} packed tokens, but has the shape "
                    f"{tuple(hidden.shape[:2])}"
                )
            if any(given is not None for given in (past_key_values, attention_mask, position_ids)):
                raise ValueError("packed sequences take neither a cache nor an attention mask nor positions")
            position_ids = packing.position_ids
        elif position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        causal_mask = None
        if packing is None:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        rotation = rotation_tables(self.inv_freq, position_ids, hidden.dtype)

        token_mask = None
        if attention_mask is not None and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -hidden.shape[1] :].reshape(-1)
        states: list[Tensor] = [hidden]
        routings: list[Routing | None] = []
        shared_kv = None
        for index, layer in enumerate(self.layers):
            replay = None
            if routed_experts is not None:
                top_k = self.config.top_k_in(index)
                replay = routed_experts[:, :, index, :top_k].reshape(-1, top_k).long()
            hidden, shared_kv, routing = layer(
                hidden,
                token_mask=token_mask,
                replay_Tk=replay,
                rotation=rotation,
                attention_mask=causal_mask,
                shared_kv=shared_kv,
                past_key_values=past_key_values,
                packing=packing,
                **kwargs,
            )
            states.append(hidden)
            routings.append(routing)
        hidden = self.norm(hidden)
        states[-1] = hidden
        want_routing = self.config.output_router_logits if output_router_logits is None else output_router_logits
        routed = [routing for routing in routings if routing is not None] if want_routing else []
        report = None
        if routed:
            counted = token_mask if packing is None else packing.counts_N
            report = report_routing(routed, hidden.new_ones(hidden[..., 0].numel()) if counted is None else counted)
        return HunYuanModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            aux_loss=report.balance_loss if report else None,
            router=report,
            router_logits=tuple(r.logits_TE for r in routed) if want_routing else None,
            routed_experts=choices_of_layers(routings).unflatten(0, hidden.shape[:2]) if routed else None,
        )


class HunYuanForCausalLM(HunYuanPreTrainedModel, GenerationMixin):
    """Language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HunYuanConfig):
        super().__init__(config)
        self.model = HunYuanModel(config)
        self.lm_head = TokenHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HunYuanCausalLMOutput:
        """Forward pass of the language model.

        Args:
            labels: [B, T], not shifted; -100 is ignored.
            logits_to_keep: Number of last positions, or the positions, whose logits are computed; 0 for all.
        """
        loss_arguments = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_arguments)
            if outputs.router is not None:
                loss = loss + outputs.router.loss(self.config).to(loss.device)
        return HunYuanCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=outputs.aux_loss,
            router=outputs.router,
            router_logits=outputs.router_logits,
        )


class HunYuanForSequenceClassification(HunYuanPreTrainedModel):
    """Trunk with a linear score head, for reward models and critics.

    `forward` applies the head to the last attended token. A critic applies it to the token before each completion token
    (`align.models.forward`).
    """

    def __init__(self, config: HunYuanConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.model = HunYuanModel(config)
        self.score = ScoreHead(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> HunYuanSequenceClassifierOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None else use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = last_positions(hidden, attention_mask)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        return HunYuanSequenceClassifierOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            aux_loss=outputs.aux_loss,
            router=outputs.router,
        )
