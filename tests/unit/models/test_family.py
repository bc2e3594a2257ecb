"""A family registered by a test can be loaded, run, adapted, exported, saved and loaded again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from align.config.lora import Lora
from align.data.experience import build_experience
from align.errors import UserError
from align.models.family import FAMILIES, Place, family_of, load_config, register
from align.models.forward import policy_output, sequence_scores
from align.models.hunyuan import (
    HunYuanConfig,
    HunYuanForCausalLM,
    HunYuanForSequenceClassification,
    HunYuanModel,
    layout,
)
from align.models.hunyuan.family import HUNYUAN
from align.models.lora.adapters import lora_config
from align.models.weights import load_published, published_weights
from align.train.checkpoint import (
    count_parameters,
    count_stored_parameters,
    load_policy,
    load_reward_model,
    load_scorer,
    save_model,
)
from tests.near import assert_near

LETTERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""An expert's matrices: the toy family's published names (those of Mixtral) to HunYuan's names."""


class ToyConfig(HunYuanConfig):
    model_type = "toy"


class ToyModel(HunYuanModel):
    config_class = ToyConfig


class ToyForCausalLM(HunYuanForCausalLM):
    config_class = ToyConfig


class ToyForSequenceClassification(HunYuanForSequenceClassification):
    config_class = ToyConfig


def to_hunyuan(name: str) -> str:
    name = name.replace(".mlp.router.weight", ".mlp.gate.wg.weight")
    return re.sub(r"\.experts\.(\d+)\.(w\d)\.", lambda m: f".experts.{m[1]}.{LETTERS[m[2]]}.", name)


def to_toy(name: str) -> str:
    letters = {ours: toy for toy, ours in LETTERS.items()}
    name = name.replace(".mlp.gate.wg.weight", ".mlp.router.weight")
    return re.sub(r"\.experts\.(\d+)\.(\w+_proj)\.", lambda m: f".experts.{m[1]}.{letters[m[2]]}.", name)


class ToyNames:
    def place(self, published: str) -> Place:
        return layout.place(to_hunyuan(published))

    def published(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return ((to_toy(key), part) for key, part in layout.published(name, tensor))


def conversion() -> list[WeightConverter | WeightRenaming]:
    stacked = [MergeModulelist(dim=0)]
    halves = ["mlp.experts.*.w1.weight", "mlp.experts.*.w3.weight"]
    return [
        WeightRenaming("mlp.router.weight", "mlp.gate.weight"),
        WeightConverter(halves, "mlp.experts.gate_up_proj", [*stacked, Concatenate(dim=1)]),
        WeightConverter("mlp.experts.*.w2.weight", "mlp.experts.down_proj", stacked),
    ]


TOY = replace(
    HUNYUAN,
    config=ToyConfig,
    trunk=ToyModel,
    policy=ToyForCausalLM,
    scorer=ToyForSequenceClassification,
    names=lambda _: ToyNames(),
    conversion=conversion,
    published_shapes=lambda config: {to_toy(name): shape for name, shape in HUNYUAN.published_shapes(config).items()},
)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "initializer_range": 0.2,
}
TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: None)


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    register(TOY)
    yield
    del FAMILIES["toy"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "start"
    ToyForCausalLM(ToyConfig(**SIZES)).save_pretrained(folder)
    return folder


BATCH = build_experience([[5, 6, 7], [8]], [[20, 0], [21, 22, 23]], [[0.0] * 2, [0.0] * 3])


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return policy_output(model, BATCH, 1.0).logprobs


def test_the_whole_way_of_a_policy(checkpoint: Path, tmp_path: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.w3.weight" in stored
    assert "model.layers.1.mlp.router.weight" in stored
    policy = load_policy(checkpoint, "float32")
    assert type(policy) is ToyForCausalLM
    before = logprobs(policy)
    # The forward pass over the padded batch gives the expected values of the packed one.
    full = policy(BATCH.input_ids, attention_mask=(torch.arange(5) < BATCH.lengths[:, None]).long()).logits
    row = full[1, 0].log_softmax(-1)[21]
    assert_near(before[1, 0], row.detach())

    sent = dict(published_weights(policy))
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[name], stored[name]) for name in stored)
    fresh = ToyForCausalLM(ToyConfig(**SIZES))
    assert load_published(fresh, iter(stored.items())) == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(logprobs(fresh), before)

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    changed = logprobs(policy)
    save_model(policy, TOKENIZER, tmp_path / "stage", "float32")
    again = load_policy(tmp_path / "stage" / "model", "float32")
    assert torch.equal(logprobs(again), changed)
    assert not torch.equal(changed, before)


def test_adapters_reach_its_targets(checkpoint: Path, tmp_path: Path) -> None:
    policy = load_policy(checkpoint, "float32", lora=Lora(rank=2, experts=True, train_router=True))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    targets = {"q_proj", "mlp.experts", "mlp.gate", "shared_mlp"}
    assert {target for target in targets if any(target in name for name in trained)} == targets
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logprobs(policy)
    save_model(policy, TOKENIZER, tmp_path / "stage", "float32")
    merged = load_policy(tmp_path / "stage" / "model", "float32")
    assert_near(logprobs(merged), expected)


def test_a_reward_model_is_known_by_its_architecture(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = load_scorer(checkpoint, "float32")
    scores = sequence_scores(scorer, BATCH).detach()
    save_model(scorer, TOKENIZER, tmp_path / "stage", "float32")
    folder = tmp_path / "stage" / "model"
    assert torch.equal(sequence_scores(load_reward_model(folder, "float32"), BATCH), scores)
    with pytest.raises(UserError, match="it is a reward model"):
        load_policy(folder, "float32")
    with pytest.raises(UserError, match="it is a language model"):
        load_reward_model(checkpoint, "float32")


def test_parameters_are_counted(checkpoint: Path) -> None:
    """In each of two layers, a token uses one of four experts. An expert has three matrices of 16 x 12."""
    counts = count_parameters(load_policy(checkpoint, "float32"))
    assert counts["total"] - counts["active"] == 2 * 3 * 3 * 16 * 12
    assert count_stored_parameters(checkpoint) == counts


def test_a_checkpoint_of_no_family_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"toy"', '"other"'))
    with pytest.raises(UserError, match="its model_type is 'other', which align does not know"):
        load_policy(checkpoint, "float32")


def test_the_family_is_found_by_model_type(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    assert type(config) is ToyConfig
    assert family_of(config) is TOY
    assert family_of(HunYuanConfig()) is HUNYUAN
    assert len(get_checkpoint_conversion_mapping("toy")) == 3


def test_a_scorers_head_is_trained_beside_its_adapters(checkpoint: Path) -> None:
    lora = Lora(rank=2, train_router=True)
    policy, scorer = load_policy(checkpoint, "float32"), load_scorer(checkpoint, "float32")
    assert lora_config(lora, policy, task="CAUSAL_LM").modules_to_save == ["mlp.gate"]
    assert lora_config(lora, scorer, task="SEQ_CLS").modules_to_save == ["mlp.gate", "score"]
    assert lora_config(Lora(rank=2, train_router=False), policy, task="CAUSAL_LM").modules_to_save is None
