"""Recipes that are not valid."""

from __future__ import annotations

from typing import Any

import yaml

from .here import IN_PARENTHESES, Here, sample_stage, wrong

HUB = {"kind": "pretrained", "path": "owner/name"}


@wrong("unknown-key", "An unknown key")
def _(here: Here) -> str:
    return here.check(bach_size=8)


@wrong("unknown-section-key", "An unknown key that resembles no other")
def _(here: Here) -> str:
    return here.check(lora={"xyz": 8})


@wrong("missing-key", "A missing key without a default")
def _(here: Here) -> str:
    return here.check(stages={"sft": {"kind": "sft"}})


@wrong("missing-kind", "A section without `kind`")
def _(here: Here) -> str:
    return here.check(model={"path": "model"})


@wrong("missing-kind-in-stage-named-like-a-kind", "A stage without `kind`, named like a kind")
def _(here: Here) -> str:
    return here.check(stages={"sft": {"batch_size": 8}})


@wrong("unknown-key-in-stage-named-like-a-kind", "An unknown key in a stage named like another kind")
def _(here: Here) -> str:
    rows = [{"kind": "file", "path": "rows.jsonl"}]
    return here.check(stages={"sft": {"kind": "dpo", "data": {"train": rows}, "betta": 0.2}})


@wrong("unknown-kind", "An unknown kind")
def _(here: Here) -> str:
    return here.check(kind="stf")


@wrong("unknown-choice", "A value that is not one of the choices")
def _(here: Here) -> str:
    return here.check(optimizer={"schedule": "cosin"})


@wrong("not-a-whole-number", "Text instead of a whole number")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=abc")


@wrong("number-in-quotes", "A number in quotes")
def _(here: Here) -> str:
    return here.check(batch_size="8")


@wrong("time-for-a-number", "A time instead of a whole number")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=1:30")


@wrong("true-for-a-number", "`true` instead of a number")
def _(here: Here) -> str:
    return here.check(batch_size=True)


@wrong("number-for-text", "A number instead of text")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": 7}]})


@wrong("not-finite", "An infinite number")
def _(here: Here) -> str:
    return here.check(epochs=float("inf"))


@wrong("not-true-or-false", "A value other than `true` and `false`")
def _(here: Here) -> str:
    return here.check(assistant_only_loss="perhaps")


@wrong("not-a-list", "A single value instead of a list")
def _(here: Here) -> str:
    return here.check(data={"train": "rows.jsonl"})


@wrong("not-a-section", "A single value instead of a section")
def _(here: Here) -> str:
    return here.check(optimizer=3)


@wrong("empty-list", "An empty list")
def _(here: Here) -> str:
    return here.check(data={"train": []})


@wrong("too-small", "A number below its range")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 3})


@wrong("too-large", "A number above its range")
def _(here: Here) -> str:
    return here.check(optimizer={"learning_rate": 5})


@wrong("bad-name", "A run name that cannot name a folder")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "name=my run")


@wrong("duplicate-key", "A key written twice")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 1\nseed: 2\n")
    return here.align("check", "recipe.yaml")


@wrong("leading-zero", "A whole number with a leading zero")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 010\n")
    return here.align("check", "recipe.yaml")


@wrong("endless-number", "A whole number of thousands of digits")
def _(here: Here) -> str:
    here.write("recipe.yaml", f"name: t\nseed: {'9' * 5000}\n")
    return here.align("check", "recipe.yaml")


@wrong("nested-too-deep", "Lists or sections nested too deep")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: " + "[" * 5000 + "]" * 5000)
    return here.align("check", "recipe.yaml")


@wrong("circular-alias", "A YAML alias inside its own value")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: {kind: hot_start, config: &a {b: [*a]}}\n")
    return here.align("check", "recipe.yaml")


@wrong("aliases-of-aliases", "YAML aliases that expand to millions of values")
def _(here: Here) -> str:
    levels = "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 10))
    here.write("recipe.yaml", "name: t\nl0: &l0 [1]\n" + levels)
    return here.align("check", "recipe.yaml")


@wrong("yaml-tag", "A YAML tag")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: !!int abc\n")
    return here.align("check", "recipe.yaml")


@wrong("not-yaml", "A file that is not YAML", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nstages: [a\n")
    return here.align("check", "recipe.yaml")


@wrong("not-a-mapping", "A YAML file that is not a recipe")
def _(here: Here) -> str:
    here.write("recipe.yaml", "- sft\n- dpo\n")
    return here.align("check", "recipe.yaml")


@wrong("not-utf8", "A file in another encoding")
def _(here: Here) -> str:
    (here.folder / "recipe.yaml").write_bytes("name: é".encode("latin-1"))
    return here.align("check", "recipe.yaml")


@wrong("missing-recipe", "A missing recipe file")
def _(here: Here) -> str:
    return here.align("run", "nowhere.yaml")


@wrong("missing-recipe-near-another", "A missing recipe file, beside one with a similar name")
def _(here: Here) -> str:
    here.recipe()
    return here.align("run", "recpie.yaml")


@wrong("unknown-recipe", "A name that is not that of a shipped recipe", varies=r"(?<=are ).+(?=\.)")
def _(here: Here) -> str:
    return here.align("run", "nothing-like-it")


@wrong("unknown-recipe-near-another", "A shipped recipe with a typo in its name")
def _(here: Here) -> str:
    return here.align("check", "qickstart")


@wrong("recipe-is-a-folder", "A folder instead of a recipe")
def _(here: Here) -> str:
    return here.align("run", "model")


@wrong("recipe-name-too-long", "A file name that is too long", varies="r{9,}")
def _(here: Here) -> str:
    return here.align("check", "r" * 5000)


@wrong("unknown-parent", "`init_from` with a stage that is not an earlier one")
def _(here: Here) -> str:
    return here.check(init_from="pretrain")


@wrong("parent-of-another-kind", "A reference to a stage whose result has the wrong kind")
def _(here: Here) -> str:
    pairs = sample_stage(max_new_tokens=8, max_model_length=64)
    dpo = {"kind": "dpo", "init_from": "pairs", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}}
    return here.check(stages={"pairs": pairs, "dpo": dpo})


@wrong("bad-stage-name", "An invalid stage name")
def _(here: Here) -> str:
    return here.check(stages={"SFT 1": {"kind": "sft", "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}})


def prefer(here: Here, **settings: Any) -> str:
    dpo = {"kind": "dpo", "data": {"train": [{"kind": "file", "path": "pairs.jsonl"}]}, "batch_size": 8}
    return here.check(stages={"dpo": dpo | settings})


@wrong("option-of-another-loss", "An option of another `loss_type`")
def _(here: Here) -> str:
    return prefer(here, loss_type="hinge", label_smoothing=0.1)


@wrong("exo-without-label-smoothing", "`loss_type: exo_pair` without label smoothing")
def _(here: Here) -> str:
    return prefer(here, loss_type="exo_pair", label_smoothing=0.0)


@wrong("sorted-pairs-in-micro-batches", "A loss that sorts a batch, with several micro-batches")
def _(here: Here) -> str:
    return prefer(here, loss_type="aot", micro_batch_size=4)


@wrong("sorted-pairs-in-passes", "A loss that sorts a batch, with `micro_batch_tokens` for a part of it")
def _(here: Here) -> str:
    return prefer(here, loss_type="aot", micro_batch_tokens=4096)


def label(here: Here, **settings: Any) -> str:
    kto = {"kind": "kto", "data": {"train": [{"kind": "file", "path": "labels.jsonl"}]}}
    return here.check(stages={"kto": kto | settings})


@wrong("kto-of-single-rows", "`kind: kto` with one row per step")
def _(here: Here) -> str:
    return label(here, batch_size=1)


@wrong("kto-without-weights", "`kind: kto` with both weights 0")
def _(here: Here) -> str:
    return label(here, desirable_weight=0, undesirable_weight=0)


@wrong("more-chosen-than-experts", "More experts per token than experts")
def _(here: Here) -> str:
    return here.check(model={"kind": "hot_start", "experts": 2, "top_k": 3})


@wrong("no-tokens-left-for-a-prompt", "Completions that fill the whole context")
def _(here: Here) -> str:
    return here.check(stages={"pairs": sample_stage(max_new_tokens=64, max_model_length=64)})


@wrong("batch-size-not-divisible-by-processes", "A batch that the processes cannot divide evenly")
def _(here: Here) -> str:
    here.recipe(batch_size=8, micro_batch_size=8)
    return here.align("check", "recipe.yaml", "--nproc", "3")


def check_parallel(here: Here, **parallel: Any) -> str:
    """Check a recipe with this `parallel` section."""
    here.recipe()
    return here.align("check", "recipe.yaml", f"parallel={yaml.safe_dump(parallel, default_flow_style=True)}")


@wrong("expert-parallel-size-and-processes", "An expert-parallel size that does not divide the processes")
def _(here: Here) -> str:
    return check_parallel(here, expert_parallel_size=2)


@wrong("expert-parallel-size-and-experts", "An expert-parallel size that does not divide the experts")
def _(here: Here) -> str:
    return check_parallel(here, processes=4, expert_parallel_size=4)


@wrong(
    "expert-parallel-size-and-checkpoint",
    "An expert-parallel size that does not divide a checkpoint's experts, in `align run`",
)
def _(here: Here) -> str:
    return here.run("parallel={processes: 4, expert_parallel_size: 4}", init_from="./model", model=HUB)


@wrong("experts-without-zero", "Expert parallelism without ZeRO")
def _(here: Here) -> str:
    return check_parallel(here, processes=2, expert_parallel_size=2, zero_stage=0)


@wrong("offload-parameters-without-zero-3", "Offloaded weights that are not sharded")
def _(here: Here) -> str:
    return check_parallel(here, zero_stage=2, offload={"parameters": "cpu"})


@wrong("offload-optimizer-without-zero", "Offloaded optimizer states that are not sharded")
def _(here: Here) -> str:
    return check_parallel(here, zero_stage=0, offload={"optimizer": "cpu"})


@wrong("offload-to-nvme-without-zero-3", "Optimizer states offloaded to nvme below ZeRO-3")
def _(here: Here) -> str:
    return check_parallel(here, zero_stage=2, offload={"optimizer": "nvme", "path": "."})


@wrong("nvme-without-path", "Offloading to nvme without a folder")
def _(here: Here) -> str:
    return check_parallel(here, offload={"parameters": "nvme"})


@wrong("path-without-nvme", "A folder for nvme without offloading to it")
def _(here: Here) -> str:
    return check_parallel(here, offload={"optimizer": "cpu", "path": "."})


def check_ppo(here: Here, **settings: Any) -> str:
    rewards = [{"kind": "length", "max_tokens": 8}]
    ppo = {"kind": "ppo", "prompts": [{"kind": "file", "path": "rows.jsonl"}], "rewards": rewards}
    return here.check(stages={"ppo": ppo | settings})


@wrong("renamed-key", "A key by its old name")
def _(here: Here) -> str:
    return check_ppo(here, algorithm="ppo")


@wrong("critic-without-gae", "A critic with a critic-free advantage estimator")
def _(here: Here) -> str:
    return check_ppo(here, advantage_estimator="dr_grpo", completions_per_prompt=2, critic={"learning_rate": 1e-3})


@wrong("importance-without-a-difference", "An importance correction with `old_logprobs: rollout`")
def _(here: Here) -> str:
    return check_ppo(here, old_logprobs="rollout", importance={"cap": 3.0})


@wrong(
    "replay-of-a-skipped-pass", "`routing_replay: trainer` with `old_logprobs: rollout`, which skips that forward pass"
)
def _(here: Here) -> str:
    return check_ppo(here, old_logprobs="rollout", routing_replay="trainer")


OVERLAPPED = {"overlap": True, "rollout": {"engine": "remote", "start_servers": 1}}


@wrong("overlap-without-correction", "`overlap` without an importance correction")
def _(here: Here) -> str:
    return check_ppo(here, **OVERLAPPED, importance={"correction": "none"})


@wrong("overlap-without-bound", "`overlap` without a bound on the ratio")
def _(here: Here) -> str:
    return check_ppo(here, **OVERLAPPED, old_logprobs="rollout")


@wrong("cispo-with-dual-clip", "An option of the clipped loss with another policy loss")
def _(here: Here) -> str:
    return check_ppo(here, policy_loss="cispo", dual_clip=3.0)


@wrong("unknown-home-directory", "A path in the home directory of a user who does not exist")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "~nobody-here/rows.jsonl"}]})


@wrong("renamed-key-without-a-name", "A key by its old name, with a value that is not text")
def _(here: Here) -> str:
    return check_ppo(here, algorithm=["grpo"])


@wrong("path-too-long-in-a-recipe", "A path in a recipe that is too long for the operating system", varies="x{9,}")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "x" * 300}]})


@wrong("added-tokens-frozen", "Added tokens whose embeddings LoRA does not train")
def _(here: Here) -> str:
    return here.check(model={"kind": "pretrained", "path": "model", "add_tokens": ["<|tool|>"]}, lora={"rank": 2})


@wrong("empty-path", "An empty path")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": ""}]})


@wrong("model-listed-twice", "The same model twice in an evaluation")
def _(here: Here) -> str:
    return here.check(
        stages={"evaluate": {"kind": "evaluate", "models": ["base", "base"], "tasks": [{"name": "gsm8k"}]}}
    )


@wrong("model-config-not-finite", "A value of a model's configuration that is not a number")
def _(here: Here) -> str:
    config = {"rope_scaling": {"factor": float("inf")}}
    return here.check(model={"kind": "pretrained", "path": "model", "config": config})
