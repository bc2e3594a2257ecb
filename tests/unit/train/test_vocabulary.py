"""Tokenizers that lack tokens, padded vocabularies, and tokens added to a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from align import cli
from align.data.chat import DEFAULT_TEMPLATE, stop_token_ids
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.vocabulary import vocabulary_size, vocabulary_tensors
from align.train.checkpoint import load_policy, load_scorer, load_tokenizer
from align.train.vocabulary import add_tokens
from tests.tiny_families import FAMILIES, save_tiny, tiny_config, tiny_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "max_position_embeddings": 128,
}
NEW = ["<|tool|>", "<|call|>"]


def make(folder: Path, *, rows: int = 0, tied: bool = False, shard: str = "1GB") -> Any:
    """Save a model with `rows` more embeddings than the tokenizer's 259 tokens; return the tokenizer."""
    tokenizer = train_tokenizer(["a"], 259)
    torch.manual_seed(0)
    config = HunYuanConfig(vocab_size=259 + rows, tie_word_embeddings=tied, **SIZES)
    HunYuanForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return tokenizer


def linked(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(0, 320), (5, 264)])
def test_new_tokens_start_as_the_mean_of_the_known_ones(tmp_path, tied, rows, size):
    make(tmp_path / "source", rows=rows, tied=tied)
    before = digest(tmp_path / "source")
    folder = linked(tmp_path / "source", tmp_path / "model")
    add_tokens(folder, [*NEW, NEW[0], "<|im_end|>"], 64)
    assert digest(tmp_path / "source") == before
    assert not any(file.is_symlink() for file in folder.glob("*.safetensors"))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == size
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 261
    assert tokenizer.encode("a<|call|>b", add_special_tokens=False) == [
        *tokenizer.encode("a"),
        260,
        *tokenizer.encode("b"),
    ]
    assert tokenizer.decode([259, 260], skip_special_tokens=True) == ""
    old, new = tensors(tmp_path / "source"), tensors(folder)
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert set(old) == set(new)
    for name, weight in new.items():
        if name not in names:
            assert torch.equal(weight, old[name])
            continue
        assert torch.equal(weight[:259], old[name][:259])
        mean = sum(old[name][row].double() for row in range(259)) / 259
        assert weight.shape[0] == size
        assert torch.allclose(weight[259:].double(), mean.expand(size - 259, -1), atol=1e-6)
    ids = torch.tensor([[3, 4, 5, 6]])
    first, second = (load_policy(path, "float32").eval() for path in (tmp_path / "source", folder))
    with torch.no_grad():
        assert torch.equal(first(ids).logits[..., :259], second(ids).logits[..., :259])


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tensors_of_the_vocabulary_of_each_family(kind):
    assert set(vocabulary_tensors(tiny_config(kind))) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_new_tokens_of_other_families(tmp_path, kind):
    tokenizer = train_tokenizer(["a"], 259)
    save_tiny(kind, tmp_path / "source", vocab_size=259)
    tokenizer.save_pretrained(tmp_path / "source")
    folder = linked(tmp_path / "source", tmp_path / "model")
    add_tokens(folder, NEW, 64)
    first, second = (load_policy(path, "float32").eval() for path in (tmp_path / "source", folder))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits[..., :259])
    embeddings = second.get_input_embeddings().weight
    assert torch.allclose(embeddings[259:], embeddings[:259].mean(0).expand(61, -1), atol=1e-6)


def test_only_the_files_with_embeddings_are_copied_and_the_index_stays_right(tmp_path):
    make(tmp_path / "source", shard="30KB")
    folder = linked(tmp_path / "source", tmp_path / "model")
    add_tokens(folder, NEW, 1)
    copied = [file.name for file in folder.glob("*.safetensors") if not file.is_symlink()]
    assert 0 < len(copied) <= 2 < len(list(folder.glob("*.safetensors")))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors(folder).values())
    assert load_policy(folder, "float32").config.vocab_size == 261


def test_tokens_that_exist_change_nothing(tmp_path):
    make(tmp_path / "source")
    folder = linked(tmp_path / "source", tmp_path / "model")
    add_tokens(folder, ["<|im_start|>", "<|im_end|>"], 64)
    assert all(file.is_symlink() for file in folder.iterdir())


@pytest.mark.parametrize(
    ("current", "ids", "multiple", "expected"),
    [
        (100, [99], 64, 100),
        (100, [100], 64, 128),
        (100, [100, 127], 64, 128),
        (100, [128], 64, 192),
        (100, [100], 1, 101),
    ],
)
def test_vocabulary_size(current, ids, multiple, expected):
    assert vocabulary_size(current, ids, multiple) == expected


def test_a_recipe_adds_tokens_and_trains_them(tmp_path):
    """A base model without chat template gets ChatML's tokens, and with them the default template."""
    tokenizer = make(tmp_path / "source")
    tokenizer.chat_template = None
    text = tokenizer.backend_tokenizer.to_str().replace("<|im_start|>", "<|first|>").replace("<|im_end|>", "<|last|>")
    (tmp_path / "source" / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|last|>", "pad_token": "<|pad|>"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (tmp_path / "source" / name).unlink(missing_ok=True)
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = {"train": [{"kind": "file", "path": str(tmp_path / "rows.jsonl")}], "max_length": 64}
    sft = {"kind": "sft", "data": data, "batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    model = {"kind": "pretrained", "path": str(tmp_path / "source"), "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    recipe = {"name": "t", "model": model, "stages": {"sft": sft}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    cli.main(["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "sft" / "model"
    trained = load_tokenizer(folder)
    assert trained.chat_template == DEFAULT_TEMPLATE
    assert stop_token_ids(trained) == [trained.convert_tokens_to_ids("<|last|>"), 260]
    before, after = tensors(tmp_path / "run" / "base" / "model"), tensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape[0] == 320
        assert not torch.equal(before[name][260], after[name][260])


# --- tokenizers that lack tokens --------------------------------------------------------------------------


def test_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path):
    make(tmp_path / "model", rows=61)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.decode([*tokenizer.encode("ab"), 259, 319], skip_special_tokens=True) == "ab"


def test_an_id_beyond_the_embeddings_is_refused_even_if_the_tokens_are_few(tmp_path):
    tokenizer = make(tmp_path / "model", rows=3)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 300
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="the tokenizer has 301 entries, but the model's vocabulary has 262"):
        load_tokenizer(tmp_path / "model")


def test_a_damaged_tokenizer_is_one_sentence(tmp_path):
    make(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "model")


STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "reward": {"kind": "reward_model"},
    "dpo": {"kind": "dpo"},
    "ppo": {
        "kind": "ppo",
        "rewards": [{"kind": "model", "init_from": "reward"}],
        "rollout": {"engine": "huggingface", "max_new_tokens": 4, "max_model_length": 68},
        "max_prompt_length": 64,
        "batch_size": 2,
        "mini_batch_size": 2,
        "steps": 1,
    },
}


def run_stages(folder: Path, **lacking: Any) -> dict[str, dict[str, float]]:
    """Run every kind of stage with two rows of different lengths; return the metrics of each stage."""
    folder.mkdir()
    make(folder / "source")
    path = folder / "source" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | lacking
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    rows: dict[str, list[dict]] = {"messages": [], "pairs": [], "prompts": []}
    for text in ("b", "bcdef"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        rows["messages"].append({"messages": turns})
        rows["pairs"].append({"prompt": "a", "chosen": text, "rejected": text + "gh"})
        rows["prompts"].append({"prompt": text})
    source = {}
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
        source[name] = [{"kind": "file", "path": str(folder / f"{name}.jsonl")}]
    stages = {name: dict(stage) for name, stage in STAGES.items()}
    for name in ("sft", "reward", "dpo"):
        data = {"train": source["messages" if name == "sft" else "pairs"], "max_length": 64}
        stages[name] |= {"data": data, "batch_size": 2, "micro_batch_size": 2, "max_steps": 1}
    stages["ppo"]["prompts"] = source["prompts"]
    recipe = {"name": "t", "model": {"kind": "pretrained", "path": str(folder / "source")}, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    cli.main(["run", str(folder / "recipe.yaml"), "--run-dir", str(folder / "run")])
    lines = {name: (folder / "run" / name / "metrics.jsonl").read_text().splitlines() for name in stages}
    return {name: json.loads(found[0]) for name, found in lines.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_embedding_of_a_padding_token_inside_a_conversation_is_trained(tmp_path, kind):
    save_tiny(kind, tmp_path / "model", pad_token_id=2)
    assert tiny_model(kind, pad_token_id=2).get_input_embeddings().padding_idx == 2
    for model in (load_policy(tmp_path / "model", "float32"), load_scorer(tmp_path / "model", "float32")):
        hidden = model.model(input_ids=torch.tensor([[5, 2, 6, 7]])).last_hidden_state
        hidden.square().sum().backward()
        rows = model.get_input_embeddings().weight.grad.abs().sum(1)
        assert rows.nonzero().flatten().tolist() == [2, 5, 6, 7]


@pytest.mark.slow
def test_the_padding_token_changes_nothing(tmp_path):
    """Not even if it is the end-of-sequence token, which is in the loss and is where a reward model reads its score."""
    usual = run_stages(tmp_path / "usual")
    for name, lacking in {
        "pad is eos": {"pad_token": "<|im_end|>"},
        "no pad": {"pad_token": None},
        "no eos": {"eos_token": None, "pad_token": None},
    }.items():
        found = run_stages(tmp_path / name, **lacking)
        for stage, key in (("sft", "loss"), ("reward", "loss"), ("dpo", "loss"), ("ppo", "score_mean"), ("ppo", "kl")):
            assert found[stage][key] == usual[stage][key], (name, stage)
        tokenizer = load_tokenizer(tmp_path / name / "run" / "ppo" / "model")
        assert tokenizer.pad_token == ("<|pad|>" if name == "no eos" else "<|im_end|>")
        assert stop_token_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
