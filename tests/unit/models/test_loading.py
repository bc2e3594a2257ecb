"""Loading a published checkpoint: every tensor is loaded bit for bit, without a second copy in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM, HunYuanModel
from align.models.weight_files import stored_tensors
from align.models.weights import check_weights, read_weights

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": [4, 1, 3],
    "pad_token_id": 0,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in many shards, with a generation configuration."""
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**SIZES))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_hand(tensors: dict[str, torch.Tensor], experts: dict[int, int]) -> dict[str, torch.Tensor]:
    """The expected state dict: our names and stacked experts, built from the published tensors with plain torch."""
    ours = {n.replace("gate.wg", "gate"): t for n, t in tensors.items() if ".experts." not in n}
    for layer, count in experts.items():
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [tensors[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(count)]
            for kind in ("gate", "up", "down")
        )
        ours[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        ours[f"{prefix}.down_proj"] = torch.stack(down)
    ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    return ours


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [True, False])
def test_every_tensor_is_in_its_place(saved: Path, stored: torch.dtype, wanted: torch.dtype, shards: bool) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in published(saved).items()}
    if shards:
        for file in saved.glob("*.safetensors"):
            save_file({name: tensors[name] for name in load_file(file)}, file, {"format": "pt"})
    else:
        for file in saved.glob("model*"):
            file.unlink()
        save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    model, found = AutoModelForCausalLM.from_pretrained(saved, dtype=wanted, output_loading_info=True)
    expected = {name: tensor.to(wanted) for name, tensor in by_hand(tensors, {0: 4, 2: 3}).items()}
    assert same(model.state_dict(), expected)
    assert not any(found.values())
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.max_new_tokens == 7
    assert torch.equal(model.model.inv_freq, HunYuanModel(model.config).inv_freq)


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_is_read_into_one_of_any_type(tmp_path: Path, wanted: torch.dtype) -> None:
    tensor = torch.randn(3, 5)
    save_file({"other": torch.zeros(4), "weight": tensor}, tmp_path / "a.safetensors")
    target = torch.empty(3, 5, dtype=wanted)
    (found,) = (stored for stored in stored_tensors([tmp_path / "a.safetensors"]) if stored.name == "weight")
    found.read_into(target)
    assert torch.equal(target, tensor.to(wanted))


def test_a_loaded_model_is_saved_in_the_published_layout(saved: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert same(published(tmp_path / "again"), published(saved))


def test_transformers_own_loader_makes_the_same(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    monkeypatch.setattr(HunYuanForCausalLM, "_load_pretrained_model", PreTrainedModel._load_pretrained_model)
    assert same(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict(), ours)


def test_other_names_are_left_to_transformers(saved: Path) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    for file in saved.glob("*.safetensors"):
        save_file({f"old.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    loaded = HunYuanForCausalLM.from_pretrained(saved, dtype=torch.float32, key_mapping={r"^old\.": ""})
    assert same(loaded.state_dict(), wanted)


def test_base_models_and_scorers_take_the_same_files(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert same(HunYuanModel.from_pretrained(saved, dtype=torch.float32).state_dict(), model.model.state_dict())
    model.model.save_pretrained(tmp_path / "base")
    assert same(HunYuanForCausalLM.from_pretrained(tmp_path / "base").state_dict(), model.state_dict())
    scorer, found = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1, output_loading_info=True)
    assert same(scorer.model.state_dict(), model.model.state_dict())
    assert found["missing_keys"] == {"score.weight"}
    assert scorer.score.weight.std() > 0
    scorer.save_pretrained(tmp_path / "scorer")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
    assert torch.equal(again.score.weight, scorer.score.weight)


def test_weights_are_replaced_where_they_are(saved: Path) -> None:
    torch.manual_seed(1)
    model = HunYuanForCausalLM(HunYuanConfig(**SIZES))
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    read_weights(model, saved)
    assert same(model.state_dict(), by_hand(published(saved), {0: 4, 2: 3}))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


@pytest.mark.slow
def test_the_peak_is_the_model(tmp_path: Path) -> None:
    """Peak memory is measured in a separate process. With two copies of a layer it would be 1.3 times the model."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's /proc")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_experts": 8}
    model = HunYuanForCausalLM(HunYuanConfig(**{**SIZES, **sizes}))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 100e6
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    code = f"""
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import align.models
def status(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if key in l)
AutoModelForCausalLM.from_config(align.models.hunyuan.HunYuanConfig(**{SIZES!r}))  # imports
torch.randn(10**6).add_(1).isfinite().all()
Path("/proc/self/clear_refs").write_text("5")
start = status("VmRSS")
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)
print("peak", status("VmHWM") - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    peak = int(done.stdout.split("peak")[1])
    assert 0.95 * size < peak < 1.15 * size


# --- damaged files -----------------------------------------------------------------------------------------------


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: object, values: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, values: (header, values[:-1]), "bytes, but its header says"),
        (lambda header, values: (header, values + b"0"), "bytes, but its header says"),
        (lambda header, values: ("[1]", values), "header is not valid"),
        (lambda header, values: ('{"a"', values), "header is not valid"),
        (lambda header, values: ({"a": {"dtype": "F32", "shape": [2]}}, b"0" * 8), "header is not valid"),
        (lambda header, values: (tensor([3], 0, 8), b"0" * 8), "does not match its shape"),
        (lambda header, values: (tensor([2], 4, 12), b"0" * 12), "not at their offset"),
        (lambda header, values: (tensor([8], 0, 8, "I8"), b"0" * 8), "of type I8"),
    ],
)
def test_a_damaged_file_is_refused_by_its_header(tmp_path: Path, change, message: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5)}, file)
    write(file, *change(*header_of(file)))
    with pytest.raises(UserError, match=message):
        stored_tensors([file])


def tensor(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}}


def test_a_file_without_tensors_is_valid(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    write(tmp_path / "shortest.safetensors", "{}", b"")
    assert stored_tensors([tmp_path / "empty.safetensors", tmp_path / "shortest.safetensors"]) == []


@pytest.mark.parametrize("length", [0, 7, 8, 9, 200])
def test_a_file_cut_in_its_header_is_refused(saved: Path, length: int) -> None:
    file = min(saved.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="truncated"):
        HunYuanForCausalLM.from_pretrained(saved, dtype=torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    values = torch.zeros(100_003, dtype=stored)
    values[70_000] = value
    save_file({"a": values}, tmp_path / "model.safetensors")
    (found,) = stored_tensors([tmp_path / "model.safetensors"])
    with pytest.raises(UserError, match="the tensor 'a' has values that are infinite"):
        found.read_into(torch.empty(100_003))


def test_large_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    values = torch.full((3, 1000), 6e4, dtype=torch.float16)
    save_file({"a": values}, tmp_path / "model.safetensors")
    (found,) = stored_tensors([tmp_path / "model.safetensors"])
    target = torch.empty(3, 1000, dtype=torch.float16)
    found.read_into(target)
    assert torch.equal(target, values)


@pytest.mark.parametrize("experts", [[3, 1, 3], [5, 1, 3]])
def test_other_experts_than_the_configuration_asks_for(saved: Path, experts: list[int]) -> None:
    config = HunYuanConfig(**{**SIZES, "num_experts": experts})
    with pytest.raises(UserError, match=r"the files do not have the \d experts"):
        HunYuanForCausalLM.from_pretrained(saved, config=config)


def test_half_an_expert_is_refused(saved: Path) -> None:
    for file in saved.glob("*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if not (".2.mlp" in n and n.endswith("1.up_proj.weight"))}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"do not have the 3 experts of 'model\.layers\.2\.mlp\.experts\.gate_up_proj'"):
        HunYuanForCausalLM.from_pretrained(saved, dtype=torch.float32)


def test_other_shapes_are_reported_as_transformers_does(saved: Path) -> None:
    config = HunYuanConfig(**{**SIZES, "intermediate_size": 10})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HunYuanForCausalLM.from_pretrained(saved, config=config)
    model, found = HunYuanForCausalLM.from_pretrained(
        saved, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name.split(".mlp.")[-1] for name, *_ in found["mismatched_keys"]} >= {"experts.gate_up_proj"}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("layers", "message"), [([2], "is missing"), ([1, 2], "and 1 more are missing")])
def test_missing_tensors_are_counted(saved: Path, layers: list[int], message: str) -> None:
    config = HunYuanConfig.from_pretrained(saved)
    gone = [f"model.layers.{layer}.input_layernorm.weight" for layer in layers]
    for file in saved.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if n not in gone}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"the tensor '{gone[0]}' {message}"):
        check_weights(saved, config)


def test_extra_tensors_are_counted_and_old_rotary_buffers_ignored(saved: Path) -> None:
    config = HunYuanConfig.from_pretrained(saved)
    (saved / "model.safetensors.index.json").unlink()
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, saved / "extra.safetensors")
    check_weights(saved, config)
    save_file({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, saved / "extra.safetensors")
    with pytest.raises(UserError, match="has no tensor 'a' and 2 more"):
        check_weights(saved, config)


def test_a_head_is_required_unless_it_is_tied_or_a_scorer(saved: Path) -> None:
    config = HunYuanConfig.from_pretrained(saved, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"the tensor 'lm_head\.weight' is missing"):
        check_weights(saved, config)
    check_weights(saved, config, scorer=True)
    save_file({"score.weight": torch.ones(3, 16)}, saved / "score.safetensors")
    (saved / "model.safetensors.index.json").unlink()
    check_weights(saved, HunYuanConfig.from_pretrained(saved, num_labels=3), scorer=True)
    with pytest.raises(UserError, match=r"has the shape \[3, 16\], but config.json requires \[1, 16\]"):
        check_weights(saved, HunYuanConfig.from_pretrained(saved, num_labels=1), scorer=True)


def test_headers_are_checked_without_reading_values(saved: Path) -> None:
    """A sparse 1 TiB file with a valid header is refused because of its tensor's name."""
    config = HunYuanConfig.from_pretrained(saved)
    check_weights(saved, config)
    file = saved / "model-extra.safetensors"
    (saved / "model.safetensors.index.json").unlink()
    write(file, tensor([2**38], 0, 2**40), b"")
    with file.open("ab") as content:
        content.truncate(file.stat().st_size + 2**40)
    with pytest.raises(UserError, match="has no tensor 'a'"):
        check_weights(saved, config)
