"""LoRA adapters that are damaged, of another kind or of another base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align.run.adapted import write_pointer

from .here import IN_PARENTHESES, Here, wrong

LAYERS = [f"base_model.model.model.layers.{number}" for number in range(2)]
Q = f"{LAYERS[0]}.self_attn.q_proj"
EXPERTS = f"{LAYERS[0]}.mlp.experts"
Tensors = dict[str, torch.Tensor]


def adapter(here: Here, change: Callable[[Tensors], Any] | None = None, **settings: Any) -> None:
    """Write an adapter of rank 2 on q_proj and on the experts' down_proj to lora/."""
    tensors: Tensors = {}
    for layer in LAYERS:
        tensors |= {
            f"{layer}.self_attn.q_proj.lora_A.weight": torch.ones(2, 32),
            f"{layer}.self_attn.q_proj.lora_B.weight": torch.ones(32, 2),
            f"{layer}.mlp.experts.lora_A.weight": torch.ones(2 * 2, 32),
            f"{layer}.mlp.experts.lora_B.weight": torch.ones(32, 2 * 2),
        }
    if change:
        change(tensors)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "model",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
    }
    (here.folder / "lora").mkdir()
    here.write("lora/adapter_config.json", json.dumps(values | settings))
    save_file(tensors, here.folder / "lora" / "adapter_model.safetensors")


def check(here: Here) -> str:
    return here.align("adapter", "check", "lora")


@wrong("adapter-not-an-adapter", "A folder without an adapter")
def _(here: Here) -> str:
    return here.align("adapter", "check", "model")


@wrong("adapter-config-damaged", "A truncated adapter_config.json")
def _(here: Here) -> str:
    adapter(here)
    here.write("lora/adapter_config.json", '{"peft_type": "LO')
    return check(here)


@wrong("adapter-not-lora", "An adapter of another method")
def _(here: Here) -> str:
    adapter(here, peft_type="IA3")
    return check(here)


@wrong("adapter-option", "An adapter with an option that cannot be merged")
def _(here: Here) -> str:
    adapter(here, alora_invocation_tokens=[5, 6])
    return check(here)


@wrong("adapter-changes-base", "An adapter whose initialisation changed the base model's weights")
def _(here: Here) -> str:
    adapter(here, init_lora_weights="pissa_niter_4")
    return check(here)


@wrong("adapter-pickled", "An adapter with pickled weights only")
def _(here: Here) -> str:
    adapter(here)
    (here.folder / "lora" / "adapter_model.safetensors").rename(here.folder / "lora" / "adapter_model.bin")
    return check(here)


@wrong("adapter-without-weights", "An adapter without weights")
def _(here: Here) -> str:
    adapter(here)
    (here.folder / "lora" / "adapter_model.safetensors").unlink()
    return check(here)


@wrong("adapter-truncated", "Truncated adapter weights", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    adapter(here)
    path = here.folder / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return check(here)


@wrong("adapter-empty", "Adapter weights without tensors")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.clear())
    return check(here)


@wrong("adapter-base-elsewhere", "An adapter whose base model is not on this machine")
def _(here: Here) -> str:
    adapter(here, base_model_name_or_path="owner/large-model")
    return check(here)


@wrong("adapter-without-base", "An adapter that does not name its base model")
def _(here: Here) -> str:
    adapter(here, base_model_name_or_path=None)
    return check(here)


@wrong("adapter-factor-missing", "An adapter without one of its factors")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"))
    return check(here)


@wrong("adapter-nan", "An adapter with a value that is not a number")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors[f"{Q}.lora_A.weight"][1].fill_(float("nan")))
    return check(here)


@wrong("adapter-hidden-size", "An adapter that was trained on another hidden size")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 48)}))
    return check(here)


@wrong("adapter-more-layers", "An adapter that was trained on more layers")
def _(here: Here) -> str:
    more = {f"{LAYERS[0]}.self_attn.q_proj.lora_{kind}.weight".replace("s.0.", "s.2.") for kind in "AB"}
    adapter(here, lambda tensors: tensors.update({name: torch.ones(2, 2) for name in more}))
    return check(here)


@wrong("adapter-fewer-layers", "An adapter that was trained on fewer layers")
def _(here: Here) -> str:
    adapter(here, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    return check(here)


@wrong("adapter-experts", "An adapter that was trained on another number of experts")
def _(here: Here) -> str:
    four = {f"{EXPERTS}.lora_A.weight": torch.ones(4 * 2, 32), f"{EXPERTS}.lora_B.weight": torch.ones(32, 4 * 2)}
    adapter(here, lambda tensors: tensors.update(four))
    return check(here)


@wrong("adapter-expert-width", "An adapter that was trained on experts of another width")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{EXPERTS}.lora_A.weight": torch.ones(2 * 2, 16)}))
    return check(here)


@wrong("adapter-three-dimensions", "Factors of experts that were saved as stacks")
def _(here: Here) -> str:
    stacks = {f"{EXPERTS}.lora_A.weight": torch.ones(2, 2, 32), f"{EXPERTS}.lora_B.weight": torch.ones(2, 32, 2)}
    adapter(here, lambda tensors: tensors.update(stacks))
    return check(here)


@wrong("adapter-rank", "An adapter_config.json with another rank than the weights")
def _(here: Here) -> str:
    adapter(here, lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name], r=4)
    return check(here)


@wrong("adapter-twice", "An adapter that changes a parameter twice")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{Q}.weight": torch.ones(32, 32)}))
    return check(here)


@wrong("adapter-unknown-tensor", "An adapter with a tensor that the base model does not have")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.router.weight": torch.ones(2, 32)}))
    return check(here)


@wrong("adapter-router", "An adapter with a router of another number of experts")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.gate.weight": torch.ones(3, 32)}))
    return check(here)


@wrong("adapter-dora", "A DoRA adapter without its magnitudes")
def _(here: Here) -> str:
    adapter(here, use_dora=True)
    return check(here)


@wrong("adapter-tied", "An adapter on the embedding alone, with a base model that uses it as head too")
def _(here: Here) -> str:
    here.change_config(tie_word_embeddings=True)
    embedding = {"base_model.model.model.embed_tokens.weight": torch.ones(len(here.tokenizer), 32)}
    adapter(here, lambda tensors: tensors.update(embedding))
    return check(here)


@wrong("adapter-remove-replaced", "Removing an adapter that replaces a parameter")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.gate.weight": torch.ones(2, 32)}))
    return here.align("adapter", "unmerge", "lora", "model", "back")


@wrong("adapter-target-exists", "Merging into a folder that is not empty")
def _(here: Here) -> str:
    adapter(here)
    return here.align("adapter", "merge", "lora", "model")


@wrong("adapter-extract-rank", "Extracting an adapter of rank 0")
def _(here: Here) -> str:
    return here.align("adapter", "extract", "model", "model", "out", "--rank", "0")


@wrong("adapter-extract-equal", "Extracting an adapter from two equal models")
def _(here: Here) -> str:
    return here.align("adapter", "extract", "model", "model", "out")


@wrong("adapter-combine-one", "Combining a single adapter")
def _(here: Here) -> str:
    return here.align("adapter", "combine", "lora", "--target", "out")


@wrong("adapter-combine-weights", "Combining adapters with another number of weights")
def _(here: Here) -> str:
    return here.align("adapter", "combine", "lora", "lora", "--target", "out", "--weights", "1")


@wrong("adapter-combine-density", "Combining adapters by a method that needs a density")
def _(here: Here) -> str:
    return here.align("adapter", "combine", "lora", "lora", "--target", "out", "--method", "ties")


@wrong("adapter-combine-density-range", "Combining adapters with a density above 1")
def _(here: Here) -> str:
    return here.align("adapter", "combine", "lora", "lora", "--target", "o", "--method", "ties", "--density", "2")


@wrong("adapter-combine-rank", "Combining adapters into one of rank 0")
def _(here: Here) -> str:
    return here.align("adapter", "combine", "lora", "lora", "--target", "out", "--rank", "0")


@wrong("adapter-combine-full", "Combining adapters, one of them with a router trained in full")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.gate.weight": torch.ones(2, 32)}))
    return here.align("adapter", "combine", "lora", "lora", "--target", "out")


@wrong("adapter-extract-families", "Extracting an adapter from models of two families")
def _(here: Here) -> str:
    from tests.tiny_families import save_tiny

    save_tiny("llama", here.folder / "other")
    return here.align("adapter", "extract", "model", "other", "out")


def beside(here: Here, **pointer: Any) -> None:
    """Write the adapter of `adapter` to lora/ with a pointer to model/; `pointer` overrides its keys."""
    adapter(here)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(here.folder / "model" / name, here.folder / "lora" / name)
    write_pointer(here.folder / "lora", here.folder / "lora", here.folder / "model")
    path = here.folder / "lora" / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | pointer))


@wrong("adapter-base-gone", "A checkpoint beside a base that no longer exists")
def _(here: Here) -> str:
    beside(here, base="../gone")
    return here.run(init_from="./lora")


@wrong("adapter-base-changed", "A checkpoint beside a base that has changed")
def _(here: Here) -> str:
    beside(here)
    here.change_weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return here.run(init_from="./lora")


@wrong("adapter-pointer-damaged", "A truncated base.json")
def _(here: Here) -> str:
    beside(here)
    here.write("lora/base.json", '{"base": "../mo')
    return here.align("adapter", "info", "lora")


@wrong("adapter-pointer-circular", "An adapter that is its own base")
def _(here: Here) -> str:
    beside(here)
    path = here.folder / "lora" / "base.json"
    path.write_text(json.dumps({"base": ".", "digest": ""}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.run.adapted.weights_digest", lambda folder: "")
        return here.align("chat", "lora")


@wrong("adapter-merged-into-others", "An adapter merged into other weights than those it was trained on")
def _(here: Here) -> str:
    beside(here)
    here.change_weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return here.align("adapter", "merge", "lora", "out", "--base", "model")


@wrong("adapter-not-merged", "Unmerging an adapter from a checkpoint without a merged adapter")
def _(here: Here) -> str:
    beside(here)
    return here.align("adapter", "unmerge", "lora", "lora", "out")


@wrong("adapter-as-whole-weights", "A checkpoint beside its base where whole weights are needed")
def _(here: Here) -> str:
    beside(here)
    return here.run(model={"kind": "pretrained", "path": "lora", "add_tokens": ["<|tool|>"]})
