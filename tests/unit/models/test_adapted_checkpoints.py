"""Checkpoints that are an adapter beside its base: loaded whole, in shards, as files; refused if they do not fit.

Witness: the model with PEFT's adapters on, from which they were saved.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.chat import chat
from align.cli import main
from align.config.lora import Lora
from align.config.recipe import Recipe
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models.family import family_of, load_config
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.lora import stream
from align.models.lora.overlay import Overlay
from align.models.lora.whole import whole
from align.preflight import problems
from align.recipes import base
from align.run.adapted import weights_of
from align.run.checkpoint import adapter_folder, require_checkpoint
from align.run.context import StageContext
from align.run.inputs import fingerprints
from align.serve.settings import model_name
from align.serve.staging import Base, check_adapter
from align.train.checkpoint import load_policy, load_reward_model, load_scorer, load_tokenizer, save_model
from tests.tiny_families import tiny_config
from tests.unit.models.adapted import SIZES as COMMON
from tests.unit.models.adapted import TOKENS, moved
from tests.unit.models.adapted import fixed_logprobs as logprobs

NEAR = {"atol": 1e-5, "rtol": 0.0}
TOKENIZER = train_tokenizer(["one two three"], 300)
SIZES = COMMON | {"vocab_size": len(TOKENIZER), "initializer_range": 0.1}


def stage(parent: Path, folder: Path, seed: int, **lora: Any) -> torch.Tensor:
    """Save a trained model beside its base in folder/model; the log-probabilities of the model in memory."""
    model = moved(load_policy(parent, "float32", lora=Lora.model_validate(lora)), seed)
    found = logprobs(model)
    save_model(model, TOKENIZER, folder, "float32", save="adapter")
    assert torch.equal(logprobs(model), found)  # saving has not changed it
    return found


def stage_of(parent: Path, folder: Path) -> Path:
    stage(parent, folder, 5, rank=4)
    return folder / "model"


def make_base(run: Path, kind: str = "hunyuan") -> Path:
    torch.manual_seed(0)
    config = HunYuanConfig(**SIZES) if kind == "hunyuan" else tiny_config(kind)
    family_of(config).policy(config).save_pretrained(run / "base" / "model")
    TOKENIZER.save_pretrained(run / "base" / "model")
    return run / "base" / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a base, an adapter on all groups and the router, and a DoRA adapter on attention above it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    base = make_base(run)
    found = {"sft": stage(base, run / "sft", 1, rank=4, train_router=True, train_embeddings=True)}
    found["dpo"] = stage(run / "sft" / "model", run / "dpo", 2, rank=2, targets=["attention"], dora=True)
    torch.save(found, run / "expected.pt")
    return run


def expected(run: Path, name: str) -> torch.Tensor:
    found: dict[str, torch.Tensor] = torch.load(run / "expected.pt")
    return found[name]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_it_is_loaded_like_a_whole_checkpoint(run: Path, name: str) -> None:
    folder = run / name / "model"
    model = load_policy(folder, "float32").eval()
    torch.testing.assert_close(logprobs(model), expected(run, name), **NEAR)
    assert (expected(run, name) - logprobs(load_policy(run / "base" / "model", "float32").eval())).abs().max() > 0.05
    assert model.name_or_path == str(folder)
    assert len(load_tokenizer(folder)) == len(TOKENIZER)
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_other_families(tmp_path: Path, kind: str) -> None:
    found = stage(make_base(tmp_path, kind), tmp_path / "sft", 1, rank=4, train_router=True)
    torch.testing.assert_close(logprobs(load_policy(tmp_path / "sft" / "model", "float32").eval()), found, **NEAR)
    with whole(tmp_path / "sft" / "model") as folder:
        torch.testing.assert_close(logprobs(load_policy(folder, "float32").eval()), found, **NEAR)


def test_adapters_on_a_layer_that_an_adapter_below_trains_in_full(tmp_path: Path) -> None:
    layer = "layers.0.self_attn.q_proj"
    base = make_base(tmp_path)
    stage(base, tmp_path / "sft", 1, rank=2, targets=["shared_expert"], modules_to_save=[layer])
    found = stage(tmp_path / "sft" / "model", tmp_path / "dpo", 2, rank=2, targets=[layer])
    torch.testing.assert_close(logprobs(load_policy(tmp_path / "dpo" / "model", "float32").eval()), found, **NEAR)
    with whole(tmp_path / "dpo" / "model") as folder:
        torch.testing.assert_close(logprobs(load_policy(folder, "float32").eval()), found, **NEAR)


def test_files_with_whole_weights_exist_while_they_are_needed(run: Path) -> None:
    before = sorted(path.name for path in (run / "dpo").iterdir())
    (run / "dpo" / ".merged-abandoned").mkdir()  # by a process that was killed
    (run / "dpo" / ".merged-abandoned" / "lock").touch()
    with whole(run / "dpo" / "model") as folder:
        model = HunYuanForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert not (run / "dpo" / ".merged-abandoned").exists()
        with whole(run / "dpo" / "model") as other:  # the first one is in use
            assert other != folder
            assert folder.is_dir()
    torch.testing.assert_close(logprobs(model), expected(run, "dpo"), **NEAR)
    assert sorted(path.name for path in (run / "dpo").iterdir()) == before
    with whole(run / "base" / "model") as folder:
        assert folder == run / "base" / "model"


def test_the_chain_is_merged_by_the_command(run: Path, tmp_path: Path) -> None:
    main(["adapter", "merge", str(run / "dpo"), str(tmp_path / "merged")])
    model = HunYuanForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logprobs(model), expected(run, "dpo"), **NEAR)
    assert not (tmp_path / "merged" / "base.json").exists()


def test_stock_peft_loads_it_onto_its_base(run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "base" / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "sft" / "model").eval()
    torch.testing.assert_close(logprobs(model), expected(run, "sft"), atol=1e-4, rtol=0.0)


@pytest.fixture
def alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter of `sft` as PEFT saves it: without pointer, configuration and tokenizer."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "sft" / "model" / name, folder)
    name_base(folder, run / "base" / "model")
    return folder


def name_base(adapter: Path, base: Path | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base and str(base)}))


def test_a_folder_of_peft_is_a_checkpoint_if_it_names_its_base(run: Path, alone: Path, tmp_path: Path) -> None:
    folder = require_checkpoint(alone)
    assert model_name(folder) == "alone"
    assert require_checkpoint(alone) == folder
    assert len(load_tokenizer(folder)) == len(TOKENIZER)
    torch.testing.assert_close(logprobs(load_policy(folder, "float32")), expected(run, "sft"), **NEAR)
    with whole(folder) as files:
        torch.testing.assert_close(logprobs(load_policy(files, "float32")), expected(run, "sft"), **NEAR)
    name_base(alone, run / "base")  # a stage's folder
    assert require_checkpoint(alone) != folder
    name_base(alone, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"elsewhere' is not a folder of this machine\. Write the base's folder"):
        require_checkpoint(alone)
    name_base(alone, None)
    with pytest.raises(UserError, match="its base model is not known"):
        require_checkpoint(alone)


def test_a_stage_above_a_folder_of_peft_names_it_as_its_base(run: Path, alone: Path, tmp_path: Path) -> None:
    found = stage(require_checkpoint(alone), tmp_path / "runs" / "dpo", 5, rank=4)
    result = tmp_path / "runs" / "dpo" / "model"
    assert json.loads((result / "base.json").read_text())["base"] == str(alone)
    shutil.rmtree(tmp_path / "cache")
    assert weights_of(result).base == run / "base" / "model"
    torch.testing.assert_close(logprobs(load_policy(result, "float32")), found, **NEAR)
    tensors = load_file(alone / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, alone / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has changed since the adapter was trained"):
        weights_of(result)


def test_a_recipe_starts_from_a_folder_of_peft(run: Path, alone: Path, tmp_path: Path) -> None:
    sft = {"kind": "sft", "init_from": str(alone), "data": {"train": [{"kind": "file", "path": "rows.jsonl"}]}}
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"kind": "pretrained", "path": str(alone)}, "stages": {"sft": sft}}
    )
    context = StageContext(recipe, "sft", tmp_path / "runs", say=lambda line: None)
    base.run(replace(context, name="base"))
    for folder in (context.checkpoint(str(alone)), context.checkpoint("base")):
        torch.testing.assert_close(logprobs(load_policy(folder, "float32")), expected(run, "sft"), **NEAR)
    before = fingerprints(recipe, "sft")
    assert {"adapter_model.safetensors", "base/config.json"} <= set(before[str(alone)])
    assert not [problem for problem in problems(recipe, ["base", "sft"]) if "alone" in problem]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_shards_of_a_parameter_are_those_of_the_whole(run: Path, ranks: int, groups: int) -> None:
    """Ranges of the flattened parameter, as ZeRO-3 has them, of shards of the experts."""
    config = load_config(run / "sft" / "model")
    overlay = Overlay(weights_of(run / "sft" / "model").adapters, config)
    base = load_policy(run / "base" / "model", "float32")
    tuned = dict(load_policy(run / "sft" / "model", "float32").named_parameters())
    for name, parameter in base.named_parameters():
        parts = groups if parameter.dim() == 3 else 1
        for part in range(parts):
            experts = len(parameter) // parts
            shard = (
                parameter.data[part * experts : (part + 1) * experts].clone() if parts > 1 else parameter.data.clone()
            )
            plain = shard.clone()
            size = -(-shard.numel() // ranks)
            for rank in range(ranks):
                overlay.apply(
                    name, shard, part * experts if parts > 1 else 0, rank * size, min(shard.numel(), (rank + 1) * size)
                )
            wanted = tuned[name].data[part * experts : (part + 1) * experts] if parts > 1 else tuned[name].data
            torch.testing.assert_close(shard, wanted, atol=1e-6, rtol=0.0)
            if ".mlp.experts." in name:
                assert not torch.equal(shard, plain)


def test_rows_of_dora_are_not_divided(run: Path) -> None:
    overlay = Overlay([run / "dpo" / "model"], load_config(run / "dpo" / "model"))
    weight = torch.ones(32, 32)
    with pytest.raises(UserError, match="a DoRA adapter needs the norms of whole rows, which `parallel` shards"):
        overlay.apply("model.layers.0.self_attn.q_proj.weight", weight, 0, 0, 40)


def test_a_reward_model_above_an_adapter(run: Path, tmp_path: Path) -> None:
    """It becomes the critic of a further stage, which has its trunk, and its scores."""
    torch.manual_seed(0)
    model = moved(load_scorer(run / "sft" / "model", "float32", lora=Lora(rank=4)), 3)
    with torch.no_grad():
        scores = model(input_ids=TOKENS).logits
    save_model(model, TOKENIZER, tmp_path / "reward", "float32", save="adapter")
    with torch.no_grad():
        found = load_reward_model(tmp_path / "reward" / "model", "float32")(input_ids=TOKENS).logits
        torch.testing.assert_close(found, scores, **NEAR)
        with whole(tmp_path / "reward" / "model") as folder:
            torch.testing.assert_close(load_reward_model(folder, "float32")(input_ids=TOKENS).logits, scores, **NEAR)
        assert (
            load_scorer(tmp_path / "reward" / "model", "float32", fresh_head=True)(input_ids=TOKENS).logits.any() == 0
        )
    with pytest.raises(UserError, match="it is a reward model; use the checkpoint of a language model"):
        load_policy(tmp_path / "reward" / "model", "float32")


def test_bfloat16_is_rounded_once_for_each_adapter(run: Path) -> None:
    exact = dict(load_policy(run / "sft" / "model", "float32").named_parameters())
    base = dict(load_policy(run / "base" / "model", "float32").named_parameters())
    for name, parameter in load_policy(run / "sft" / "model", "bfloat16").named_parameters():
        update = exact[name] - base[name]
        assert torch.equal(parameter, (base[name].bfloat16().float() + update).bfloat16()) or (
            (parameter.float() - exact[name]).abs().max() < 2**-8 * exact[name].abs().max()
        ), name


def test_the_run_folder_can_be_moved(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    torch.testing.assert_close(
        logprobs(load_policy(tmp_path / "elsewhere" / "dpo" / "model", "float32").eval()), expected(run, "dpo"), **NEAR
    )
    bases = weights_of(tmp_path / "elsewhere" / "dpo" / "model")
    assert bases.base == tmp_path / "elsewhere" / "base" / "model"
    assert bases.adapters == tuple(tmp_path / "elsewhere" / name / "model" for name in ("sft", "dpo"))


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_base_that_has_changed_is_refused(copied: Path) -> None:
    weights = copied / "base" / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    for name in ("sft", "dpo"):
        with pytest.raises(UserError, match=r"base model .*/base/model has changed since the adapter was trained"):
            load_policy(copied / name / "model", "float32")


def test_a_stage_that_was_trained_again_is_another_base(copied: Path) -> None:
    stage(copied / "base" / "model", copied / "sft", 9, rank=4)
    with pytest.raises(UserError, match=r"base model .*/sft/model has changed since the adapter was trained"):
        load_tokenizer(copied / "dpo" / "model")


def test_a_base_that_is_gone_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "base")
    with pytest.raises(SystemExit):
        main(["adapter", "info", str(copied / "sft")])
    said = capsys.readouterr().err
    assert f"its base model {copied / 'base' / 'model'} does not exist; restore it, or write its folder into" in said
    elsewhere = copied.parent / "elsewhere"
    make_base(elsewhere)
    pointer = copied / "sft" / "model" / "base.json"
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"base": str(elsewhere / "base" / "model")}))
    load_policy(copied / "sft" / "model", "float32")


def test_whole_weights_are_never_read_from_an_adapter(run: Path) -> None:
    from align.models.weight_files import weight_files

    with pytest.raises(
        UserError, match="its weights are an adapter beside its base, but whole weights are needed here"
    ):
        weight_files(run / "sft" / "model")


def test_a_failed_save_leaves_the_result_as_it_was(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in (copied / "sft" / "model").iterdir()}
    from align.train import checkpoint

    def fail(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "write_pointer", fail)
    with pytest.raises(UserError, match="the disk is full"):
        stage(copied / "base" / "model", copied / "sft", 9, rank=4)
    assert {file.name: file.read_bytes() for file in (copied / "sft" / "model").iterdir()} == before
    assert not list((copied / "sft").glob(".model*"))


def test_an_adapter_of_an_earlier_run_is_not_left_beside_the_new_one(copied: Path) -> None:
    model = load_policy(copied / "base" / "model", "float32", lora=Lora(rank=4))
    save_model(model, TOKENIZER, copied / "sft", "float32", save="merged")
    assert adapter_folder(copied / "sft") == copied / "sft" / "adapter"
    stage(copied / "base" / "model", copied / "sft", 9, rank=4)
    assert adapter_folder(copied / "sft") == copied / "sft" / "model"


def test_an_adapter_is_not_used_with_other_weights(copied: Path, tmp_path: Path) -> None:
    base = Base.of(copied / "base" / "model", load_config(copied / "base" / "model"), "float32")
    elsewhere = make_base(tmp_path / "elsewhere")
    assert check_adapter(stage_of(base.folder, copied / "plain"), base).rank == 4
    weights = load_file(elsewhere / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, elsewhere / "model.safetensors")
    with pytest.raises(
        UserError, match=r"it was trained on .*/base/model, and .*/elsewhere/base/model has other weights"
    ):
        check_adapter(copied / "plain" / "model", replace(base, folder=elsewhere))
    with pytest.raises(UserError, match="has other weights; pass the base that it was trained on"):
        chat(
            elsewhere,
            system=None,
            max_new_tokens=1,
            temperature=0,
            seed=0,
            variables={},
            adapter=copied / "plain" / "model",
        )
    with pytest.raises(UserError, match=r"it was trained on .*/sft/model, and .*/base/model has other weights"):
        stream.merge_adapter(
            copied / "base" / "model",
            load_config(copied / "base" / "model"),
            copied / "dpo" / "model",
            tmp_path / "out",
        )
