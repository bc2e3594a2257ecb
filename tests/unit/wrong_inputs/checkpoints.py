"""Checkpoints that are damaged or of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from align.config.parallel import Parallel
from align.data.tokenizer import train_tokenizer
from align.train.finite import require_finite
from tests.tiny_families import tiny_config

from .here import IN_PARENTHESES, NUMBER, SIZES, Here, wrong


@wrong("no-such-model", "A path that is neither a folder nor a reachable hub id")
def _(here: Here) -> str:
    return here.run(model={"kind": "pretrained", "path": "nobody/nothing"})


@wrong("no-config", "A checkpoint folder without config.json")
def _(here: Here) -> str:
    (here.folder / "model" / "config.json").unlink()
    return here.run()


@wrong("damaged-config", "A truncated config.json")
def _(here: Here) -> str:
    here.write("model/config.json", '{"model_type": "huny')
    return here.run()


@wrong("wrong-value-in-config", "A value of the wrong type in config.json")
def _(here: Here) -> str:
    here.change_config(hidden_size="wide")
    return here.run()


@wrong("impossible-config", "Contradicting values in config.json")
def _(here: Here) -> str:
    here.change_config(moe_topk=3)
    return here.run()


@wrong("other-architecture", "A checkpoint of another architecture")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "llamma", "hidden_size": 32}))
    return here.run()


@wrong("other-architecture-in-check", "A checkpoint of another architecture, in `align check`")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "gpt2", "n_embd": 32}))
    return here.check()


@wrong("remote-code", "A checkpoint that needs its own Python code")
def _(here: Here) -> str:
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    here.change_config(model_type="x_model", auto_map=code)
    return here.run()


@wrong("gguf-file", "A GGUF file")
def _(here: Here) -> str:
    here.write("model.gguf", "GGUF")
    return here.check(model={"kind": "pretrained", "path": "./model.gguf"})


@wrong("gguf-folder", "A folder of GGUF files")
def _(here: Here) -> str:
    (here.folder / "other").mkdir()
    here.write("other/model-q4_k_m.gguf", "GGUF")
    return here.align("chat", "other")


@wrong("adapter-folder", "A LoRA adapter whose base model is not on this machine")
def _(here: Here) -> str:
    (here.folder / "other").mkdir()
    here.write("other/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "big/model"}))
    return here.run(model={"kind": "pretrained", "path": "./other"})


@wrong("quantized-4-bit", "A checkpoint with 4-bit weights")
def _(here: Here) -> str:
    here.change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return here.run()


@wrong("quantized-fp8", "A checkpoint with FP8 weights")
def _(here: Here) -> str:
    here.change_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return here.run()


@wrong("encoder", "An encoder")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    return here.run()


@wrong("encoder-decoder", "An encoder-decoder")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    return here.check()


@wrong("vision-language", "A vision-language model")
def _(here: Here) -> str:
    parts = {"text_config": {"model_type": "gemma3_text"}, "vision_config": {"model_type": "siglip_vision_model"}}
    here.write("model/config.json", json.dumps({"model_type": "gemma3", **parts}))
    return here.check()


@wrong("language-model-of-text", "Extracting the language model of a text model")
def _(here: Here) -> str:
    return here.align("convert", "language-model", "model", "out")


@wrong("language-model-unknown", "Extracting a language model of an unknown type")
def _(here: Here) -> str:
    parts = {"text_config": {"model_type": "qwen3_vl_moe_text"}, "vision_config": {}}
    here.write("model/config.json", json.dumps({"model_type": "qwen3_vl_moe", **parts}))
    return here.align("convert", "language-model", "model", "out")


@wrong("reward-model-as-policy", "A reward model as the model to train")
def _(here: Here) -> str:
    here.change_config(architectures=["LlamaForSequenceClassification"])
    return here.check()


@wrong("policy-as-reward-model", "A language model as a reward model")
def _(here: Here) -> str:
    prompts = [{"kind": "file", "path": "rows.jsonl"}]
    rewards = [{"kind": "model", "init_from": "./model"}]
    return here.check(stages={"ppo": {"kind": "ppo", "prompts": prompts, "rewards": rewards}})


@wrong("pickled-weights", "A checkpoint with pickled weights only")
def _(here: Here) -> str:
    (here.folder / "model" / "model.safetensors").rename(here.folder / "model" / "pytorch_model.bin")
    return here.run()


@wrong("truncated-weights", "Truncated weights", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    weights = here.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return here.run()


@wrong("weights-of-other-sizes", "Weights with other shapes than config.json", varies=r"[(\[][\d, ]+[)\]]")
def _(here: Here) -> str:
    here.change_config(hidden_size=64)
    return here.run()


@wrong("tensor-missing", "A checkpoint without one of the model's tensors")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights.pop("model.layers.0.mlp.experts.1.up_proj.weight"))
    return here.run()


@wrong("tensor-extra", "A checkpoint with a tensor that the model does not have")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights.update({"model.layers.0.mlp.experts.7.up_proj.weight": torch.ones(2)}))
    return here.run()


@wrong("tensor-nan", "A tensor with non-finite values")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights["model.norm.weight"][3:4].fill_(float("nan")))
    return here.run()


@wrong("loss-not-finite", "Weights so large that the loss is not finite", varies=r"(?<=is )(inf|nan)")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights["model.norm.weight"].mul_(1e38))
    return here.run()


@wrong("weights-not-finite", "A trained model with weights that are not finite")
def _(here: Here) -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.data.fill_(float("inf"))
    require_finite(layer, Path("run") / "sft")


@wrong("index-names-missing-file", "A safetensors index that names a missing file")
def _(here: Here) -> str:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-00002.safetensors"}}
    here.write("model/model.safetensors.index.json", json.dumps(index))
    return here.run()


@wrong("index-damaged", "A damaged safetensors index")
def _(here: Here) -> str:
    here.write("model/model.safetensors.index.json", "{}")
    return here.run()


@wrong("no-tokenizer", "A checkpoint without a tokenizer")
def _(here: Here) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here.folder / "model" / name).unlink()
    return here.run()


@wrong("no-tokenizer-in-check", "A checkpoint without a tokenizer, in `align check`")
def _(here: Here) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here.folder / "model" / name).unlink()
    return here.check(model={"kind": "pretrained", "path": "./model"})


@wrong("tokenizer-not-json", "A damaged tokenizer.json", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    here.write("model/tokenizer.json", "{")
    return here.run()


@wrong("tokenizer-without-eos", "Texts to train on and a tokenizer without end-of-sequence token")
def _(here: Here) -> str:
    settings = json.loads((here.folder / "model" / "tokenizer_config.json").read_text())
    here.write("model/tokenizer_config.json", json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    here.write("rows.jsonl", json.dumps({"text": "Some text."}) + "\n")
    return here.run(assistant_only_loss=False)


@wrong("vocabulary-mismatch", "A tokenizer with more entries than the embedding", varies=NUMBER)
def _(here: Here) -> str:
    train_tokenizer([" ".join(f"word{n * 37} other{n * 91}" for n in range(300))], 700).save_pretrained("model")
    return here.run()


@wrong("parent-not-run", "A parent stage that has not run")
def _(here: Here) -> str:
    data = {"train": [{"kind": "file", "path": "rows.jsonl"}]}
    stages = {"sft": {"kind": "sft", "data": data}, "more": {"kind": "sft", "init_from": "sft", "data": data}}
    return here.run("--only", "more", stages=stages)


@wrong("parent-folder-empty", "`init_from` names a folder without a checkpoint")
def _(here: Here) -> str:
    return here.run(init_from="./nowhere")


@wrong("scratch-unknown-key", "An unknown key in `model.config`")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": {"hiden_size": 32}})


@wrong("scratch-strange-key", "An unknown key in `model.config` that resembles no other")
def _(here: Here) -> str:
    return here.check(model={"kind": "scratch", "tokenizer": "./model", "config": {"xyz": 32}})


@wrong("scratch-unknown-key-of-family", "An unknown key in `model.config` of a family of transformers")
def _(here: Here) -> str:
    model = {"kind": "scratch", "model_type": "qwen3_moe", "tokenizer": "./model", "config": {"num_expert": 4}}
    return here.check(model=model)


@wrong("scratch-unknown-family", "A `model_type` that transformers does not have")
def _(here: Here) -> str:
    return here.check(model={"kind": "scratch", "model_type": "quen3", "tokenizer": "./model"})


@wrong("scratch-family-not-trained-in-check", "A `model_type` that align does not train, in `align check`")
def _(here: Here) -> str:
    return here.check(model={"kind": "scratch", "model_type": "gpt2", "tokenizer": "./model"})


@wrong("hot-start-key-of-qwen3-moe", "A hot start of a Qwen3 model with a key that its mixture of experts lacks")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "qwen3", "hidden_size": 32}))
    return here.check(model={"kind": "hot_start", "source": "./model", "config": {"moe_topk": 2}})


@wrong("scratch-family-not-trained", "A `model_type` of transformers that align does not train")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "model_type": "gpt2", "tokenizer": "./model"})


@wrong("scratch-preset-and-family", "A `model_type` that is not the preset's")
def _(here: Here) -> str:
    return here.check(model={"kind": "scratch", "model_type": "llama", "preset": "hy3", "tokenizer": "./model"})


@wrong("pretrained-unknown-key", "An override that the checkpoint's configuration does not have")
def _(here: Here) -> str:
    return here.run(model={"kind": "pretrained", "path": "./model", "config": {"hiden_dropout": 0.1}})


@wrong("scratch-impossible-sizes", "Contradicting values in `model.config`")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES | {"moe_topk": 4}})


@wrong("scratch-wrong-type", "A value of the wrong type in `model.config`")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES | {"hidden_size": "wide"}})


@wrong("scratch-without-tokenizer", "A model from scratch without a tokenizer")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "nobody/nothing", "config": SIZES})


@wrong("hot-start-not-llama", "A hot start from another architecture")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "grown")


@wrong("hot-start-not-empty", "A hot start into a folder that is not empty")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "model")


@wrong("hot-start-width", "A hot start whose expert width does not divide the dense width")
def _(here: Here) -> str:
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts"}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained("dense")
    said = here.align("convert", "hot-start", "dense", "grown", "--expert-width", "12")
    assert not (here.folder / "grown").exists()
    return said


def save_qwen3(folder: str) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts"}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=32, head_dim=8, **sizes)).save_pretrained(folder)


@wrong("hot-start-qwen3-top-1", "A hot start of Qwen3 with one expert per token")
def _(here: Here) -> str:
    save_qwen3("dense")
    return here.align("convert", "hot-start", "dense", "grown")


@wrong("hot-start-qwen3-width", "A hot start of Qwen3 with narrower experts")
def _(here: Here) -> str:
    save_qwen3("dense")
    return here.align("convert", "hot-start", "dense", "grown", "--top-k", "2", "--expert-width", "8")


@wrong("zero-3-convolutions-in-check", "ZeRO-3 with a model whose convolutions cannot be sharded, in `align check`")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "lfm2", "hidden_size": 32}))
    here.recipe()
    return here.align("check", "recipe.yaml", "parallel.processes=2", "parallel.zero_stage=3")


@wrong("zero-3-convolutions", "ZeRO-3 with a model whose convolutions cannot be sharded")
def _(here: Here) -> None:
    from align.parallel.load import load_sharded

    load_sharded(None, tiny_config("lfm2"), Path("model"), torch.float32, Parallel(processes=2, zero_stage=3))
