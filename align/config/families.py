"""The families that align adopts from transformers, by `model_type`, with the facts that their classes do not state.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Facts about a family that its classes do not state.

    sigmoid: experts are scored by a sigmoid per expert instead of a softmax over the experts.
    mixes_neighbours: layers other than attention mix neighbouring tokens (short convolutions), or attention is limited
        to chunks. Packed rows are then computed as a padded batch.
    weighs_inputs: routing weights multiply the inputs of the experts, not their outputs.
    convolutions: layers read the weights of convolutions outside the modules that own them, so ZeRO-3 cannot shard
        them.
    """

    sigmoid: bool = False
    mixes_neighbours: bool = False
    weighs_inputs: bool = False
    convolutions: bool = False


SIGMOID = Facts(sigmoid=True)

TABLE: dict[str, Facts] = {
    "llama": Facts(),
    "qwen2": Facts(),
    "qwen3": Facts(),
    "mistral": Facts(),
    "ministral3": Facts(),
    "phi3": Facts(),
    "gemma": Facts(),
    "gemma2": Facts(),
    "gemma3_text": Facts(),
    "gemma4_text": Facts(),
    "granite": Facts(),
    "smollm3": Facts(),
    "seed_oss": Facts(),
    "olmo2": Facts(),
    "olmo3": Facts(),
    "exaone4": Facts(),
    "glm4": Facts(),
    "ernie4_5": Facts(),
    "cohere2": Facts(),
    "apertus": Facts(),
    "arcee": Facts(),
    "starcoder2": Facts(),
    "lfm2": Facts(mixes_neighbours=True, convolutions=True),
    "hunyuan_v1_dense": Facts(),
    "qwen2_moe": Facts(),
    "qwen3_moe": Facts(),
    "mixtral": Facts(),
    "olmoe": Facts(),
    "granitemoe": Facts(),
    "granitemoeshared": Facts(),
    "ernie4_5_moe": Facts(),
    "flex_olmo": Facts(),
    "mellum": Facts(),
    "deepseek_v2": Facts(),
    "gpt_oss": Facts(),
    "hunyuan_v1_moe": Facts(),
    "dots1": SIGMOID,
    "solar_open": SIGMOID,
    "glm4_moe": SIGMOID,
    "glm4_moe_lite": SIGMOID,
    "exaone_moe": SIGMOID,
    "afmoe": SIGMOID,
    "minimax_m2": SIGMOID,
    "hy_v3": SIGMOID,
    "deepseek_v3": SIGMOID,
    "lfm2_moe": Facts(sigmoid=True, mixes_neighbours=True, convolutions=True),
    "llama4_text": Facts(sigmoid=True, mixes_neighbours=True, weighs_inputs=True),
}
