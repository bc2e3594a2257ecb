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


@wrong("unknown-command", "A mistyped command")
def _(here: Here) -> str:
    return here.align("adapter", "chekc")


@wrong("mistyped-value", "A mistyped value of an option")
def _(here: Here) -> str:
    return here.align("eval", "model", "--tasks", "x", "--backend", "vlm")


@wrong("init-without-flags", "`align init` without flags and without a terminal")
def _(here: Here) -> str:
    return here.align("init")


@wrong("init-over-a-file", "`align init` with the name of a file that exists")
def _(here: Here) -> str:
    here.recipe()
    return here.align("init", "recipe.yaml", "--model", "model", "--data", "rows.jsonl")


@wrong("init-without-data-for-a-stage", "`align init` with a stage that does not train on the rows")
def _(here: Here) -> str:
    return here.align("init", "new.yaml", "--model", "model", "--data", "rows.jsonl", "--stage", "dpo")


@wrong("init-of-prompts", "`align init` with prompts that have no answers")
def _(here: Here) -> str:
    here.write("prompts.jsonl", '{"prompt": "Hi"}\n')
    return here.align("init", "new.yaml", "--model", "model", "--data", "prompts.jsonl")


@wrong("init-other-columns", "`align init` with rows of no known shape")
def _(here: Here) -> str:
    here.write("qa.jsonl", '{"question": "Hi", "answer": "Hello"}\n')
    return here.align("init", "new.yaml", "--model", "model", "--data", "qa.jsonl")


@wrong("import-of-another-file", "`align import-recipe` of a file of neither tool")
def _(here: Here) -> str:
    here.recipe()
    return here.align("import-recipe", "recipe.yaml")


@wrong("import-of-ppo", "`align import-recipe` of a stage that is not imported")
def _(here: Here) -> str:
    here.write("ppo.yaml", "model_name_or_path: model\nstage: ppo\ndataset: x\n")
    return here.align("import-recipe", "ppo.yaml")


@wrong("import-of-packs", "`align import-recipe` of a batch that is counted in packs")
def _(here: Here) -> str:
    text = "base_model: model\nsample_packing: true\nlearning_rate: 1e-5\n"
    here.write("packs.yaml", f"{text}datasets: [{{path: rows.jsonl, type: chat_template}}]\n")
    return here.align("import-recipe", "packs.yaml")
