"""Weight updates of vLLM's own model classes: complete, verified, and independent of the sender's memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
from align.rollout.sync.reload import vocabulary_padding
from align.rollout.sync.send import InProcess
from align.rollout.sync.stream import digest
from align.rollout.vllm_engine import VllmEngine
from tests.families.engine import ROLLOUT, difference, sample
from tests.tiny_families import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 1e-4
PARTS = ["embed_tokens", "layers.1.self_attn.v_proj", "layers.2.mlp.gate_proj", "layers.0.input_layernorm"]


@pytest.fixture(scope="module")
def models():
    """Models with a tied head and a vocabulary that vLLM pads to a multiple of 64."""
    return [tiny_model("llama", seed, tie_word_embeddings=True, vocab_size=600) for seed in (0, 10)]


@pytest.fixture(scope="module")
def running(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    models[0].save_pretrained(folder)
    engine = VllmEngine(folder, ROLLOUT, dtype="float32", seed=0)
    yield engine
    engine.close()


@pytest.fixture
def engine(running, models):
    """The engine with the weights of the first model."""
    running.update_weights(published(models[0]), 0)
    return running


def published(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight")


def test_an_update_reaches_the_tied_head(engine, models):
    assert difference(models[0], sample(engine)) < TOLERANCE
    engine.update_weights(published(models[1]), 1)
    assert difference(models[1], sample(engine)) < TOLERANCE


@pytest.mark.parametrize("part", PARTS)
def test_a_layer_that_got_too_few_weights_is_an_error(engine, models, part):
    with pytest.raises(ValueError, match=r"layers of vLLM's LlamaForCausalLM got too few weights") as caught:
        engine.update_weights(((n, t) for n, t in published(models[1]) if part not in n), 1)
    merged = part.replace("v_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
    assert f"{merged} (weight)" in str(caught.value)
    with pytest.raises(RuntimeError, match="no complete weights"):
        sample(engine)


def test_an_interrupted_update_leaves_nothing_to_the_next_one(engine, models):
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in published(models[1]):
            if "layers.1.self_attn.v_proj" in name:
                raise KeyboardInterrupt
            yield name, tensor

    engine.rollout = engine.rollout.model_copy(update={"bucket_mib": 1})
    with pytest.raises(KeyboardInterrupt):
        send_one_by_one(engine, interrupted())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj \(weight\)"):
        engine.update_weights(((n, t) for n, t in published(models[1]) if "layers.1.self_attn.q_proj" not in n), 1)
    engine.update_weights(published(models[0]), 2)
    assert difference(models[0], sample(engine)) < TOLERANCE


def test_the_sender_may_reuse_its_memory_after_each_bucket(engine, models):
    buffer = torch.empty(max(tensor.numel() for _, tensor in published(models[1])))
    reused = ((name, buffer[: t.numel()].view(t.shape).copy_(t)) for name, t in published(models[1]))
    send_one_by_one(engine, reused)
    assert difference(models[1], sample(engine)) < TOLERANCE


def test_weights_that_were_altered_on_the_way_are_an_error(engine, models, monkeypatch):
    monkeypatch.setattr("align.rollout.sync.send.digest", lambda tensor: digest(tensor + 1))
    with pytest.raises(ValueError, match="weights differ from those that were sent"):
        engine.update_weights(published(models[1]), 1)


def test_rows_that_pad_the_vocabulary_are_not_expected(engine):
    model = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    assert model.lm_head.weight.shape == (640, 64)
    assert vocabulary_padding(model.lm_head) == 40 * 64
    assert vocabulary_padding(model.model.norm) == 0


def send_one_by_one(engine: VllmEngine, weights: Iterator[tuple[str, Tensor]]) -> None:
    """An update with one weight per bucket."""
    transport = InProcess(engine._llm)
    transport.start()
    digests = {}
    for name, tensor in weights:
        digests[name] = digest(tensor)
        transport.send([(name, tensor)])
    transport.finish(digests, 1)
