"""Names and layout of the published checkpoint, mapped to ours on load and back on save.

Published: one matrix an expert (`mlp.experts.E.gate_proj.weight`), router `mlp.gate.wg.weight`.
Ours: experts stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]), router
`mlp.gate.weight`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from align.errors import UserError
from align.models.hunyuan.configuration import HunYuanConfig


def register_published_layout() -> None:
    """Teach transformers' loader and saver the published layout."""
    register_checkpoint_conversion_mapping(
        HunYuanConfig.model_type,
        [
            WeightRenaming("mlp.gate.wg.weight", "mlp.gate.weight"),
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


def published_shapes(config: HunYuanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the language model in the published layout."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def mlp(name: str, width: int, bias: bool) -> None:
        linear(f"{name}.gate_proj", width, hidden, bias)
        linear(f"{name}.up_proj", width, hidden, bias)
        linear(f"{name}.down_proj", hidden, width, bias)

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if config.use_qk_norm:
            norms = ("query_layernorm", "key_layernorm")
            shapes |= {f"{block}.self_attn.{norm}.weight": (config.head_dim,) for norm in norms}
        linear(f"{block}.self_attn.q_proj", heads, hidden, config.attention_bias)
        linear(f"{block}.self_attn.o_proj", hidden, heads, config.attention_bias)
        if config.kv_owner(layer) == layer:
            linear(f"{block}.self_attn.k_proj", kv, hidden, config.attention_bias)
            linear(f"{block}.self_attn.v_proj", kv, hidden, config.attention_bias)
        experts = config.experts_in(layer)
        if experts == 1:
            mlp(f"{block}.mlp", config.intermediate_size, config.mlp_bias)
            continue
        shapes[f"{block}.mlp.gate.wg.weight"] = (experts, hidden)
        for expert in range(experts):
            mlp(f"{block}.mlp.experts.{expert}", config.intermediate_size, False)
        if width := config.shared_width(layer):
            mlp(f"{block}.mlp.shared_mlp", width, config.mlp_bias)
    return shapes


def check_weights(folder: Path, config: HunYuanConfig, *, scorer: bool = False) -> None:
    """Raise `UserError` unless the safetensors files hold exactly the tensors that the configuration asks for, finite.

    Names and shapes come from the files' headers; then one tensor at a time is looked at through the page cache, so a
    damaged checkpoint is refused before a model is built. scorer: the head is `score.weight`, which may be missing.
    """
    wanted, optional = published_shapes(config), set()
    if scorer or config.tie_word_embeddings:
        optional.add("lm_head.weight")
    if scorer:
        wanted["score.weight"] = (config.num_labels or 1, config.hidden_size)
        optional.add("score.weight")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            found |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in names}
    missing = sorted(set(wanted) - set(found) - optional)
    extra = sorted(name for name in set(found) - set(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(
            f"{folder}: the tensor '{missing[0]}'{others} missing; copy the missing files, or the config.json that "
            "belongs to these."
        )
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{folder}: config.json has no place for the tensor '{extra[0]}'{others}; copy the config.json that "
            "belongs to the weights."
        )
    for name, shape in wanted.items():
        if name in found and found[name][1] != shape:
            raise UserError(
                f"{folder}: the tensor '{name}' has the shape {list(found[name][1])}, but config.json asks for "
                f"{list(shape)}; copy the config.json that belongs to the weights."
            )
    for file in sorted({file for file, _ in found.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not bool(tensors.get_tensor(name).isfinite().all()):
                    raise UserError(
                        f"{folder}: the tensor '{name}' holds values that are not finite; take an earlier checkpoint."
                    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{index}: not a valid index of safetensors files; copy or download it again.") from None
    for name in named:
        if not (folder / name).is_file():
            raise UserError(f"{index} names the file '{name}', which is not there; copy or download it.")
    return [folder / name for name in named]
