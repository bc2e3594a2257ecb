"""The model against a second implementation, written from the report: NumPy, float64, one token and head at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weights import published_weights
from tests.near import assert_near

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 8,
    "num_experts": 5,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CASES = {
    "top-1, alpha": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "top-3, untied": {"moe_topk": 3, "tie_word_embeddings": False},
    "sharing by four": {"cla_share_factor": 4},
    "no sharing, no norm": {"use_cla": False, "use_qk_norm": False},
    "two shared experts": {"num_shared_expert": 2},
    "dense and mixed layers": {"num_experts": [1, 5, 2, 5], "moe_topk": [1, 2, 1, 1]},
    "no shared expert": {"use_mixed_mlp_moe": False},
}


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + 1e-5) * weight


def swiglu(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    gate = w[f"{name}.gate_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"{name}.up_proj.weight"] @ x))


def rotate(x: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """Apply RoPE: rotate the pair of components i and i + d/2 by position * frequencies[i]."""
    half = len(x) // 2
    points = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([points.real, points.imag])


def frequencies(config: HunYuanConfig) -> np.ndarray:
    d = config.head_dim
    base, alpha = config.rope_theta, (config.rope_scaling or {}).get("alpha")
    if alpha:
        base = base * alpha ** (d / (d - 2))
    found = 1 / base ** (np.arange(0, d, 2) / d)
    # Published models without alpha were trained with frequencies of 8 significant bits (bfloat16).
    return found if alpha else np.array([float(torch.tensor(f).bfloat16()) for f in found])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def forward(config: HunYuanConfig, w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    share = config.cla_share_factor if config.use_cla else 1
    rope_frequencies = frequencies(config)
    hidden = [w["model.embed_tokens.weight"][token] for token in ids]
    raw_keys: list[list[np.ndarray]] = []
    values: list[list[np.ndarray]] = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        normed = [rms(x, w[f"{name}.input_layernorm.weight"]) for x in hidden]
        if layer % share == 0:
            raw_keys = [np.split(w[f"{name}.self_attn.k_proj.weight"] @ x, kv_heads) for x in normed]
            values = [np.split(w[f"{name}.self_attn.v_proj.weight"] @ x, kv_heads) for x in normed]
        attended = []
        for t, x in enumerate(normed):
            outputs = []
            for head, query in enumerate(np.split(w[f"{name}.self_attn.q_proj.weight"] @ x, heads)):
                group = head // (heads // kv_heads)
                query = rotate(query, t, rope_frequencies)
                keys = [rotate(raw_keys[s][group], s, rope_frequencies) for s in range(t + 1)]
                if config.use_qk_norm:
                    query = rms(query, w[f"{name}.self_attn.query_layernorm.weight"])
                    keys = [rms(key, w[f"{name}.self_attn.key_layernorm.weight"]) for key in keys]
                weights = softmax(np.array([query @ key for key in keys]) / np.sqrt(d))
                outputs.append(sum(p * values[s][group] for s, p in enumerate(weights)))
            attended.append(w[f"{name}.self_attn.o_proj.weight"] @ np.concatenate(outputs))
        hidden = [x + y for x, y in zip(hidden, attended, strict=True)]
        hidden = [x + block(config, w, layer, rms(x, w[f"{name}.post_attention_layernorm.weight"])) for x in hidden]
    head = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return np.stack([head @ rms(x, w["model.norm.weight"]) for x in hidden])


def block(config: HunYuanConfig, w: dict[str, np.ndarray], layer: int, x: np.ndarray) -> np.ndarray:
    name = f"model.layers.{layer}.mlp"
    of = lambda value: value[layer] if isinstance(value, list) else value  # noqa: E731
    if of(config.num_experts) == 1:
        return swiglu(x, w, name)
    probabilities = softmax(w[f"{name}.gate.wg.weight"] @ x)
    chosen = np.argsort(-probabilities)[: of(config.moe_topk)]
    scale = 1.0 if len(chosen) == 1 else probabilities[chosen].sum()
    routed = sum(probabilities[e] / scale * swiglu(x, w, f"{name}.experts.{e}") for e in chosen)
    return routed + (swiglu(x, w, f"{name}.shared_mlp") if config.use_mixed_mlp_moe else 0.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_those_of_a_second_implementation(case, attention) -> None:
    torch.manual_seed(0)
    config = HunYuanConfig(**(SIZES | CASES[case]))
    model = HunYuanForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    weights = {name: tensor.detach().double().numpy() for name, tensor in published_weights(model)}
    ids = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = forward(config, weights, ids)
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0]
    assert np.abs(expected).max() > 0.5
    assert_near(found, torch.from_numpy(expected))
