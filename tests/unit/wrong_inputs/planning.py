"""`align plan` with flags, clusters and recipes that it cannot plan."""

from __future__ import annotations

from .here import Here, wrong


@wrong("plan-without-memory", "`align plan` without the memory of a GPU")
def _(here: Here) -> str:
    return here.align("plan", "tiny")


@wrong("plan-unknown-gpu", "An unknown GPU model")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "abacus")


@wrong("plan-no-gpus", "A cluster without GPUs")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--gpus", "0")


@wrong("plan-no-memory", "A GPU without memory")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu-memory", "0")


@wrong("plan-reserve", "A reserve as large as the GPU's memory")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu-memory", "8", "--reserve", "8")


@wrong("plan-rate", "A measured rate of zero")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--tflops", "0")


@wrong("plan-show", "`--show 0`")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--search", "--show", "0")


@wrong("plan-uneven-hosts", "A number of GPUs that cannot be split evenly over hosts of eight")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--gpus", "9")


@wrong("plan-hosts", "Hosts that do not divide the GPUs")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--gpus", "8", "--hosts", "3")


@wrong("plan-batch", "A batch that the GPUs do not divide")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--gpus", "3")


@wrong("plan-unknown-stage", "A stage that the recipe does not have")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--stage", "spt")


@wrong("plan-untrained-stage", "A stage that does not train")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--stage", "pairs")


@wrong("plan-nothing-trains", "A recipe without a stage that trains")
def _(here: Here) -> str:
    here.recipe(stages={"pairs": {"kind": "sample", "train": [{"kind": "python_docs", "view": "prompts"}]}})
    return here.align("plan", "recipe.yaml", "--gpu", "h100")


@wrong("plan-long-rows", "Rows longer than the model's positions")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--stage", "sft", "stages.sft.data.max_length=4096")


@wrong("plan-unknown-sizes", "A checkpoint that is not on this machine")
def _(here: Here) -> str:
    return here.align("plan", "hunyuan-large", "--gpu", "h100", "model.path=models/mine")


@wrong("plan-model", "`--model` that is neither a preset nor a folder")
def _(here: Here) -> str:
    return here.align("plan", "tiny", "--gpu", "h100", "--model", "nowhere")


@wrong("plan-damaged-config", "`--model` with a damaged config.json")
def _(here: Here) -> str:
    (here.folder / "mine").mkdir()
    here.write("mine/config.json", "{")
    return here.align("plan", "tiny", "--gpu", "h100", "--model", "mine")


@wrong("plan-family-not-trained", "`--model` of a `model_type` that align does not train")
def _(here: Here) -> str:
    (here.folder / "gpt2").mkdir()
    here.write("gpt2/config.json", '{"model_type": "gpt2"}')
    return here.align("plan", "tiny", "--gpu", "h100", "--model", "./gpt2")
