"""`align import-recipe`: the settings of LLaMA-Factory and axolotl files by hand arithmetic; no key is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import cli
from align.config import load_recipe
from align.config.recipe import Recipe

FACTORY = {
    "model_name_or_path": "owner/model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 12,
    "lora_target": "q_proj, v_proj",
    "dataset": "questions,chats",
    "template": "llama3",
    "cutoff_len": 900,
    "output_dir": "saves/x",
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "learning_rate": "2e-4",
    "num_train_epochs": 2.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "bf16": True,
    "resume_from_checkpoint": None,
    "unheard_of": 7,
    "neat_packing": False,
}
INFO = {
    "questions": {"file_name": "rows.json", "columns": {"prompt": "question", "response": "answer", "system": "role"}},
    "chats": {
        "hf_hub_url": "owner/chats",
        "subset": "en",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "tools": "tools"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "patient", "assistant_tag": "assistant"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"},
    },
}
AXOLOTL: dict[str, Any] = {
    "base_model": "owner/model",
    "datasets": [{"path": "chats.jsonl", "type": "chat_template", "field_messages": "talk", "shards": 4}],
    "chat_template": "chatml",
    "sequence_len": 2048,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": 400,
    "num_epochs": 3,
    "warmup_steps": 20,
    "learning_rate": 1e-5,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "val_set_size": 0.02,
    "bf16": "auto",
    "flash_attention": True,
    "load_in_8bit": False,
    "cosine_min_lr_ratio": 0.1,
    "gradient_checkpointing": True,
}


class Imports:
    """Imports a configuration; `said` is the JSON of the command."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys, self.said = folder, capsys, dict[str, Any]()

    def __call__(self, values: dict[str, Any], *flags: str) -> Recipe:
        (self.folder / "tuning.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        (self.folder / "out.yaml").unlink(missing_ok=True)
        cli.main(["import-recipe", "tuning.yaml", "-o", "out.yaml", "--json", *flags])
        self.said = json.loads(self.capsys.readouterr().out)
        sorted_keys = [key for name in ("mapped", "ignored", "not_mapped") for key in self.said[name]]
        assert len(sorted_keys) == len(set(sorted_keys))
        given = {key for key, value in values.items() if value is not None}
        assert {key for key in sorted_keys if "." not in key} == given  # no key is lost
        comments = [line for line in (self.folder / "out.yaml").read_text().splitlines() if line.startswith("#")]
        for key in (*self.said["not_mapped"], *self.said["differs"]):
            assert any(line.startswith(f"#   {key}") for line in comments)
        cli.main(["check", "out.yaml", "--without-files", "--quiet"])
        return load_recipe("out.yaml")

    def refusal(self, values: dict[str, Any], *flags: str) -> str:
        (self.folder / "tuning.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        with pytest.raises(SystemExit) as ended:
            cli.main(["import-recipe", "tuning.yaml", "-o", "out.yaml", *flags])
        assert ended.value.code == 2
        assert not (self.folder / "out.yaml").exists()
        return self.capsys.readouterr().err


@pytest.fixture
def imports(tmp_path: Path, monkeypatch, capsys) -> Imports:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return Imports(tmp_path, capsys)


def test_sft_of_llama_factory(imports: Imports) -> None:
    recipe = imports(FACTORY, "--devices", "2")
    stage = recipe.stages["sft"]
    assert (stage.batch_size, stage.micro_batch_size) == (3 * 5 * 2, 3)
    assert (recipe.parallel.processes, recipe.dtype, recipe.seed) == (2, "bfloat16", 42)
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.targets) == (12, 24, ["q_proj", "v_proj"])
    optimizer = stage.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_fraction) == (2e-4, "linear", 0.1)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.max_grad_norm) == ((0.9, 0.999), 0, 1)
    assert (stage.epochs, stage.data.max_length, stage.assistant_only_loss) == (2, 900, True)
    assert stage.gradient_checkpointing  # on by default there
    questions, chats = stage.data.train
    assert (questions.path, questions.ignore) == ("data/rows.json", ["system", "history", "tools"])
    assert questions.columns == {"instruction": "question", "output": "answer", "system": "role"}
    assert (chats.id, chats.name, chats.columns, chats.roles) == (
        "owner/chats",
        "en",
        {"messages": "talk"},
        {"patient": "user"},
    )
    assert set(imports.said["not_mapped"]) == {"template", "unheard_of"}
    assert "lora_alpha" in imports.said["defaults"]


def test_defaults_of_llama_factory_are_written(imports: Imports) -> None:
    """A file with the required keys only; the defaults are those of its arguments and of transformers."""
    recipe = imports({"model_name_or_path": "owner/model", "dataset": "questions"})
    stage = recipe.stages["sft"]
    assert (stage.batch_size, stage.epochs, stage.data.max_length, stage.lora.rank) == (8, 3, 2048, 8)
    assert (stage.optimizer.learning_rate, stage.optimizer.schedule) == (5e-5, "linear")
    assert (stage.optimizer.warmup_fraction, stage.lora.targets) == (0, ["all-linear"])


def test_dpo_of_llama_factory(imports: Imports) -> None:
    values = FACTORY | {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.3, "pref_loss": "simpo", "pref_ftx": 0.5}
    values |= {"lora_target": "all", "lora_dropout": 0.1, "max_samples": 100, "fp16": True, "bf16": None}
    recipe = imports(values)
    stage = recipe.stages["dpo"]
    assert (stage.beta, stage.loss_type, stage.simpo_gamma, stage.sft_coef) == (0.3, "simpo", 0.5, 0.5)
    assert stage.data.train[0].columns == {"chosen": "good", "rejected": "bad"}
    assert stage.data.train[0].limit == 100
    assert (stage.lora.dropout, stage.lora.experts, stage.lora.attention) == (0.1, False, True)
    assert (recipe.dtype, recipe.parallel) == ("float32", None)
    assert {"max_samples", "pref_ftx", "cutoff_len", "lora_target"} <= set(imports.said["differs"])
    assert "fp16" in imports.said["not_mapped"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"train_on_prompt": True}, {"assistant_only_loss": False}),
        ({"finetuning_type": "full"}, {"lora": None}),
        ({"max_steps": 50, "warmup_steps": 5, "warmup_ratio": None}, {"max_steps": 50, "warmup": 0.1}),
        ({"lr_scheduler_type": "constant"}, {"schedule": "constant", "warmup": 0}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"schedule": "constant", "warmup": 0.1}),
        ({"group_by_length": True}, {"group_by_length": True}),
        ({"loraplus_lr_ratio": 16.0}, {"scale": 16}),
        ({"val_size": 0.1}, {"held_out": 0.1}),
        ({"dataset": "questions", "packing": True}, {"batch_size": 40}),
    ],
)
def test_single_keys(changes: dict[str, Any], settings: dict[str, Any], imports: Imports) -> None:
    stage = imports(FACTORY | changes, *(["--batch-size", "40"] if "packing" in changes else [])).stages["sft"]
    found = {
        "warmup": stage.optimizer.warmup_fraction,
        "schedule": stage.optimizer.schedule,
        "scale": stage.optimizer.lora_b_learning_rate_scale,
        "held_out": stage.data.held_out_fraction,
    }
    found |= {name: getattr(stage, name) for name in settings if name not in found}
    assert {name: found[name] for name in settings} == settings


def test_mixtures_of_llama_factory(imports: Imports) -> None:
    data = imports(FACTORY | {"mix_strategy": "interleave_over", "interleave_probs": "0.3,0.7"}).stages["sft"].data
    assert ([source.weight for source in data.train], data.mixture.stop) == ([0.3, 0.7], "all_exhausted")


def test_sft_of_axolotl(imports: Imports) -> None:
    recipe = imports(AXOLOTL, "--batch-size", "60")
    stage = recipe.stages["sft"]
    assert (stage.batch_size, stage.micro_batch_size, stage.max_steps, stage.lora) == (60, 2, 400, None)
    assert (stage.optimizer.betas, stage.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    assert stage.optimizer.warmup_fraction == 20 / 400
    assert (recipe.dtype, stage.data.held_out_fraction, stage.data.max_length) == ("bfloat16", 0.02, 2048)
    assert stage.data.train[0].columns == {"messages": "talk"}
    assert set(imports.said["not_mapped"]) == {"chat_template", "cosine_min_lr_ratio", "datasets.0.shards"}
    assert {"sample_packing", "sequence_len", "bf16", "val_set_size"} <= set(imports.said["differs"])


def test_packs_need_the_number_of_rows(imports: Imports) -> None:
    """2 packs x 4 steps x 2,048 tokens."""
    assert "a step has up to 16,384 tokens" in imports.refusal(AXOLOTL)


def test_dpo_of_axolotl(imports: Imports) -> None:
    values = AXOLOTL | {"rl": "dpo", "rl_beta": 0.2, "sample_packing": False, "max_steps": None, "adapter": "qlora"}
    values |= {"lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "load_in_4bit": True}
    values |= {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<x>"], "loraplus_lr_ratio": None}
    values["datasets"] = [
        {"path": "owner/pairs", "type": "chat_template.default", "field_messages": "talk", "field_chosen": "good"},
        {"path": "owner/other", "type": "chatml.intel", "split": "train[:10%]"},
    ]
    recipe = imports(values, "--devices", "4")
    stage = recipe.stages["dpo"]
    assert (stage.beta, stage.batch_size, stage.epochs, recipe.parallel.processes) == (0.2, 2 * 4 * 4, 3, 4)
    assert stage.lora.targets == ["all-linear", "embeddings"]
    assert (recipe.model.add_tokens, stage.lora.train_embeddings) == (["<x>"], True)
    first, second = stage.data.train
    assert first.columns == {"messages": "talk", "chosen": "good"}
    assert (second.columns, second.split) == ({"prompt": "question"}, "train[:10%]")
    missing = {"warmup_steps", "load_in_4bit", "datasets.1.type", "chat_template", "cosine_min_lr_ratio"}
    assert set(imports.said["not_mapped"]) == missing


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (FACTORY | {"dataset": "questions", "quantization_bit": 4}, "quantization_bit"),
        (
            AXOLOTL
            | {"sample_packing": False, "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16}
            | {"lora_target_linear": True},
            "load_in_4bit",
        ),
    ],
)
def test_weights_in_4_bits(values: dict[str, Any], key: str, imports: Imports) -> None:
    """In one process only; 8 bits do not exist in align."""
    assert imports(values).stages["sft"].lora.quantize == "nf4"
    assert key in imports.said["differs"]
    assert imports(values, "--devices", "2").stages["sft"].lora.quantize is None
    assert key in imports.said["not_mapped"]
    eight = values | ({"quantization_bit": 8} if key == "quantization_bit" else {"load_in_8bit": True})
    eight = {name: value for name, value in eight.items() if name != "load_in_4bit"}
    assert imports(eight).stages["sft"].lora.quantize is None
    assert imports.said["not_mapped"].keys() & {"quantization_bit", "load_in_8bit"}


def test_texts_of_axolotl_are_trained_on_all_tokens(imports: Imports) -> None:
    values = AXOLOTL | {"datasets": [{"path": "text.jsonl", "type": "completion", "field": "body"}]}
    stage = imports(values | {"sample_packing": False}).stages["sft"]
    assert (stage.assistant_only_loss, stage.data.train[0].columns) == (False, {"text": "body"})


@pytest.mark.parametrize(
    ("values", "flags", "said"),
    [
        (FACTORY | {"stage": "ppo"}, [], "stage: ppo: only sft and dpo are imported"),
        (
            FACTORY | {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"},
            [],
            "pref_loss: orpo: align has the losses",
        ),
        (FACTORY | {"adapter_name_or_path": "a"}, [], "merge the adapter first"),
        (FACTORY | {"finetuning_type": "freeze"}, [], "finetuning_type: freeze"),
        (FACTORY | {"dataset": "absent"}, [], "'absent' is not in data/dataset_info.json"),
        (FACTORY | {"dataset": "pairs"}, [], "`ranking` is True, which does not fit stage sft"),
        (FACTORY | {"use_galore": True}, [], "use_galore: True"),
        (FACTORY, ["--batch-size", "7"], "the file has 15 rows per step (3 x 5 x 1 devices)"),
        (AXOLOTL | {"rl": "grpo"}, [], "rl: grpo"),
        (AXOLOTL | {"batch_size": 8}, [], "set micro_batch_size and gradient_accumulation_steps instead"),
        (AXOLOTL | {"datasets": [{"path": "x.jsonl", "type": "sharegpt"}]}, [], "sharegpt: this type is not imported"),
        (AXOLOTL | {"learning_rate": "fast"}, ["--batch-size", "8"], "learning_rate: fast: not a number"),
        ({"model": "x"}, [], "neither model_name_or_path (LLaMA-Factory) nor base_model (axolotl) is set"),
    ],
)
def test_what_cannot_be_right_is_refused(values: dict, flags: list[str], said: str, imports: Imports) -> None:
    assert said in imports.refusal(values, *flags)


def test_the_report_in_words(imports: Imports, capsys) -> None:
    imports(FACTORY)
    cli.main(["import-recipe", "tuning.yaml", "-o", "words.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("words.yaml: from LLaMA-Factory: 14 keys mapped")
    assert "  not mapped: unheard_of: align has no setting for it" in lines
    assert any("missing here: stages.sft.data.train: data/rows.json" in line for line in lines)
