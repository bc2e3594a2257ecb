"""An engine records the routing that the transformers model computes for the same tokens."""

from __future__ import annotations

import numpy
import pytest
import torch

from align.config.rollout import Rollout
from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
from align.models.weights import published_weights
from align.rollout.base import Completion, SamplingSettings
from align.rollout.routing import checked_routing

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.rollout.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOP_K, EXPERTS = [1, 1, 2, 3], [1, 4, 8, 4]
PROMPTS = [[5, 6, 7, 8], [9], [1] * 30, list(range(100, 190)), list(range(100, 190))]


def policy(**changes) -> HunYuanForCausalLM:
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "moe_topk": TOP_K,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return HunYuanForCausalLM(HunYuanConfig(**(sizes | changes))).eval()


@torch.no_grad()
def router_probabilities(model: HunYuanForCausalLM, ids: list[int]) -> dict[int, torch.Tensor]:
    """Router probabilities [T, E] by layer with routed experts, from a forward pass of the whole sequence."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, output, i=i: found.__setitem__(i, output.logits_TE.softmax(-1))
        )
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def assert_routing(model: HunYuanForCausalLM, completion: Completion) -> None:
    ids = completion.prompt_ids + completion.token_ids
    routing = completion.routed_experts
    assert routing.dtype == numpy.int16
    assert routing.shape == (4, len(ids) - 1, 3)
    probabilities = router_probabilities(model, ids[:-1])
    for layer, k in enumerate(TOP_K):
        if layer == 0:
            assert (routing[layer] == -1).all()
            continue
        assert (routing[layer, :, k:] == -1).all()
        chosen = torch.from_numpy(routing[layer, :, :k].astype("int64"))
        best = probabilities[layer].topk(k).values
        # Up to ties: the chosen experts have the k highest probabilities, in order.
        torch.testing.assert_close(probabilities[layer].gather(1, chosen), best, rtol=1e-3, atol=1e-5)
        assert all(len(set(row)) == k for row in chosen.tolist())


@pytest.fixture(scope="module")
def model() -> HunYuanForCausalLM:
    return policy()


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    model.save_pretrained(folder)
    rollout = Rollout(max_model_length=128, cache_gib=0.05, max_sequences=3, return_routing=True)
    engine = VllmEngine(folder, rollout, dtype="float32", seed=0)
    yield engine
    engine.close()


def test_recorded_routing_equals_the_models(engine, model):
    """At most three sequences run at a time, so requests wait, join late and leave early. Two prompts are equal."""
    rows = engine.generate(PROMPTS, SamplingSettings(24, seed=1, n=2))
    stops = {row[0].token_ids[4 * i] for i, row in enumerate(rows)}
    rows += engine.generate(PROMPTS, SamplingSettings(24, seed=1, n=2, stop_token_ids=tuple(stops)))
    rows += engine.generate(PROMPTS, SamplingSettings(8, temperature=0.0))
    assert len({len(c.token_ids) for row in rows for c in row}) > 3
    for completion in (c for row in rows for c in row):
        assert_routing(model, completion)
    assert engine.last_generation.cached_tokens == 0


def test_routing_follows_an_update(engine, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = engine.generate(PROMPTS, SamplingSettings(4, seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine.update_weights(published_weights(model), 1)
    second = engine.generate(PROMPTS, SamplingSettings(4, seed=1))
    for (completion,) in second:
        assert_routing(model, completion)
    assert any((a.routed_experts[:, :-4] != b.routed_experts[:, :-4]).any() for (a,), (b,) in zip(first, second))
    model.load_state_dict(before, strict=False)  # named_parameters omits the tied head
    engine.update_weights(published_weights(model), 0)


def test_preempted_requests_keep_their_routing_and_their_tokens(engine, tmp_path):
    """The KV cache is too small for all sequences, so vLLM pre-empts some and recomputes them later."""
    model = policy()
    model.save_pretrained(tmp_path)
    prompts, settings = PROMPTS[2:4] * 4, SamplingSettings(36, seed=1)
    expected = engine.generate(prompts, settings)
    rollout = Rollout(max_model_length=128, cache_gib=0.0005, max_sequences=8, return_routing=True)
    small = VllmEngine(tmp_path, rollout, dtype="float32", seed=0)
    try:
        blocks, size = small.cache_blocks()
        assert 128 <= blocks * size < 8 * 66
        scheduler = small._llm.llm_engine.engine_core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **named: preempted.append(a) or preempt(*a, **named)
        rows = small.generate(prompts, settings)
        assert preempted
        for completion in (c for row in rows for c in row):
            assert_routing(model, completion)
        assert [c.token_ids for (c,) in rows] == [c.token_ids for (c,) in expected]
    finally:
        small.close()


def test_routing_from_vllm_is_converted():
    returned = numpy.zeros((5, 3, 2), dtype=numpy.uint8)
    returned[:, 1] = [[3, 1], [2, 0], [0, 7], [1, 2], [4, 5]]
    returned[:, 2, 0] = [1, 0, 2, 3, 1]
    routing = checked_routing(returned, [0, 2, 1])
    assert routing.dtype == numpy.int16
    assert (routing[0] == -1).all()
    assert routing[1].tolist() == [[3, 1], [2, 0], [0, 7], [1, 2], [4, 5]]
    assert routing[2].tolist() == [[1, -1], [0, -1], [2, -1], [3, -1], [1, -1]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_rows_that_vllm_never_wrote_are_an_error(top_k):
    rng = numpy.random.default_rng(0)
    returned = rng.permuted(numpy.tile(numpy.arange(8, dtype=numpy.uint8), (20, 4, 1)), axis=2)[..., :top_k]
    checked_routing(returned, [top_k] * 4)
    returned[6 : 18 if top_k == 1 else 7] = 0
    with pytest.raises(RuntimeError, match="all zero"):
        checked_routing(returned, [top_k] * 4)
    with pytest.raises(RuntimeError, match="no routed experts"):
        checked_routing(None, [top_k] * 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM returns routed experts on a GPU only")
@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_from_vllm_equals_the_models(top_k, tmp_path):
    model = policy(num_experts=8, moe_topk=top_k)
    model.save_pretrained(tmp_path)
    rollout = Rollout(max_model_length=128, cache_gib=0.5, max_sequences=3, return_routing=True)
    engine = VllmEngine(tmp_path, rollout, dtype="float32", seed=0)
    try:
        for row in engine.generate(PROMPTS, SamplingSettings(24, seed=1, n=2)):
            for completion in row:
                ids = completion.prompt_ids + completion.token_ids
                found = router_probabilities(model, ids[:-1])
                for layer, probabilities in found.items():
                    chosen = torch.from_numpy(completion.routed_experts[layer].astype("int64"))
                    best = probabilities.topk(top_k).values
                    torch.testing.assert_close(probabilities.gather(1, chosen), best, rtol=1e-2, atol=1e-3)
    finally:
        engine.close()
