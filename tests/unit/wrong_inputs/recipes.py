"""Recipes that cannot be read or do not make sense."""

from __future__ import annotations

from typing import Any

import yaml

from .here import IN_PARENTHESES, Here, sample_stage, wrong

HUB = {"kind": "pretrained", "path": "owner/name"}


@wrong("unknown-key", "A key that does not exist")
def _(here: Here) -> str:
    return here.check(bach_size=8)


@wrong("unknown-section-key", "The same, with no real key that resembles it")
def _(here: Here) -> str:
    return here.check(lora={"xyz": 8})


@wrong("missing-key", "A key without which the section means nothing")
def _(here: Here) -> str:
    return here.check(stages={"sft": {"kind": "sft"}})


@wrong("missing-kind", "A section that does not say its kind")
def _(here: Here) -> str:
    return here.check(model={"path": "model"})


@wrong("missing-kind-behind-a-name-that-is-one", "A stage that does not, called like a kind")
def _(here: Here) -> str:
    return here.check(stages={"sft": {"batch_size": 8}})


@wrong("unknown-key-behind-the-name-of-another-kind", "A key that does not exist, in a stage called like another kind")
def _(here: Here) -> str:
    rows = [{"kind": "file", "path": "rows.jsonl"}]
    return here.check(stages={"sft": {"kind": "dpo", "data": {"train": rows}, "betta": 0.2}})


@wrong("unknown-kind", "A kind that does not exist")
def _(here: Here) -> str:
    return here.check(kind="stf")


@wrong("unknown-choice", "A word that is not one of the choices")
def _(here: Here) -> str:
    return here.check(optimizer={"schedule": "cosin"})


@wrong("not-a-whole-number", "Text where a whole number belongs")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=abc")


@wrong("number-in-quotes", "A number in quotes")
def _(here: Here) -> str:
    return here.check(batch_size="8")


@wrong("time-for-a-number", "A time where a whole number belongs")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "seed=1:30")


@wrong("true-for-a-number", "`true` where a number belongs")
def _(here: Here) -> str:
    return here.check(batch_size=True)


@wrong("number-for-text", "A number where text belongs")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": 7}]})


@wrong("not-finite", "Infinity, or not a number")
def _(here: Here) -> str:
    return here.check(epochs=float("inf"))


@wrong("not-true-or-false", "Something else where `true` or `false` belongs")
def _(here: Here) -> str:
    return here.check(assistant_only_loss="perhaps")


@wrong("not-a-list", "A single value where a list belongs")
def _(here: Here) -> str:
    return here.check(data={"train": "rows.jsonl"})


@wrong("not-a-section", "A single value where a section belongs")
def _(here: Here) -> str:
    return here.check(optimizer=3)


@wrong("empty-list", "A list without entries")
def _(here: Here) -> str:
    return here.check(data={"train": []})


@wrong("too-small", "A number below its range")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 3})


@wrong("too-large", "A number above its range")
def _(here: Here) -> str:
    return here.check(optimizer={"learning_rate": 5})


@wrong("bad-name", "A run's name that cannot be a folder's")
def _(here: Here) -> str:
    here.recipe()
    return here.align("show", "recipe.yaml", "name=my run")


@wrong("duplicate-key", "A key written twice")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 1\nseed: 2\n")
    return here.align("check", "recipe.yaml")


@wrong("leading-zero", "A whole number that begins with 0")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: 010\n")
    return here.align("check", "recipe.yaml")


@wrong("endless-number", "A whole number without end")
def _(here: Here) -> str:
    here.write("recipe.yaml", f"name: t\nseed: {'9' * 5000}\n")
    return here.align("check", "recipe.yaml")


@wrong("nested-too-deep", "Lists or sections in each other without end")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: " + "[" * 5000 + "]" * 5000)
    return here.align("check", "recipe.yaml")


@wrong("circular-alias", "An alias inside what it stands for")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nmodel: {kind: hot_start, config: &a {b: [*a]}}\n")
    return here.align("check", "recipe.yaml")


@wrong("aliases-of-aliases", "Aliases of aliases that stand for millions of values")
def _(here: Here) -> str:
    levels = "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 10))
    here.write("recipe.yaml", "name: t\nl0: &l0 [1]\n" + levels)
    return here.align("check", "recipe.yaml")


@wrong("yaml-tag", "A YAML tag")
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nseed: !!int abc\n")
    return here.align("check", "recipe.yaml")


@wrong("not-yaml", "Not YAML", varies=IN_PARENTHESES)
def _(here: Here) -> str:
    here.write("recipe.yaml", "name: t\nstages: [a\n")
    return here.align("check", "recipe.yaml")


@wrong("not-a-mapping", "YAML, but not a recipe")
def _(here: Here) -> str:
    here.write("recipe.yaml", "- sft\n- dpo\n")
    return here.align("check", "recipe.yaml")


@wrong("not-utf8", "Another encoding")
def _(here: Here) -> str:
    (here.folder / "recipe.yaml").write_bytes("name: é".encode("latin-1"))
    return here.align("check", "recipe.yaml")


@wrong("missing-recipe", "No such file", varies=r"(?<=are ).+(?=\.)")
def _(here: Here) -> str:
    return here.align("run", "nowhere.yaml")


@wrong("recipe-name-too-long", "A name that no file can have", varies="r{9,}")
def _(here: Here) -> str:
    return here.align("check", "r" * 5000)


@wrong("unknown-parent", "`init_from` names a stage that does not come earlier")
def _(here: Here) -> str:
    return here.check(init_from="pretrain")


@wrong("parent-of-another-kind", "A stage that makes something else than what is needed")
def _(here: Here) -> str:
    pairs = sample_stage(max_new_tokens=8, max_model_length=64)
    dpo = {"kind": "dpo", "init_from": "pairs", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}}
    return here.check(stages={"pairs": pairs, "dpo": dpo})


@wrong("bad-stage-name", "A stage's name with other characters")
def _(here: Here) -> str:
    return here.check(stages={"SFT 1": {"kind": "sft", "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}})


@wrong("batches-do-not-divide", "Batch sizes that do not divide")
def _(here: Here) -> str:
    return here.check(batch_size=8, micro_batch_size=3)


@wrong("dropout-in-experts", "Dropout in adapters on routed experts")
def _(here: Here) -> str:
    return here.check(lora={"dropout": 0.1})


def prefer(here: Here, **settings: Any) -> str:
    dpo = {"kind": "dpo", "data": {"train": [{"kind": "file", "path": "pairs.jsonl"}]}, "batch_size": 8}
    return here.check(stages={"dpo": dpo | settings})


@wrong("option-of-another-loss", "An option of another `loss_type`")
def _(here: Here) -> str:
    return prefer(here, loss_type="hinge", label_smoothing=0.1)


@wrong("exo-without-label-smoothing", "`loss_type: exo_pair` without label smoothing")
def _(here: Here) -> str:
    return prefer(here, loss_type="exo_pair", label_smoothing=0.0)


@wrong("sorted-pairs-in-micro-batches", "A loss that sorts a batch, cut into micro-batches")
def _(here: Here) -> str:
    return prefer(here, loss_type="aot", micro_batch_size=4)


@wrong("more-chosen-than-experts", "More experts a token than there are")
def _(here: Here) -> str:
    return here.check(model={"kind": "hot_start", "experts": 2, "top_k": 3})


@wrong("no-room-for-a-prompt", "Completions that fill the whole context")
def _(here: Here) -> str:
    return here.check(stages={"pairs": sample_stage(max_new_tokens=64, max_model_length=64)})


@wrong("processes-without-a-share", "Several processes that cannot share a step's rows")
def _(here: Here) -> str:
    here.recipe(batch_size=8, micro_batch_size=8)
    return here.align("check", "recipe.yaml", "--nproc", "3")


@wrong("passes-without-a-share", "Passes that do not fill a process's share")
def _(here: Here) -> str:
    here.recipe(batch_size=12, micro_batch_size=4)
    return here.align("check", "recipe.yaml", "--nproc", "2")


def spread(here: Here, **parallel: Any) -> str:
    """What is said of a recipe's `parallel` section."""
    here.recipe()
    return here.align("check", "recipe.yaml", f"parallel={yaml.safe_dump(parallel, default_flow_style=True)}")


@wrong("groups-of-processes", "Expert-parallel groups that do not divide the processes")
def _(here: Here) -> str:
    return spread(here, expert_parallel_size=2)


@wrong("groups-of-experts", "Expert-parallel groups that do not divide the experts")
def _(here: Here) -> str:
    return spread(here, processes=4, expert_parallel_size=4)


@wrong("groups-of-experts-at-the-start", "The same for a checkpoint that a stage names, without `align check`")
def _(here: Here) -> str:
    return here.run("parallel={processes: 4, expert_parallel_size: 4}", init_from="./model", model=HUB)


@wrong("experts-without-zero", "Expert parallelism without ZeRO")
def _(here: Here) -> str:
    return spread(here, processes=2, expert_parallel_size=2, zero_stage=0)


@wrong("offload-parameters-without-zero-3", "Weights offloaded that are not sharded")
def _(here: Here) -> str:
    return spread(here, zero_stage=2, offload={"parameters": "cpu"})


@wrong("offload-optimizer-without-zero", "An optimizer offloaded that is not sharded")
def _(here: Here) -> str:
    return spread(here, zero_stage=0, offload={"optimizer": "cpu"})


@wrong("offload-to-nvme-without-zero-3", "The same to a disk")
def _(here: Here) -> str:
    return spread(here, zero_stage=2, offload={"optimizer": "nvme", "path": "."})


@wrong("nvme-without-path", "A disk without a folder")
def _(here: Here) -> str:
    return spread(here, offload={"parameters": "nvme"})


@wrong("path-without-nvme", "A folder without a disk")
def _(here: Here) -> str:
    return spread(here, offload={"optimizer": "cpu", "path": "."})


def optimise(here: Here, **settings: Any) -> str:
    rewards = [{"kind": "length", "max_tokens": 8}]
    ppo = {"kind": "ppo", "prompts": [{"kind": "file", "path": "rows.jsonl"}], "rewards": rewards}
    return here.check(stages={"ppo": ppo | settings})


@wrong("renamed-key", "A key under the name that it had in an earlier version")
def _(here: Here) -> str:
    return optimise(here, algorithm="ppo")


@wrong("critic-without-gae", "A critic where the advantages need none")
def _(here: Here) -> str:
    return optimise(here, advantage_estimator="dr_grpo", completions_per_prompt=2, critic={"learning_rate": 1e-3})


@wrong("importance-without-a-difference", "An importance correction where old_logprobs is rollout")
def _(here: Here) -> str:
    return optimise(here, old_logprobs="rollout", importance={"cap": 3.0})


@wrong("replay-of-no-pass", "Replay of a pass that is left out")
def _(here: Here) -> str:
    return optimise(here, old_logprobs="rollout", routing_replay="trainer")


OVERLAPPED = {"overlap": True, "rollout": {"engine": "remote", "start_servers": 1}}


@wrong("overlap-without-correction", "Completions of an earlier policy without a correction")
def _(here: Here) -> str:
    return optimise(here, **OVERLAPPED, importance={"correction": "none"})


@wrong("overlap-without-bound", "Completions of an earlier policy without a bound on the ratio")
def _(here: Here) -> str:
    return optimise(here, **OVERLAPPED, old_logprobs="rollout")


@wrong("cispo-with-dual-clip", "An option of the clipped loss with another policy loss")
def _(here: Here) -> str:
    return optimise(here, policy_loss="cispo", dual_clip=3.0)


@wrong("home-of-nobody", "A path in the home directory of a user who does not exist")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "~nobody-here/rows.jsonl"}]})
