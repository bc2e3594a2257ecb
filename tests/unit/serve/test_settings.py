"""Settings of `align serve`, and the copies of adapters that vLLM loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.errors import UserError
from align.models.lora.folder import read_adapter
from align.serve.command import adapter_base, require_served_on_a_cpu
from align.serve.settings import (
    TOKEN_VARIABLE,
    is_loopback,
    model_name,
    named_folders,
    resolved_token,
    served_rank,
)
from align.serve.staging import Base, check_adapter, stage_adapter
from tests.tiny_families import FAMILIES, tiny_config
from tests.unit.serve.served import STACKS, save_adapter, save_base


def test_a_model_is_named_after_its_folder_or_its_stage() -> None:
    assert model_name(Path("/models/hunyuan-large")) == "hunyuan-large"
    assert model_name(Path("/runs/first/sft/model")) == "sft"


def test_adapters_are_named(tmp_path: Path) -> None:
    (tmp_path / "stage" / "adapter").mkdir(parents=True)
    (tmp_path / "stage" / "adapter" / "adapter_config.json").touch()
    found = named_folders([f"a={tmp_path / 'stage'}", "b.2=/x=y"], "base")
    assert found == {"a": tmp_path / "stage" / "adapter", "b.2": Path("/x=y")}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("box", False)],
)
def test_only_loopback_needs_no_token(monkeypatch: pytest.MonkeyPatch, host: str, loopback: bool) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert is_loopback(host) == loopback
    if loopback:
        assert resolved_token(None, None, host) is None
    else:
        with pytest.raises(UserError, match="has no token"):
            resolved_token(None, None, host)
    assert resolved_token("t", None, host) == "t"
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert resolved_token(None, None, host) == "from-the-environment"


@pytest.mark.parametrize(
    ("needed", "given", "rank"), [(0, None, 16), (17, None, 32), (4, 5, 8), (512, None, 512), (1, 1, 1)]
)
def test_memory_is_reserved_for_a_rank_that_vllm_has(needed: int, given: int | None, rank: int) -> None:
    assert served_rank(needed, given) == rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staging")
    save_base(folder / "base")
    return folder


@pytest.mark.parametrize("stack", [0, 1], ids=["gate_up", "down"])
def test_copies_name_the_stacks_and_have_a_scaling_of_one(folder: Path, tmp_path: Path, stack: int) -> None:
    """PEFT saves the factors of either stack alone under the same name."""
    save_adapter(
        folder / "base",
        tmp_path / "lora",
        seed=1,
        rank=4,
        target_modules=["q_proj"],
        target_parameters=[STACKS[stack]],
        rank_pattern={STACKS[stack]: 2},
        alpha_pattern={STACKS[stack]: 12},
    )
    base = adapter_base(folder / "base", "float32")
    assert stage_adapter(check_adapter(tmp_path / "lora", base), base, tmp_path / "copy")
    before, copied = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "copy"))
    stem = "base_model.model.model.layers.1"
    experts = f"{stem}.mlp.experts"
    name = f"{experts}.base_layer" if stack == 0 else experts
    torch.testing.assert_close(copied[f"{name}.lora_B.weight"], 12 / 2 * before[f"{experts}.lora_B.weight"])
    assert torch.equal(copied[f"{name}.lora_A.weight"], before[f"{experts}.lora_A.weight"])
    query = f"{stem}.self_attn.q_proj.lora_B.weight"
    torch.testing.assert_close(copied[query], 8 / 4 * before[query])
    assert len(copied) == len(before)
    settings = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 4)
    assert read_adapter(tmp_path / "copy").scaling("anything", 4) == 1


def test_an_adapter_whose_b_is_zero_moves_nothing(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from align.models.hunyuan import HunYuanForCausalLM

    model = HunYuanForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "new"
    )
    base = adapter_base(folder / "base", "float32")
    assert not stage_adapter(check_adapter(tmp_path / "new", base), base, tmp_path / "copy")


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_beside_other_mixtures_of_experts_are_refused_on_a_cpu(family: str) -> None:
    base = Base.of(Path("model"), tiny_config(family), "float32")
    if any("expert" in key or key == "moe_topk" for key in FAMILIES[family]):
        with pytest.raises(UserError, match="model: on a CPU vLLM serves no adapters beside a model of this family"):
            require_served_on_a_cpu(base)
    else:
        require_served_on_a_cpu(base)


def test_adapters_beside_hunyuan_are_served_on_a_cpu(folder: Path) -> None:
    base = adapter_base(folder / "base", "float32")
    assert base.bones.experts
    require_served_on_a_cpu(base)
