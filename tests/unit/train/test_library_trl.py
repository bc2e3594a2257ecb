"""Undocumented parts of TRL, transformers, accelerate and PEFT that align/train and the recipes use still exist.

An upgrade that renames or moves one of these fails here, in one line.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from align.config.parts import Lora
from align.config.stages import LossType
from align.models.hunyuan import HunYuanForCausalLM
from align.models.lora.adapters import add_lora
from align.recipes.dpo import BY_TRL
from tests.unit.train.one_step import checkpoint

SIGNATURES: list[tuple[Any, str, str]] = [
    (Trainer, "get_train_dataloader", ""),
    (Trainer, "_get_train_sampler", "train_dataset"),
    (Trainer, "get_batch_samples", "epoch_iterator num_batches device"),
    (Trainer, "_load_from_checkpoint", "resume_from_checkpoint model"),
    (Trainer, "_prepare_for_training", "max_steps train_dataloader resume_from_checkpoint"),
    (Trainer, "save_model", "output_dir _internal_call"),
    (Trainer, "_save_optimizer_and_scheduler", "output_dir"),
    (Trainer, "create_optimizer", "model"),
    (Trainer, "create_scheduler", "num_training_steps optimizer"),
    (Trainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
    (SFTTrainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
    (RewardTrainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
    (DPOTrainer, "compute_loss", "model inputs return_outputs num_items_in_batch"),
    (DPOTrainer, "_compute_loss", "model inputs return_outputs"),
    (DPOTrainer, "compute_ref_log_probs", "model inputs"),
    (DPOTrainer, "_precompute_ref_logps", "dataset name batch_size"),
    (DPOTrainer, "_prepare_dataset", "dataset processing_class args dataset_name"),
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
        Trainer: "current_gradient_accumulation_steps is_deepspeed_enabled model_wrapped lr_scheduler train_dataset",
        SFTTrainer: "_metrics router_aux_loss_coef current_gradient_accumulation_steps",
        RewardTrainer: "_metrics args.center_rewards_coefficient",
        DPOTrainer: "_metrics ref_model loss_types loss_weights label_smoothing precompute_ref_logps",
    }
    for owner, names in sources.items():
        source = inspect.getsource(owner)
        missing = [name for name in names.split() if f"self.{name}" not in source]
        assert missing == [], owner.__name__
    assert "self._last_lr" in inspect.getsource(LRScheduler)
    assert "self._n_gpu = " in inspect.getsource(TrainingArguments)


def test_losses_of_pairs_are_divided_by_the_accumulation_steps() -> None:
    """The trainers' micro-batch weights rely on this division."""
    assert RewardTrainer.loss_is_scaled_for_ga is False
    assert DPOTrainer.loss_is_scaled_for_ga is False
    assert getattr(SFTTrainer, "loss_is_scaled_for_ga", None) is None


def test_a_non_finite_loss_is_logged_before_a_checkpoint_is_saved() -> None:
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self.log(") < source.index("self._save_checkpoint(")
    inner = inspect.getsource(Trainer)
    assert inner.index("callback_handler.on_step_end(") < inner.index("self._maybe_log_save_evaluate(")
    assert "nested_gather(tr_loss" in source  # so that all ranks see the same value


def test_configurations_have_the_fields_that_are_set() -> None:
    """`trainer_arguments` and the recipes set these fields."""
    shared = """output_dir seed data_seed num_train_epochs max_steps per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps learning_rate max_grad_norm use_cpu bf16
        gradient_checkpointing gradient_checkpointing_kwargs logging_steps logging_nan_inf_filter save_strategy
        save_steps save_total_limit report_to run_name project disable_tqdm dataloader_pin_memory deepspeed"""
    own = {
        TrainingArguments: "",
        SFTConfig: "router_aux_loss_coef max_length",
        RewardConfig: "center_rewards_coefficient max_length",
        DPOConfig: """router_aux_loss_coef max_length beta loss_type loss_weights label_smoothing discopop_tau
            precompute_ref_log_probs""",
    }
    for config, names in own.items():
        known = {field.name for field in dataclasses.fields(config)}
        assert set(f"{shared} {names}".split()) <= known, config.__name__


def test_trl_computes_the_losses_that_are_left_to_it() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert [name for name in BY_TRL if f'loss_type == "{name}"' not in source] == []
    assert set(get_args(LossType)) >= BY_TRL
    assert "zip(self.loss_types, self.loss_weights" in source  # read at every call


def test_the_fused_head_returns_log_probabilities_of_labelled_tokens(tmp_path: Path) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = HunYuanForCausalLM.from_pretrained(checkpoint(tmp_path / "model"))
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, -100, 7, 8]])
    plain = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    add_fused_lm_head(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(
        found[0], torch.stack([plain.new_zeros(()), plain[1, 7], plain[2, 8]]), atol=1e-5, rtol=0
    )


def test_peft_names_parameters_as_expected(tmp_path: Path) -> None:
    """`plain_name`, `is_lora_weight`, `count_parameters` and the saved adapter rely on these names."""
    model = add_lora(HunYuanForCausalLM.from_pretrained(checkpoint(tmp_path / "model")), Lora(rank=2), task="CAUSAL_LM")
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
