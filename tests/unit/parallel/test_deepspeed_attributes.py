"""Every undocumented name of DeepSpeed that `align/parallel` uses still exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

PARALLEL = Path(__file__).parents[3] / "align" / "parallel"
ZERO = "deepspeed.runtime.zero."
STAGE_3 = f"{ZERO}stage3.DeepSpeedZeroOptimizer_Stage3"
STAGE_2 = f"{ZERO}stage_1_and_2.DeepSpeedZeroOptimizer"
MEMBERS = {
    "deepspeed.ops": ["__compatible_ops__"],
    "deepspeed.comm.comm": ["cdb"],
    "deepspeed.utils.groups": [
        "_create_expert_and_data_parallel",
        "_get_expert_parallel_group",
        "_get_expert_data_parallel_group",
    ],
    "deepspeed.module_inject.auto_ep_layer": ["AutoEPMoELayer"],
    f"{ZERO}stage_1_and_2": ["INITIAL_MICRO_STEP_ID"],
    f"{ZERO}partition_parameters.Init": [
        "_zero_init_param",
        "_convert_to_deepspeed_param",
        "_convert_to_zero_parameters",
    ],
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper.PartitionedParamStatus": ["AVAILABLE"],
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper.AsyncPartitionedParameterSwapper": [
        "swap_out_partitioned_params"
    ],
    STAGE_3: [
        "get_local_fp32_param",
        "set_local_hp_param",
        "reset_cpu_buffers",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
    ],
    STAGE_2: [
        "update_lp_params",
        "reset_cpu_buffers",
        "_release_preflattened_grad_buffers",
        "_lazy_init_hp_params_optimizer_state",
    ],
    "deepspeed.utils.tensor_fragment.tensor_fragment": ["get_hp_fragment"],
    "deepspeed.runtime.engine.DeepSpeedEngine": [
        "zero_optimization",
        "buffered_allreduce_fallback",
        "get_global_grad_norm",
        "was_step_applied",
    ],
}
"""Members of modules and classes."""
ASSIGNED = {
    STAGE_3: ["averaged_gradients", "fp32_partitioned_groups_flat", "swap_optimizer"],
    STAGE_2: ["averaged_gradients", "all_grad_tensors", "micro_step_id", "single_partition_of_fp32_groups"],
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": ["fp32_groups_flat_partition"],
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": ["fp16_groups", "fp32_groups"],
    f"{ZERO}partition_parameters.Init": ["ds_tensor", "ds_shape", "nvme_swapper", "ds_numel"],
    "deepspeed.utils.mixed_precision_linkage": ["_hp_mapping"],
    "deepspeed.utils.tensor_fragment.tensor_fragment": [
        "lp_fragment_address",
        "hp_fragment_address",
        "param_group_index",
    ],
}
"""Attributes of instances or parameters, set by an assignment or as a dataclass field."""
READ = {
    STAGE_2: ["allreduce", "group_name"],
    f"{ZERO}partition_parameters": ["ds_zero_partition_process_group"],
    f"{ZERO}stage3": ["ds_zero_placement_family", "ds_zero_partition_group_name", "autoep_expert"],
    "deepspeed.runtime.config": ["managed_gradient_accumulation"],
    "deepspeed.runtime.precision_config": ["check_grad_overflow"],
}
"""Names that DeepSpeed reads from parameters or from its configuration."""
NOT_DEEPSPEEDS = {"_parameters", "_from_config", "_get_default_store", "_replace"}


def find(path: str) -> object:
    """The module or class with this dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(path, name) for path, names in table.items() for name in names]


@pytest.mark.parametrize(("path", "name"), pairs(MEMBERS))
def test_member_exists(path: str, name: str) -> None:
    assert hasattr(find(path), name), f"DeepSpeed's {path} has no {name} any more"


@pytest.mark.parametrize(("path", "name"), pairs(ASSIGNED))
def test_attribute_is_assigned(path: str, name: str) -> None:
    assert re.search(rf"\b{name}\s*(:[^=\n]*)?(=(?!=)|:)", inspect.getsource(find(path))), f"{path} does not set {name}"


@pytest.mark.parametrize(("path", "name"), pairs(READ))
def test_name_is_read(path: str, name: str) -> None:
    assert re.search(rf"\b{name}\b", inspect.getsource(find(path))), f"{path} does not read {name}"


def test_the_tables_list_every_private_name_that_is_used() -> None:
    used = {
        node.attr
        for file in PARALLEL.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]|__compat", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self" and file.name in ("steps.py", "state.py"))
    }
    known = {name for table in (MEMBERS, ASSIGNED, READ) for _, name in pairs(table)}
    assert used - NOT_DEEPSPEEDS <= known
