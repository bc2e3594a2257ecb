"""Overrides, flags and subcommands."""

from __future__ import annotations

from .here import Here, wrong


@wrong("override-without-value", "An override without a value")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed")


@wrong("override-unknown-stage", "An override of a stage that the recipe does not have")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.dpo.beta=0.2")


@wrong("override-unknown-key", "An override of a key that does not exist")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.optimizer.lerning_rate=0.2")


@wrong("override-below-a-value", "An override of a key below a single value")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.batch_size.x=2")


@wrong("override-in-a-list", "An override of a list entry by name")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recipe.yaml", "stages.sft.data.train.limit=2")


@wrong("override-unusual-digit", "An override of a list entry by a digit of another script")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "stages.sft.data.train.²=5")


@wrong("override-in-an-empty-list", "An override of an entry of an empty list")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "stages.sft.data.train=[]", "stages.sft.data.train.0.limit=2")


@wrong("override-duplicate-key", "An override that writes a key twice")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config={a: 1, a: 2}")


@wrong("override-nested-too-deep", "An override whose value is nested too deep", varies=r"\[{9,}\]*")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config=" + "[" * 5000 + "]" * 5000)


@wrong("override-key-too-deep", "An override whose key is nested too deep", varies=r"(\.a){9,}")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "model.config" + ".a" * 5000 + "=1")


@wrong("override-not-yaml", "An override whose value is not YAML")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "name=[a")


@wrong("only-unknown-stage", "`--only` with an unknown stage")
def _(here: Here) -> str:
    return here.run("--only", "dpo")


@wrong("from-unknown-stage", "`--from` with an unknown stage")
def _(here: Here) -> str:
    return here.run("--from", "dpo")


@wrong("unknown-flag", "An unknown flag")
def _(here: Here) -> str:
    return here.run("--rsume")


@wrong("report-of-no-run", "A report on a folder that is not a run")
def _(here: Here) -> str:
    return here.align("report", "model")


@wrong("from-and-resume", "`--from` together with `--resume` or `--only`")
def _(here: Here) -> str:
    return here.run("--from", "sft", "--resume")


@wrong("chat-with-nothing", "A chat with a folder that is not a checkpoint")
def _(here: Here) -> str:
    return here.align("chat", "nowhere")


@wrong("chat-without-new-tokens", "A chat with no tokens for an answer")
def _(here: Here) -> str:
    return here.align("chat", "model", "--max-new-tokens", "0")


@wrong("serve-reward-of-a-language-model", "A reward server of a language model")
def _(here: Here) -> str:
    return here.align("serve-reward", "model")


@wrong("chat-with-damaged-variables", "Template variables of a chat that are not a JSON object")
def _(here: Here) -> str:
    return here.align("chat", "model", "--chat-template-kwargs", "enable_thinking=false")


@wrong("chat-with-unknown-variable", "A template variable of a chat that the chat template does not read")
def _(here: Here) -> str:
    return here.align("chat", "model", "--chat-template-kwargs", '{"enable_thinking": false}')


@wrong("hot-start-one-expert", "A hot start with fewer than two experts")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "grown", "--experts", "1")


@wrong("hot-start-top-k", "A hot start with more experts per token than experts")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "grown", "--experts", "2", "--top-k", "3")


@wrong("show-model-unknown", "A model that is neither a preset nor a checkpoint")
def _(here: Here) -> str:
    return here.align("show-model", "hunyuan-huge")


@wrong("show-model-run", "The folder of a run instead of a model")
def _(here: Here) -> str:
    here.write("bad.jsonl", '{"prompt": "Hi", "completion": " "}\n')
    here.run(data={"train": [{"kind": "file", "path": "bad.jsonl"}]})  # saves the base model and refuses the data
    return here.align("show-model", "run")


@wrong("show-model-context", "A negative context length")
def _(here: Here) -> str:
    return here.align("show-model", "tiny", "--context", "-1")


@wrong("tokenizer-missing", "A missing tokenizer file")
def _(here: Here) -> str:
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-damaged", "A tokenizer file with an invalid line")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "IQ== 0\nnonsense\n")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-empty", "An empty tokenizer file")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("tokenizer-without-bytes", "A tokenizer file without all single bytes")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "IQ== 0\n")
    return here.align("convert", "tokenizer", "hy.tiktoken", "out")


@wrong("path-too-long", "A path that the operating system refuses", varies="x{9,}")
def _(here: Here) -> str:
    return here.align("report", "x" * 300)


@wrong("hot-start-below-a-file", "A hot start into a folder below a file")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "rows.jsonl/grown")


@wrong("convert-tokenizer-to-a-file", "A file where `convert tokenizer` should write")
def _(here: Here) -> str:
    here.write("hy.tiktoken", "")
    return here.align("convert", "tokenizer", "hy.tiktoken", "rows.jsonl")


@wrong("smoke-unknown-line", "A line of the smoke test that does not exist")
def _(here: Here) -> str:
    return here.align("smoke", "--only", "12")


@wrong("smoke-folder-is-a-file", "A file as the folder of the smoke test")
def _(here: Here) -> str:
    (here.folder / "runs").write_text("")
    return here.align("smoke", "--folder", "runs")
