"""Overrides, flags and the other commands."""

from __future__ import annotations

from .here import Here, wrong


@wrong("override-without-value")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed")


@wrong("override-unknown-stage")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.dpo.beta=0.2")


@wrong("override-unknown-key")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.optimizer.lerning_rate=0.2")


@wrong("override-below-a-value")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.batch_size.x=2")


@wrong("override-in-a-list")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.data.train.limit=2")


@wrong("override-unusual-digit")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "stages.sft.data.train.²=5")


@wrong("override-in-an-empty-list")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "stages.sft.data.train=[]", "stages.sft.data.train.0.limit=2")


@wrong("override-duplicate-key")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config={a: 1, a: 2}")


@wrong("override-nested-too-deep")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config=" + "[" * 5000 + "]" * 5000)


@wrong("override-key-too-deep")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config" + ".a" * 5000 + "=1")


@wrong("override-not-yaml")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "name=[a")


@wrong("only-unknown-stage")
def _(here: Here) -> str:
    return here.run("--only", "dpo")


@wrong("from-unknown-stage")
def _(here: Here) -> str:
    return here.run("--from", "dpo")


@wrong("unknown-flag")
def _(here: Here) -> str:
    return here.run("--rsume")


@wrong("report-of-no-run")
def _(here: Here) -> str:
    return here.align("report", "model")


@wrong("from-and-resume")
def _(here: Here) -> str:
    return here.run("--from", "sft", "--resume")


@wrong("chat-with-nothing")
def _(here: Here) -> str:
    return here.align("chat", "nowhere")


@wrong("chat-without-room")
def _(here: Here) -> str:
    return here.align("chat", "model", "--max-new-tokens", "0")


@wrong("hot-start-numbers")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "grown", "--experts", "2", "--top-k", "3")


@wrong("show-model-unknown")
def _(here: Here) -> str:
    return here.align("show-model", "hunyuan-huge")


@wrong("show-model-run")
def _(here: Here) -> str:
    here.write("bad.jsonl", "{\n")
    here.run(data={"train": [{"kind": "file", "path": "bad.jsonl"}]})  # refused when the base model is made
    return here.align("show-model", "run")


@wrong("show-model-context")
def _(here: Here) -> str:
    return here.align("show-model", "tiny", "--context", "-1")


@wrong("tokenizer-missing")
def _(here: Here) -> str:
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-damaged")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "IQ== 0\nnonsense\n")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-empty")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-without-bytes")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "IQ== 0\n")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")
