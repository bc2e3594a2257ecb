"""The planner's memory and traffic against hand arithmetic, models on torch's meta device, and invariants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.lora import Lora
from align.config.presets import PRESETS
from align.config.recipe import Recipe
from align.errors import UserError
from align.models import short_attention
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.hunyuan.configuration import size_problem
from align.models.hunyuan.modeling import HunYuanForSequenceClassification
from align.models.lora.adapters import add_lora
from align.models.packing import Packing
from align.plan import activations
from align.plan.activations import Pass
from align.plan.cost import model_cost
from align.plan.hunyuan import DEFAULTS
from align.plan.job import SMOLLM2_135M, Job, Member, RolloutWork, jobs_of
from align.plan.memory import Buffers, Memory, memory
from align.plan.setting import Setting
from align.plan.shape import shape_of
from align.plan.sizes import ModelShape
from align.plan.speed import operations
from align.plan.traffic import Flow, traffic
from align.train.checkpoint import count_parameters

NO_BUFFERS = Buffers(reduce_bucket=0, prefetch=0, max_reuse_distance=0, sub_group=10**9)
HUNYUAN = [name for name, values in PRESETS.items() if "model_type" not in values]
VARIANTS = {
    **{name: PRESETS[name] for name in HUNYUAN},
    "biased, untied, top-2": PRESETS["tiny"]
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "moe_topk": 2},
    "dense first layer": PRESETS["tiny"] | {"num_experts": [1, 8, 8, 4], "moe_topk": [1, 2, 1, 1]},
    "no sharing, no norm": PRESETS["tiny"] | {"use_cla": False, "use_qk_norm": False, "num_shared_expert": 2},
    "routed experts alone": PRESETS["tiny"] | {"use_mixed_mlp_moe": False},
}


def sft(shape: ModelShape, dtype: str = "bfloat16", **changes: object) -> Job:
    job = Job("sft", "sft", (Member("policy", shape, "all"),), dtype, 512, 1, 2048)
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def large() -> ModelShape:
    return shape_of("hunyuan-large", PRESETS["hunyuan-large"])


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_equal_those_of_a_model_on_the_meta_device(name: str) -> None:
    shape = shape_of(name, VARIANTS[name])
    with torch.device("meta"):
        model = HunYuanForCausalLM(HunYuanConfig(**VARIANTS[name]))
    count = count_parameters(model)
    assert shape.parameters() == count["total"]
    assert shape.active == count["active"]
    with torch.device("meta"):
        scorer = HunYuanForSequenceClassification(HunYuanConfig(**VARIANTS[name], num_labels=1))
    assert shape.parameters(scorer=True) == sum(p.numel() for p in scorer.parameters())


@pytest.mark.parametrize("name", HUNYUAN)
def test_operations_equal_those_of_show_model(name: str) -> None:
    # A token in a row of 2n tokens attends to n tokens on average.
    shape = shape_of(name, PRESETS[name])
    assert shape.forward_flops(2048) == model_cost(shape, context=1024).flops_per_token


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=8, train_router=True),
        Lora(rank=4, experts=False),
        Lora(rank=4, attention=False, shared_mlp=False),
        Lora(rank=2, attention=False, experts=False, train_router=True),
        Lora(rank=4, groups={"attention": {"rank": 3}, "routed_experts": {"rank": 2}}),  # type: ignore[dict-item]
        Lora(rank=4, layers=[0, 2]),
        Lora(rank=4, experts=False, dora=True),
        Lora.model_validate({"rank": 4, "targets": ["layers.1.*.q_proj"], "modules_to_save": ["input_layernorm"]}),
        Lora.model_validate({"rank": 4, "targets": ["routed_experts", "layers.2.*.q_proj"], "layers": [2]}),
    ],
)
def test_adapter_parameters_equal_pefts(lora: Lora) -> None:
    with torch.device("meta"):
        model = add_lora(HunYuanForCausalLM(HunYuanConfig(**PRESETS["small"])), lora, task="CAUSAL_LM")
    inside, outside = shape_of("small", PRESETS["small"]).adapters(lora)
    assert inside + outside == count_parameters(model)["trainable"]
    assert inside == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and ".experts." in n)


def test_defaults_equal_the_configuration_class() -> None:
    config = HunYuanConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_the_dense_model_of_the_quickstart_has_its_published_size() -> None:
    # 134,515,008 parameters: the model card of SmolLM2-135M
    values = SMOLLM2_135M | {"num_experts": 1, "use_mixed_mlp_moe": False, "use_qk_norm": False, "use_cla": False}
    assert shape_of("smollm2", values).parameters() == 134_515_008


def test_mixed_precision_adamw_is_sixteen_bytes_per_parameter(large: ModelShape) -> None:
    found = memory(sft(large), Setting(64, True, 3), NO_BUFFERS)
    kept = ("policy weights", "policy gradients", "policy fp32 weights", "policy optimizer moments")
    parts = [found.gpu[name] * 64 / large.parameters() for name in kept]
    assert parts == pytest.approx([2, 2, 4, 8])


def test_offloaded_adamw_is_eighteen_bytes_per_parameter_in_host_memory(large: ModelShape) -> None:
    # Bytes per parameter in DeepSpeed: fp32 weights 4, moments 8, fp32 gradients 4, bf16 gradients 2.
    found = memory(sft(large), Setting(64, True, 3, offload_optimizer="cpu"), NO_BUFFERS)
    assert found.host_bytes * 64 == pytest.approx(18 * 388_698_128_640)
    assert "policy optimizer moments" not in found.gpu
    both = memory(sft(large), Setting(64, True, 3, 1, "cpu", "cpu"), NO_BUFFERS)
    assert both.host_bytes - found.host_bytes == pytest.approx(2 * 388_698_128_640 / 64)
    assert "policy weights" not in both.gpu


def test_nvme_takes_over_from_host_memory(large: ModelShape) -> None:
    found = memory(sft(large), Setting(64, True, 3, 1, "nvme", "nvme"), NO_BUFFERS)
    assert found.nvme_bytes * 64 == pytest.approx((16 + 2) * 388_698_128_640)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_shard_what_the_paper_says(large: ModelShape, stage: int) -> None:
    # Rajbhandari et al., section 5: stage 1 shards moments and fp32 weights, 2 also gradients, 3 also weights.
    parameters, gpus = 388_698_128_640, 64
    last = memory(sft(large), Setting(gpus, True, stage), NO_BUFFERS).phases["optimizer step"]
    assert last["policy weights"] == pytest.approx(2 * parameters / (gpus if stage == 3 else 1))
    optimizer = last["policy fp32 weights"] + last["policy optimizer moments"]
    assert optimizer == pytest.approx(12 * parameters / (gpus if stage >= 1 else 1))


def states(found: Memory) -> float:
    return sum(size for name, size in found.phases["optimizer step"].items() if name.startswith("policy "))


def test_twice_the_gpus_halve_what_is_sharded(large: ModelShape) -> None:
    one, two = (memory(sft(large), Setting(gpus, True, 3, 8), NO_BUFFERS) for gpus in (32, 64))
    assert states(one) == pytest.approx(2 * states(two))


@pytest.mark.parametrize("ep", [1, 4, 16])
def test_the_shards_of_all_ranks_are_the_whole(large: ModelShape, ep: int) -> None:
    assert states(memory(sft(large), Setting(32, True, 3, ep), NO_BUFFERS)) * 32 == pytest.approx(
        16 * large.parameters()
    )


def test_expert_parallelism_shards_experts_alone(large: ModelShape) -> None:
    found = memory(sft(large), Setting(16, True, 1, 16), NO_BUFFERS).gpu
    others = large.parameters() - large.experts
    assert found["policy weights"] == pytest.approx(2 * (others + large.experts / 16))
    assert large.experts == 64 * 16 * 3 * 6400 * 18_304


# --- activations -----------------------------------------------------------------------------------------------


def saved_bytes(values: dict, dtype: torch.dtype, *, rows: str, length: int, batch: int = 4) -> int:
    """Bytes that autograd saves in one forward pass, without weights."""
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**values)).to(dtype).model
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, values["vocab_size"], (batch, length))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, -3:] = int(rows != "padded")
    if rows in ("pairs", "short"):
        packing = Packing([length] * batch, shared=[0, 1] * (batch // 2) if rows == "pairs" else None)
        inputs = {"input_ids": ids.flatten()[None, : packing.total], "packing": packing}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs, use_cache=False)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


@pytest.mark.parametrize(
    ("rows", "length"), [("equal", 160), ("padded", 64), ("pairs", 160), ("pairs", 64), ("short", 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"moe_topk": 2}, {"use_cla": False}], ids=["top-1", "top-2", "no sharing"])
def test_activations_equal_those_that_autograd_saves(changes: dict, dtype: torch.dtype, rows: str, length: int) -> None:
    values = {**PRESETS["tiny"], "num_hidden_layers": 4, **changes}
    less = {**values, "num_hidden_layers": 2}
    difference = saved_bytes(values, dtype, rows=rows, length=length) - saved_bytes(
        less, dtype, rows=rows, length=length
    )
    shape, size = shape_of("x", values), dtype.itemsize
    run = Pass(4 * length, length, rows == "padded", size, size, looped=True, pairs=rows == "pairs", on_cpu=True)
    planned = sum(activations.layer_bytes(shape, layer, run) for layer in shape.layers[2:])
    assert planned == pytest.approx(difference, rel=0.015)  # pairs share two tokens of the row


def test_short_sequences_are_those_of_the_code_that_stores_their_weights() -> None:
    assert activations.SHORT == short_attention.LONGEST


def test_checkpointed_layers_save_inputs_keys_and_values(large: ModelShape) -> None:
    # bf16: 6400 values per layer, and 2 x 640 in the half of the layers that compute keys and values. Routing is small.
    run = Pass(2048, 2048, False, 2, 2)
    kept = sum(activations.checkpoint_bytes(large, layer, run) for layer in large.layers)
    assert kept == pytest.approx(2048 * 64 * 2 * (6400 + 640), rel=0.01)


# --- traffic ---------------------------------------------------------------------------------------------------


def test_zero_3_moves_three_times_the_weights(large: ModelShape) -> None:
    # The ZeRO paper, section 7.2.2: two all-gathers and a reduction, each of 2 bytes per parameter.
    found = traffic(sft(large, batch=64), Setting(64, True, 3))
    share, weights = 63 / 64, 2 * 388_698_128_640
    assert found[Flow("weight all-gather", "collective")] == pytest.approx(2 * weights * share)
    assert found[Flow("gradient reduction", "collective")] == pytest.approx(weights * share)


def test_expert_parallelism_moves_tokens_instead_of_experts(large: ModelShape) -> None:
    found = traffic(sft(large, batch=16), Setting(16, True, 3, 16))
    others = large.parameters() - large.experts
    assert found[Flow("weight all-gather", "collective")] == pytest.approx(2 * 2 * others * 15 / 16)
    # 6400 bf16 values per token, dispatch and combine, forward and backward, in 64 layers
    tokens = 2048 * 6400 * 2 * 64 * 4 * 15 / 16
    assert found[Flow("expert dispatch and combine", "all-to-all")] == pytest.approx(tokens)


def test_a_step_takes_six_operations_per_parameter(large: ModelShape) -> None:
    # 6 N D plus attention: 12 operations per layer, hidden dimension and earlier token (Kaplan et al., 2001.08361).
    tokens, attention = 2048, 12 * 64 * 6400 * 1024
    wanted = tokens * (6 * 51.3e9 + attention)
    assert operations(sft(large, batch=8), Setting(8, True, 3)) == pytest.approx(wanted, rel=0.01)
    recomputed = operations(sft(large, batch=8), Setting(8, True, 3, gradient_checkpointing=True))
    assert recomputed == pytest.approx(wanted * 4 / 3, rel=0.01)


@pytest.mark.parametrize(("settings", "passes"), [({"loss_type": "apo_zero_unpaired"}, 4), ({}, 6)])
def test_kto_computes_the_reference_and_mismatched_completions(settings: dict[str, str], passes: int) -> None:
    """A trained pass costs three forward passes; the reference one more, the estimate of the KL two more."""
    values = {"name": "t", "model": {"kind": "scratch", "preset": "tiny", "tokenizer": "x"}}
    kto = {"kind": "kto", "data": {"train": [{"path": "x"}], "max_length": 64}, "micro_batch_size": 8, **settings}
    (job,) = jobs_of(Recipe.model_validate({**values, "stages": {"kto": kto}}), None, None)
    one_pass = operations(replace(job, forward_passes=0), Setting(1, False, 0, micro_batch=8)) / 3
    assert operations(job, Setting(1, False, 0, micro_batch=8)) == pytest.approx(passes * one_pass)


def test_a_sleeping_engine_takes_no_memory_between_rollouts(large: ModelShape) -> None:
    """A sleeping engine drops its weights, so host memory does not hold them either."""
    rollouts = RolloutWork("vllm", completions=64, max_new_tokens=1024, max_sequences=64, cache_bytes=8e9)
    job = Job("ppo", "ppo", (Member("policy", large, "all"),), "bfloat16", 32, 4, 2048, rollouts=rollouts)
    awake, asleep = (memory(job, Setting(64, True, 3, rollout_sleep=sleep), NO_BUFFERS) for sleep in (False, True))
    freed = awake.phases["optimizer step"]["rollout weights"]
    assert freed == pytest.approx(2 * large.parameters())
    assert "rollout weights" not in asleep.phases["optimizer step"]
    assert asleep.host_bytes == awake.host_bytes == 0


def test_rollout_logprobs_as_old_logprobs_save_policy_passes(large: ModelShape) -> None:
    rollouts = RolloutWork("vllm", completions=64, max_new_tokens=1024, max_sequences=64, cache_bytes=0.0)
    members = (Member("policy", large, "all"), Member("reference", large, "nothing"))
    job = Job("ppo", "ppo", members, "bfloat16", 32, 4, 2048, rollouts=rollouts)
    reused = replace(job, rollouts=replace(rollouts, as_old_logprobs=True))
    setting = Setting(2, True, 3, micro_batch=4)
    # A GPU has eight forward passes of four completions. The policy still computes one of them.
    forward = 4 * 2048 * (2 * 51.3e9 + 4 * 64 * 6400 * 1024)
    assert operations(job, setting) - operations(reused, setting) == pytest.approx(7 * forward, rel=0.01)


def pretraining(**model: Any) -> list[Job]:
    data = {"train": [{"kind": "python_docs", "view": "text"}], "max_length": 64}
    stages = {"pretrain": {"kind": "pretrain", "data": data, "max_steps": 1}}
    return list(jobs_of(Recipe.model_validate({"name": "small", "model": model, "stages": stages}), None, None))


def test_the_vocabulary_of_a_unigram_tokenizer_is_counted(tmp_path: Path) -> None:
    """Its file has a list of tokens with scores, where that of BPE has ids by token."""
    vocabularies = {"bpe": {"a": 0, "b": 1, "c": 2}, "unigram": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}
    found = []
    for name, vocabulary in vocabularies.items():
        (tmp_path / name).mkdir()
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2}, {"id": 3}]}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        (job,) = pretraining(kind="scratch", preset="tiny", tokenizer=str(tmp_path / name))
        found.append(job.members[0].shape)
    assert found[0] == found[1]
    assert json.loads(found[0].config)["vocab_size"] == 4


def test_a_list_that_is_shorter_than_the_layers_is_refused() -> None:
    tokenizer = {"vocab_size": 300, "data": [{"kind": "python_docs", "view": "text"}]}
    with pytest.raises(UserError, match=r"config\.num_experts: it has 2 values, but the model has more layers"):
        pretraining(kind="scratch", preset="tiny", tokenizer=tokenizer, config={"num_experts": [4, 4]})
    config = HunYuanConfig(num_hidden_layers=3, num_experts=[4, 4])
    assert size_problem(config) == "num_experts has 2 values for 3 layers"


def test_a_dense_model_in_a_relative_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(sizes))
    monkeypatch.chdir(tmp_path)
    relative, absolute = (
        pretraining(kind="hot_start", source=source, experts=2)[0].members[0].shape
        for source in ("dense", str(tmp_path / "dense"))
    )
    assert len(relative.layers) == 2
    assert relative.layers == absolute.layers
