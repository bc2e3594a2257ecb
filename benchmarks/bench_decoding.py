"""Decoding with one key/value cache per cross-layer group against one per layer: tokens per second and cache bytes.

The models have the same sizes and numbers of heads; without sharing, every layer has its own keys and values.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import compare, medians, ratio, write

from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.plan.shape import shape_of

BATCH, CONTEXT, STEPS = 8, 2048, 16
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_experts": 8,
    "max_position_embeddings": 4096,
}


@torch.no_grad()
def filled_cache(model: HunYuanForCausalLM, ids: torch.Tensor):
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decode(model: HunYuanForCausalLM, cache, token: torch.Tensor) -> None:
    for _ in range(STEPS):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    cache.crop(CONTEXT)


def cached_bytes(cache) -> int:
    """Bytes of the cached keys and values, counted on the tensors."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (BATCH, CONTEXT))
    runs, caches, formula = {}, {}, {}
    for name, factor in (("one per layer", 1), ("one per two layers", 2), ("one per four layers", 4)):
        config = HunYuanConfig(**SIZES, use_cla=factor > 1, cla_share_factor=factor)
        model = HunYuanForCausalLM(config).eval()
        cache = filled_cache(model, ids)
        caches[name] = cached_bytes(cache)
        formula[name] = BATCH * shape_of(name, config.to_dict()).cache_bytes(CONTEXT, bytes_per_value=4)
        assert caches[name] == formula[name]
        runs[name] = partial(decode, model, cache, ids[:, :1])
    seconds = compare(runs, repetitions=7)
    write(
        "decoding",
        {
            "shape": {"batch": BATCH, "context": CONTEXT, **SIZES},
            "tokens_per_second": {n: round(BATCH * STEPS / s, 1) for n, s in medians(seconds).items()},
            "cache_bytes": caches,
            "cache_bytes_by_formula": formula,
            "speed of one per two layers": round(ratio(seconds, "one per layer", "one per two layers"), 3),
            "speed of one per four layers": round(ratio(seconds, "one per layer", "one per four layers"), 3),
        },
    )


if __name__ == "__main__":
    main()
