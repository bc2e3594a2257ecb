"""Settings of `lora` that contradict each other, the model or the rest of the recipe."""

from __future__ import annotations

import json

from .here import Here, wrong


@wrong("dropout-in-experts", "Dropout in adapters on routed experts")
def _(here: Here) -> str:
    return here.check(lora={"dropout": 0.1})


@wrong("lora-targets-contradict", "`lora.targets` beside a key that it replaces")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["attention"], "experts": True})


@wrong("lora-targets-unknown", "A group in `lora.targets` that does not exist")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["atention"]})


@wrong("lora-group-without-adapters", "A rank for a group without adapters")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["attention"], "groups": {"routed_experts": {"rank": 4}}})


@wrong("lora-layer", "Adapters on a layer that the model does not have")
def _(here: Here) -> str:
    return here.run(lora={"targets": ["attention"], "layers": [0, 2]})


@wrong("lora-layers-excluded", "Layer numbers that exclude everything that `lora.targets` names")
def _(here: Here) -> str:
    return here.run(lora={"targets": ["layers.0.self_attn.q_proj"], "layers": [1]})


@wrong("lora-target-without-a-layer", "A name in `lora.targets` that no linear layer has")
def _(here: Here) -> str:
    return here.run(lora={"targets": ["query_key_value"]})


@wrong("lora-module-unknown", "A name in `lora.modules_to_save` that no module has")
def _(here: Here) -> str:
    return here.run(lora={"targets": ["attention"], "modules_to_save": ["ln_f"]})


@wrong("lora-module-with-adapters", "A module that is trained in full and contains adapters")
def _(here: Here) -> str:
    return here.run(lora={"targets": ["attention"], "modules_to_save": ["layers.0.self_attn"]})


@wrong("lora-tied-head", "A head to train that is the embedding matrix")
def _(here: Here) -> str:
    here.change_config(tie_word_embeddings=True)
    return here.run(lora={"targets": ["attention", "lm_head"]})


@wrong("lora-head-of-a-reward-model", "A head to train in a reward model")
def _(here: Here) -> str:
    row = {"prompt": "What is 1?", "chosen": "It is 1.", "rejected": "It is 2."}
    here.write("pairs.jsonl", (json.dumps(row) + "\n") * 4)
    data = {"train": [{"kind": "file", "path": "pairs.jsonl"}], "max_length": 64}
    lora = {"targets": ["attention", "lm_head"]}
    stage = {"kind": "reward_model", "data": data, "batch_size": 4, "max_steps": 1, "lora": lora}
    return here.run(stages={"reward_model": stage})


@wrong("lora-head-twice", "Both the embeddings and the head in `lora.targets`")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["attention", "embeddings", "lm_head"]})


@wrong("lora-dora-on-experts", "DoRA on routed experts")
def _(here: Here) -> str:
    return here.check(lora={"dora": True})


@wrong("lora-dora-in-parallel", "DoRA on several processes")
def _(here: Here) -> str:
    here.recipe(lora={"targets": ["attention"], "dora": True})
    return here.align("check", "recipe.yaml", "parallel={processes: 2}")


@wrong("lora-orthogonal-experts", "The orthogonal initialisation on routed experts")
def _(here: Here) -> str:
    return here.check(lora={"init": "orthogonal"})


@wrong("lora-orthogonal-rank", "The orthogonal initialisation with an odd rank")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["attention"], "init": "orthogonal", "groups": {"attention": {"rank": 3}}})


@wrong("lora-pissa", "An initialisation that changes the base weights")
def _(here: Here) -> str:
    return here.check(lora={"init": "pissa"})


@wrong("lora-eva", "The initialisation EVA")
def _(here: Here) -> str:
    return here.check(lora={"init": "eva"})


@wrong("lora-key-of-peft", "A key of PEFT's LoraConfig")
def _(here: Here) -> str:
    return here.check(lora={"layers_to_transform": [0]})


@wrong("lora-exclude-modules", "PEFT's key `exclude_modules`")
def _(here: Here) -> str:
    return here.check(lora={"exclude_modules": ["experts"]})


@wrong("lora-plus-without-adapters", "A learning rate of B factors without adapters")
def _(here: Here) -> str:
    return here.check(optimizer={"lora_b_learning_rate_scale": 16.0})


@wrong("lora-quantize-dora", "DoRA on weights in 4 bits")
def _(here: Here) -> str:
    return here.check(lora={"targets": ["attention"], "dora": True, "quantize": "nf4"})


@wrong("lora-quantize-parallel", "Weights in 4 bits with `parallel`")
def _(here: Here) -> str:
    here.recipe(lora={"quantize": "nf4"})
    return here.align("check", "recipe.yaml", "parallel={processes: 2}")
