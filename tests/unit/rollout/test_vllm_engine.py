"""vLLM samples from the trainer's policy, compared with the forward pass of the transformers model."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

import align.models  # noqa: F401
from align.config.lora import Lora
from align.config.rollout import Rollout
from align.data.tokenizer import train_tokenizer
from align.errors import UserError
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weights import published_weights
from align.rollout.base import Completion, SamplingSettings
from align.rollout.sync.stream import combined_digest, digest
from align.train.checkpoint import load_policy, save_model

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.rollout.vllm_engine import VllmEngine
from tests.integration.forked import VLLM, script

pytestmark = [pytest.mark.engine, pytest.mark.slow]
GOLDEN = Path(__file__).parents[2] / "golden" / "data"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [1] * 30, list(range(100, 157))]
ROLLOUT = Rollout(max_model_length=128, cache_gib=0.05, max_sequences=8, bucket_mib=1)
LONG = [list(range(100 + i, 196 + i)) for i in range(0, 24, 8)]
TOLERANCE = 1e-4


def tiny(**changes) -> HunYuanForCausalLM:
    """A random model whose norms have an effect, and whose next token is neither certain nor uniform."""
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    model = HunYuanForCausalLM(HunYuanConfig(**(sizes | changes))).eval()
    perturb(model, 0.0)
    return model


@torch.no_grad()
def perturb(model: torch.nn.Module, size: float = 0.03) -> None:
    """Add noise with standard deviation `size` (default: more than an optimizer step); redraw the norm weights."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.add_(torch.randn_like(parameter) * size)


@torch.no_grad()
def error(model: torch.nn.Module, rows: list[list[Completion]], temperature: float) -> float:
    """Largest difference between the engine's log-probabilities and the model's log_softmax(logits / T)."""
    worst = 0.0
    for completion in (c for row in rows for c in row):
        start = len(completion.prompt_ids)
        logits = model(torch.tensor([completion.prompt_ids + completion.token_ids])).logits[0, start - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
        worst = max(worst, (expected[:, 0] - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def start(model: HunYuanForCausalLM, folder: Path, rollout: Rollout = ROLLOUT) -> VllmEngine:
    model.save_pretrained(folder)
    return VllmEngine(folder, rollout, dtype="float32", seed=0)


@pytest.fixture(scope="module")
def model() -> HunYuanForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    engine = start(model, tmp_path_factory.mktemp("tiny"))
    yield engine
    engine.close()


def test_greedy_tokens_equal_the_models(engine, model):
    rows = engine.generate(PROMPTS, SamplingSettings(24, temperature=0.0))
    for prompt, (completion,) in zip(PROMPTS, rows):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        assert not completion.finished
    assert error(model, rows, 1.0) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_of_the_sampled_distribution(engine, model, temperature):
    rows = engine.generate(PROMPTS, SamplingSettings(24, temperature=temperature, seed=1, n=3))
    assert [len(row) for row in rows] == [3] * len(PROMPTS)
    assert error(model, rows, temperature) < TOLERANCE
    assert error(model, rows, temperature * 1.01) > 10 * TOLERANCE


def test_a_checkpoint_beside_its_base_is_sampled_as_the_model_with_its_adapter(tmp_path):
    """An adapter on all groups and on the router, which vLLM can load only merged."""
    tiny().save_pretrained(tmp_path / "base" / "model")
    wrapped = load_policy(tmp_path / "base" / "model", "float32", lora=Lora(rank=8, train_router=True)).eval()
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(wrapped, train_tokenizer(["one two"], 300), tmp_path / "sft", "float32", save="adapter")
    engine = VllmEngine(tmp_path / "sft" / "model", ROLLOUT, dtype="float32", seed=0)
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["model"]
    try:
        rows = engine.generate(PROMPTS, SamplingSettings(24, temperature=1.0, seed=1))
    finally:
        engine.close()
    assert error(wrapped, rows, 1.0) < TOLERANCE
    with wrapped.disable_adapter():
        assert error(wrapped, rows, 1.0) > 0.01


def test_samples_follow_the_distribution(engine, model):
    """Frequencies of the first token in 2,000 samples differ from the model's probabilities by sampling noise only."""
    count = 2000
    (row,) = engine.generate(PROMPTS[:1], SamplingSettings(1, temperature=0.7, seed=5, n=count))
    sampled = torch.bincount(torch.tensor([c.token_ids[0] for c in row]), minlength=384) / count
    with torch.no_grad():
        expected = (model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    noise = (expected * (1 - expected) / count).sqrt().sum() * (2 / torch.pi) ** 0.5 / 2
    assert (sampled - expected).abs().sum() / 2 < 1.3 * noise


def test_same_seed_same_completions(engine):
    settings = SamplingSettings(16, seed=7, n=2)
    rows = engine.generate(PROMPTS, settings)
    assert engine.generate(PROMPTS, settings) == rows
    assert engine.generate(PROMPTS, SamplingSettings(16, seed=8, n=2)) != rows
    assert len({tuple(c.token_ids) for row in rows for c in row}) == 2 * len(PROMPTS)


def test_stop_token_is_part_of_the_completion(engine):
    free = engine.generate(PROMPTS[:1], SamplingSettings(16, seed=7))[0][0]
    stop = free.token_ids[5]
    stopped = engine.generate(PROMPTS[:1], SamplingSettings(16, seed=7, stop_token_ids=(stop,)))[0][0]
    assert stopped.finished
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert len(stopped.logprobs) == len(stopped.token_ids)


def test_a_first_token_that_stops_is_the_whole_completion(engine, model):
    """The stop token is part of the completion and has a log-probability, so no completion is empty."""
    greedy = engine.generate(PROMPTS[:1], SamplingSettings(8, temperature=0.0))[0][0]
    stop = greedy.token_ids[0]
    rows = engine.generate(PROMPTS[:1], SamplingSettings(8, temperature=0.0, stop_token_ids=(stop,)))
    assert rows[0][0].token_ids == [stop]
    assert rows[0][0].finished
    assert error(model, rows, 1.0) < TOLERANCE


def test_truncated_completions(engine):
    rows = engine.generate(PROMPTS, SamplingSettings(5, seed=3, n=2))
    assert all(len(c.token_ids) == 5 and not c.finished for row in rows for c in row)
    assert all(c.routed_experts is None for row in rows for c in row)  # the rollout does not set `return_routing`


def test_more_prompt_tokens_than_a_batch_holds(model, tmp_path):
    """Chunked prefill would split some of these prompts, which fails on a CPU for requests with seeds."""
    engine = start(model, tmp_path, Rollout(max_model_length=512, cache_gib=0.1, max_sequences=64))
    try:
        rows = engine.generate([[i] * 100 for i in range(64)], SamplingSettings(4, seed=3))
        assert error(model, rows[::7], 1.0) < TOLERANCE
    finally:
        engine.close()


def test_closing_one_engine_does_not_affect_another(engine, model):
    """The previous test closed a second engine. vLLM's own shutdown would also destroy this engine's process groups."""
    engine.update_weights(published_weights(model), 0)
    assert error(model, engine.generate(PROMPTS, SamplingSettings(4, seed=3)), 1.0) < TOLERANCE


def test_the_trainers_process_group_outlives_the_engine(tmp_path):
    """A process group that exists before the engine, as under torchrun, still works after the engine is closed."""
    file = Path(__file__).parent / "engine_beside_group.py"
    process = script(file, [str(tmp_path)], os.environ, libraries=VLLM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert output.splitlines()[-1] == "3.0 3.0"


def test_a_shared_prompt_is_computed_once(engine, model):
    """Three of the four completions of a 96-token prompt read its full blocks from the prefix cache."""
    settings = SamplingSettings(8, seed=3, n=4)
    engine.update_weights(published_weights(model), 0)
    rows = engine.generate(LONG, settings)
    report = engine.last_generation
    assert report.completions == 12
    assert report.prompt_tokens == 12 * 96
    assert report.completion_tokens == 12 * 8
    block = engine.cache_blocks()[1]
    assert report.cached_tokens >= 9 * (95 // block * block) > 0
    assert error(model, rows, 1.0) < TOLERANCE
    assert report.metrics()["speed/rollout"] > 0


def test_a_prefix_cached_under_old_weights_does_not_outlive_them(engine, model):
    settings = SamplingSettings(8, seed=3)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.generate(LONG, settings)
    engine.generate(LONG, settings)
    assert engine.last_generation.cached_tokens > 0
    perturb(model)
    try:
        engine.update_weights(published_weights(model), 1)
        rows = engine.generate(LONG, settings)
        assert engine.last_generation.cached_tokens == 0
        assert error(model, rows, 1.0) < TOLERANCE
    finally:
        model.load_state_dict(old, strict=False)  # named_parameters omits the tied head
        engine.update_weights(published_weights(model), 0)


def test_the_engine_does_not_change_the_trainers_torch_state(engine, model):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    before, threads, set_threads = state(), torch.get_num_threads(), torch.set_num_threads
    engine.generate(PROMPTS, SamplingSettings(4, seed=1))
    engine.update_weights(published_weights(model), version=0)
    assert state() == before
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_threads
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_errors_of_bad_requests_name_the_fix(engine):
    with pytest.raises(UserError, match=r"prompt 1: its 120 tokens .*max_model_length 128"):
        engine.generate([[1], [1] * 120], SamplingSettings(16))
    with pytest.raises(UserError, match="empty"):
        engine.generate([[]], SamplingSettings(16))
    with pytest.raises(UserError, match=r"temperature 0\.001"):
        engine.generate([[1]], SamplingSettings(16, temperature=0.001))


def test_updated_weights_are_the_ones_that_sample(engine, model):
    settings = SamplingSettings(24, seed=2)
    old = tiny()
    try:
        for version in (1, 2):
            perturb(model)
            report = engine.update_weights(published_weights(model), version)
            assert report.version == version
            assert report.bytes == sum(p.numel() * 4 for p in model.parameters())
            assert report.buckets == -(-report.bytes // 2**20)
            assert report.checksum == combined_digest({n: digest(t) for n, t in published_weights(model)})
            rows = engine.generate(PROMPTS, settings)
            assert {c.weight_version for row in rows for c in row} == {version}
            assert error(model, rows, 1.0) < TOLERANCE
            assert error(old, rows, 1.0) > 100 * TOLERANCE
    finally:
        model.load_state_dict(old.state_dict())
        engine.update_weights(published_weights(model), 0)


def test_every_weight_matters_after_an_update(engine, model):
    """Each parameter is changed separately and must change the log-probabilities: vLLM uses no stale copies."""
    settings = SamplingSettings(4, seed=2)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        engine.update_weights(published_weights(model), 1)
        rows = engine.generate(PROMPTS, settings)
        assert error(model, rows, 1.0) < TOLERANCE, name
        with torch.no_grad():
            parameter.copy_(old[name])
        assert error(model, rows, 1.0) > TOLERANCE, name
    engine.update_weights(published_weights(model), 0)


def test_incomplete_or_foreign_weights_are_refused(engine, model):
    weights = list(published_weights(model))
    expert = next(name for name, _ in weights if ".experts.3.up_proj" in name)
    with pytest.raises(ValueError, match="15 of its 16"):
        engine.update_weights(((n, t) for n, t in weights if n != expert), 1)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.k_proj\.weight' is not part"):
        engine.update_weights(iter([*weights, ("model.layers.1.self_attn.k_proj.weight", weights[0][1])]), 1)
    engine.update_weights(iter(weights), 0)


def test_an_interrupted_update_must_be_repeated(engine, model):
    def breaking():
        for i, pair in enumerate(published_weights(model)):
            if i == 5:
                raise OSError("the trainer failed")
            yield pair

    with pytest.raises(OSError, match="the trainer failed"):
        engine.update_weights(breaking(), 1)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(PROMPTS, SamplingSettings(4))
    engine.update_weights(published_weights(model), 0)
    assert error(model, engine.generate(PROMPTS, SamplingSettings(4)), 1.0) < TOLERANCE


@pytest.mark.parametrize("part", ["embed_tokens", "0.self_attn.k_proj", "experts.3.up_proj", "shared_mlp.gate_proj"])
def test_weights_that_differ_after_loading_are_an_error(engine, model, part, monkeypatch):
    """One value of a tensor is altered while the engine loads it."""
    load = type(engine_model(engine)).load_weights

    def wrong(self, weights):
        return load(
            self, [(n, t + (torch.arange(t.numel()) == 7).view(t.shape) if part in n else t) for n, t in weights]
        )

    monkeypatch.setattr(type(engine_model(engine)), "load_weights", wrong)
    with pytest.raises(ValueError, match=rf"weights differ from those that were sent.*{part}"):
        engine.update_weights(published_weights(model), 1)
    monkeypatch.undo()
    engine.update_weights(published_weights(model), 0)


def engine_model(engine):
    return engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def test_sleep_and_wake_change_nothing_on_a_cpu(engine, model):
    if torch.cuda.is_available():
        pytest.skip("tests the CPU's behaviour")
    engine.sleep()
    engine.wake()
    assert error(model, engine.generate(PROMPTS, SamplingSettings(4)), 1.0) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sleeping moves GPU memory; there is no GPU")
def test_a_sleeping_engine_frees_its_gpu_memory(model, tmp_path):
    engine = start(model, tmp_path, Rollout(max_model_length=128, cache_gib=1.0, max_sequences=8, sleep=True))
    try:
        before = engine.generate(PROMPTS, SamplingSettings(8, seed=1))
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - awake > 0.9 * 2**30
        engine.wake()
        engine.update_weights(published_weights(model), 0)
        assert engine.generate(PROMPTS, SamplingSettings(8, seed=1)) == before
    finally:
        engine.close()


def test_stray_weights_in_the_folder_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        VllmEngine(tmp_path, ROLLOUT, dtype="float32", seed=0)


VARIANTS = {
    "alpha rope, top-2, untied head": {
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        "moe_topk": 2,
        "tie_word_embeddings": False,
    },
    "dense": {"num_experts": 1, "use_cla": False, "use_qk_norm": False},
    "three layers per cache, no shared expert, odd vocabulary, biases": {
        "cla_share_factor": 3,
        "use_mixed_mlp_moe": False,
        "vocab_size": 331,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_head_dim": 32,
    },
    "per-layer experts, two shared": {
        "num_experts": [1, 4, 8, 4],
        "moe_topk": [1, 1, 2, 3],
        "num_shared_expert": 2,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_agree_before_and_after_an_update(changes, tmp_path):
    model = tiny(**changes)
    engine = start(model, tmp_path)
    try:
        rows = engine.generate(PROMPTS, SamplingSettings(16, temperature=0.8, seed=3))
        assert error(model, rows, 0.8) < TOLERANCE
        perturb(model)
        assert error(model, rows, 0.8) > 10 * TOLERANCE
        engine.update_weights(published_weights(model), 1)
        rows = engine.generate(PROMPTS, SamplingSettings(16, temperature=0.8, seed=3))
        assert error(model, rows, 0.8) < TOLERANCE
    finally:
        engine.close()


def test_sharing_multiplies_the_cache(engine, model, tmp_path):
    assert model.config.use_cla
    shared = {model.config.cla_share_factor: engine.cache_blocks()[0]}
    for factor, config in {1: {"use_cla": False}, 4: {"cla_share_factor": 4}}.items():
        other = start(tiny(**config), tmp_path / str(factor))
        shared[factor], _ = other.cache_blocks()
        other.close()
    assert shared.keys() == {1, 2, 4}
    for factor in (2, 4):
        assert abs(shared[factor] - factor * shared[1]) < factor


@pytest.mark.parametrize("name", ["top1-cla2-tied", "top2-cla2-untied"])
def test_golden_models(name, tmp_path):
    """Greedy continuations computed by the reference implementation."""
    folder = GOLDEN / name
    from safetensors.torch import load_file

    golden = load_file(folder / "golden.safetensors")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path)
    engine = VllmEngine(tmp_path, ROLLOUT, dtype="float32", seed=0)
    try:
        for ids, mask, greedy in zip(golden["input_ids"], golden["attention_mask"], golden["greedy_ids"]):
            prompt = ids[: int(mask.sum()) // 2].tolist()
            expected = greedy[greedy >= 0].tolist()[len(prompt) :]
            ((completion,),) = engine.generate([prompt], SamplingSettings(len(expected), temperature=0.0))
            assert completion.token_ids == expected
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert error(model, engine.generate(PROMPTS, SamplingSettings(24, seed=1)), 1.0) < TOLERANCE
    finally:
        engine.close()
