"""Checkpoints that are refused by name, against the configurations of transformers' own models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from align.config.stage import LANGUAGE_MODEL, REWARD_MODEL
from align.run.refusals import ENCODERS, config_problem, is_scorer, path_problem, role_problem
from tests.tiny_families import FAMILIES, tiny_config


def test_the_encoders_are_types_of_transformers():
    assert set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) >= ENCODERS
    assert not ENCODERS & set(FAMILIES)
    assert "is an encoder, which" in str(config_problem({"model_type": "fnet", "architectures": ["FNetForMaskedLM"]}))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "xlm-roberta", "deberta-v2"])
def test_encoders(kind):
    assert "is an encoder, which" in str(config_problem(CONFIG_MAPPING[kind]().to_dict()))


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma", "whisper"])
def test_encoder_decoders(kind):
    assert "is an encoder-decoder" in str(config_problem(CONFIG_MAPPING[kind]().to_dict()))


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("gemma3", "gemma3_text"),
        ("qwen2_5_vl", "qwen2_5_vl_text"),
        ("qwen3_vl", "qwen3_vl_text"),
        ("llama4", "llama4_text"),
        ("mistral3", "mistral"),
        ("llava", "llama"),
        ("qwen2_audio", "qwen2"),
    ],
)
def test_multimodal_models_are_named_with_their_language_model(kind, inner):
    said = str(config_problem(CONFIG_MAPPING[kind]().to_dict()))
    assert said.startswith(f"'{kind}' is a multimodal model")
    assert f"(model_type '{inner}')" in said


@pytest.mark.parametrize("kind", FAMILIES)
def test_language_models_are_not_refused(kind):
    config = tiny_config(kind).to_dict()
    assert config_problem(config) is None
    assert config_problem({**config, "auto_map": {"AutoModelForCausalLM": "x.Y"}}, known=[kind]) is None
    assert "does not know" in str(config_problem(config, known=[]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(bitsandbytes, 8 bits)"),
        ({"quant_method": "gptq", "bits": 4}, "(gptq, 4 bits)"),
        ({"quant_method": "mxfp4"}, "(mxfp4)"),
    ],
)
def test_quantized_weights_are_refused_for_a_known_type_too(settings, said):
    assert said in str(config_problem({"model_type": "llama", "quantization_config": settings}, known=["llama"]))


def test_remote_code_is_refused_only_for_unknown_types():
    config = {"model_type": "new", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "modeling_new.New"}}
    assert "auto_map: modeling_new.New" in str(config_problem(config, known=["llama"]))
    assert config_problem(config, known=["new"]) is None


def test_roles():
    scorer, policy = ({"architectures": [f"Qwen3For{head}"]} for head in ("SequenceClassification", "CausalLM"))
    assert (is_scorer(scorer), is_scorer(policy), is_scorer({})) == (True, False, False)
    assert "it is a reward model" in str(role_problem(scorer, (LANGUAGE_MODEL,)))
    assert "it is a language model" in str(role_problem(policy, (REWARD_MODEL,)))
    for config in (scorer, policy):
        assert role_problem(config, (LANGUAGE_MODEL, REWARD_MODEL)) is None
    assert role_problem({"model_type": "qwen3"}, (REWARD_MODEL,)) is None  # its class is checked when it is loaded


def test_paths(tmp_path: Path):
    assert path_problem(tmp_path) is None
    assert path_problem(tmp_path / "missing") is None
    (tmp_path / "adapter_config.json").write_text("[1]")
    assert "Write the base's folder as base_model_name_or_path" in str(path_problem(tmp_path))
    (tmp_path / "a.gguf").write_text("")
    for path in (tmp_path, tmp_path / "a.gguf"):
        assert str(path_problem(path)).startswith("GGUF")
