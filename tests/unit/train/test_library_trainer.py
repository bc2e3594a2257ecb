"""Undocumented parts of transformers, accelerate and PEFT that align/train and the recipes use still exist.

An upgrade that renames or moves one of these fails here, in one line.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.config.lora import Lora
from align.models.hunyuan import HunYuanForCausalLM
from align.models.lora.adapters import add_lora
from tests.unit.train.one_step import checkpoint

SIGNATURES: list[tuple[Any, str, str]] = [
    (Trainer, "get_train_dataloader", ""),
    (Trainer, "training_step", "model inputs num_items_in_batch"),
    (Trainer, "evaluate", "eval_dataset ignore_keys metric_key_prefix"),
    (Trainer, "log", "logs start_time"),
    (Trainer, "floating_point_ops", "inputs"),
    (Trainer, "_load_from_checkpoint", "resume_from_checkpoint model"),
    (Trainer, "_prepare_for_training", "max_steps train_dataloader resume_from_checkpoint"),
    (
        Trainer,
        "_run_epoch",
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    ),
    (Trainer, "save_model", "output_dir _internal_call"),
    (Trainer, "_save_optimizer_and_scheduler", "output_dir"),
    (Trainer, "create_optimizer", "model"),
    (Trainer, "create_scheduler", "num_training_steps optimizer"),
    (Accelerator, "gather", "tensor"),
    (Accelerator, "reduce", "tensor reduction scale"),
    (TrainerCallback, "on_log", "args state control kwargs"),
    (TrainerCallback, "on_step_end", "args state control kwargs"),
    (TrainerCallback, "on_save", "args state control kwargs"),
    (TrainerCallback, "on_prediction_step", "args state control kwargs"),
]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"), SIGNATURES, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_method_takes_the_parameters_that_are_passed(owner: Any, name: str, parameters: str) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == ["self", *parameters.split()]


def test_functions_take_the_parameters_that_are_passed() -> None:
    assert {"lengths", "batch_size", "generator"} <= set(inspect.signature(get_length_grouped_indices).parameters)
    assert {"adapter_name", "autocast_adapter_dtype"} <= set(inspect.signature(get_peft_model).parameters)
    assert 'kwargs.pop("data_seed"' in inspect.getsource(SeedableRandomSampler.__init__)
    assert list(inspect.signature(get_reporting_integration_callbacks).parameters) == ["report_to"]
    assert {"adapter_name", "peft_config"} <= set(inspect.signature(PeftModel.add_adapter).parameters)


def test_attributes_that_are_read_or_set_exist() -> None:
    """Instance attributes are searched in the source of the class that sets or reads them."""
    sources = {
        Trainer: "is_deepspeed_enabled model_wrapped lr_scheduler train_dataset callback_handler control",
    }
    for owner, names in sources.items():
        source = inspect.getsource(owner)
        missing = [name for name in names.split() if f"self.{name}" not in source]
        assert missing == [], owner.__name__
    assert "self._last_lr" in inspect.getsource(LRScheduler)
    assert "self._n_gpu = " in inspect.getsource(TrainingArguments)


def test_the_end_of_a_step_is_set_as_the_trainer_does() -> None:
    """`training_step` marks the backward pass that ends a step in the way that `Trainer` and `Accelerator` read."""
    assert "gradient_state._set_sync_gradients(" in inspect.getsource(Trainer._run_epoch)
    assert "sync_gradients=self.sync_gradients" in inspect.getsource(Accelerator.backward)
    assert '"scale_wrt_gas"' in inspect.getsource(Trainer.training_step)
    assert "batch_samples[0]" in inspect.getsource(Trainer._get_num_items_in_batch)


def test_a_non_finite_loss_is_logged_before_a_checkpoint_is_saved() -> None:
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self.log(") < source.index("self._save_checkpoint(")
    inner = inspect.getsource(Trainer)
    assert inner.index("callback_handler.on_step_end(") < inner.index("self._maybe_log_save_evaluate(")
    assert "nested_gather(tr_loss" in source  # so that all ranks see the same value


def test_configurations_have_the_fields_that_are_set() -> None:
    """`trainer_arguments` sets these fields."""
    names = """output_dir seed data_seed num_train_epochs max_steps per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps learning_rate max_grad_norm use_cpu bf16
        gradient_checkpointing gradient_checkpointing_kwargs logging_steps logging_nan_inf_filter save_strategy
        save_steps save_total_limit report_to run_name project disable_tqdm dataloader_pin_memory deepspeed"""
    assert set(names.split()) <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_peft_names_parameters_as_expected(tmp_path: Path) -> None:
    """`plain_name`, `is_lora_weight`, `count_parameters` and the saved adapter rely on these names."""
    model = add_lora(
        HunYuanForCausalLM.from_pretrained(checkpoint(tmp_path / "model")),
        Lora(rank=2, train_router=True),
        task="CAUSAL_LM",
    )
    names = {name for name, _ in model.named_parameters()}
    layer = "base_model.model.model.layers.0"
    for expected in (
        f"{layer}.self_attn.q_proj.base_layer.weight",
        f"{layer}.self_attn.q_proj.lora_A.default.weight",
        f"{layer}.self_attn.q_proj.lora_B.default.weight",
        f"{layer}.mlp.gate.original_module.weight",
        f"{layer}.mlp.gate.modules_to_save.default.weight",
    ):
        assert expected in names
    assert any(".experts." in name and ".lora_A.default" in name for name in names)
    assert isinstance(model.peft_config["default"], LoraConfig)
    assert callable(model.merge_and_unload)
