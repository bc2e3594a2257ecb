"""Every name of vLLM that align/rollout uses exists; after an upgrade, each missing name fails here in one line.

No engine is started. test_vllm_engine.py and test_remote_vllm.py test the behaviour.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
import align.rollout
from align.config.rollout import Rollout
from align.rollout.base import SamplingSettings
from align.rollout.serve import command_line
from align.rollout.vllm_options import engine_options, sampling_options
from align.rollout.vllm_versions import serve_parser

TRANSFER = "vllm.distributed.weight_transfer"
SOURCES = sorted(Path(align.rollout.__path__[0]).rglob("*.py"))


def imported_names() -> list[tuple[str, str]]:
    """(module, name) of every `from vllm... import name` in align/rollout."""
    nodes = [node for file in SOURCES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")]
    return sorted({(str(node.module), alias.name) for node in froms for alias in node.names})


def find(path: str) -> Any:
    """The object at a dotted path, `package.module:name` or `package.module:Class.method`."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def test_imports() -> None:
    names = imported_names()
    assert ("vllm", "LLM") in names
    assert len(names) > 15
    for module, name in names:
        if module == "vllm.entrypoints.common.cli_args":
            continue  # of 0.33; align/rollout/vllm_versions.py has 0.32's beside it
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("vllm:LLM.generate", {"prompts": [], "sampling_params": [], "use_tqdm": False}),
        ("vllm:LLM.start_weight_update", {}),
        ("vllm:LLM.update_weights", {"request": {}}),
        ("vllm:LLM.finish_weight_update", {"weight_version": "1"}),
        ("vllm:LLM.update_weight_version", {"new_version": "0"}),
        ("vllm:LLM.reset_prefix_cache", {}),
        ("vllm:LLM.sleep", {"level": 1}),
        ("vllm:LLM.wake_up", {}),
        ("vllm.v1.engine.core_client:InprocClient.shutdown", {}),
        (f"{TRANSFER}.base:WeightTransferEngine.__init__", {"config": 0, "vllm_config": 0, "device": 0, "model": 0}),
        (f"{TRANSFER}.base:WeightTransferEngine.start_weight_update", {}),
        (f"{TRANSFER}.base:WeightTransferEngine.update_weights", {"update_info": {}}),
        (f"{TRANSFER}.base:WeightTransferEngine.finish_weight_update", {}),
        (f"{TRANSFER}.base:WeightTransferEngine.receive_weights", {"update_info": None}),
        (f"{TRANSFER}.base:WeightTransferEngine.init_transfer_engine", {"init_info": None}),
        (f"{TRANSFER}.base:TrainerWeightTransferEngine.send_weights", {}),
        (f"{TRANSFER}.base:TrainerWeightTransferEngine.shutdown", {}),
        (f"{TRANSFER}.clients:HTTPVLLMWeightSyncClient.update_weights", {"update_info": {}}),
        (f"{TRANSFER}.clients:HTTPVLLMWeightSyncClient.init_weight_transfer_engine", {"init_info": {}}),
        ("vllm.v1.worker.worker_base:WorkerWrapperBase.__init__", {}),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model", {}),
    ],
)  # fmt: skip
def test_methods_take_our_arguments(function: str, arguments: dict[str, Any]) -> None:
    inspect.signature(find(function)).bind(None, **arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (f"{TRANSFER}:WeightTransferTrainerFactory.trainer_init", {"client": None, "source": None}),
        (f"{TRANSFER}.clients:HTTPVLLMWeightSyncClient", {}),
        (f"{TRANSFER}.base:ParamMeta", {"dtype": None, "shape": ()}),
    ],
)  # fmt: skip
def test_functions_take_our_arguments(function: str, arguments: dict[str, Any]) -> None:
    inspect.signature(find(function)).bind_partial(None, **arguments)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        ("vllm.outputs:RequestOutput", "request_id prompt_token_ids outputs num_cached_tokens"),
        ("vllm.outputs:CompletionOutput", "token_ids logprobs routed_experts finish_reason weight_versions"),
        ("vllm.config:VllmConfig", "cache_config model_config aux_output_config weight_transfer_config"),
        ("vllm.config:CacheConfig", "num_gpu_blocks block_size"),
        ("vllm.config:ModelConfig", "enable_sleep_mode hf_config"),
        ("vllm:LLM", "llm_engine"),
        ("vllm.v1.engine.llm_engine:LLMEngine", "engine_core vllm_config model_executor"),
        ("vllm.v1.executor.uniproc_executor:UniProcExecutor", "driver_worker"),
        ("vllm.v1.worker.worker_base:WorkerWrapperBase", "worker"),
        ("vllm.v1.worker.gpu_worker:Worker", "model_runner"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "input_batch query_start_loc"),
        ("vllm.v1.worker.gpu_input_batch:InputBatch", "req_ids num_reqs"),
        ("vllm.v1.utils:CpuGpuBuffer", "np"),
        ("vllm.v1.core.sched.scheduler:Scheduler", "_preempt_request"),
        (f"{TRANSFER}.ipc_engine:IPCWeightTransferEngine", "_packed_importer"),
        (
            f"{TRANSFER}.nccl_engine:NCCLTrainerInitInfo",
            "rank master_address master_port world_size packed_buffer_size_bytes",
        ),
        (f"{TRANSFER}.ipc_engine:IPCTrainerInitInfo", "rank packed packed_buffer_size_bytes"),
    ],
)
def test_objects_have_our_attributes(owner: str, names: str) -> None:
    kind = find(owner)
    source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1] if base.__module__.startswith("vllm"))
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for name in names.split():
        is_set = re.search(rf"self\.{name}(: [^=\n]+)? = ", source)
        assert name in fields or hasattr(kind, name) or is_set, f"{owner} has no {name}"


def test_environment_variables() -> None:
    from vllm import envs

    used = {name for file in SOURCES for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", file.read_text(encoding="utf-8"))}
    assert "VLLM_SERVER_DEV_MODE" in used
    assert used - set(envs.environment_variables) == set()


def test_engine_and_server_options(tmp_path: Path) -> None:
    """vLLM's own parser reads the command line of a server; the options include those of a GPU."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = engine_options(tmp_path, Rollout(), dtype="float32", seed=0)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    on_a_gpu = {"enable_sleep_mode", "enable_return_routed_experts", "gpu_memory_utilization"}
    assert (set(options) | on_a_gpu) - known == set()
    source = (Path(align.rollout.__path__[0]) / "serve.py").read_text(encoding="utf-8")
    for name in ("tokens_only", "disable_log_stats", "disable_uvicorn_access_log"):
        assert f'"{name}": True' in source
        options[name] = True
    options |= {"host": "127.0.0.1", "port": 8001, "uvicorn_log_level": "error", "tensor_parallel_size": 2}
    make_parser = serve_parser()[0]
    parsed = make_parser(FlexibleArgumentParser()).parse_args([*command_line(options), "--served-model-name", "a"])
    assert (parsed.tensor_parallel_size, parsed.tokens_only, parsed.max_model_len) == (2, True, 512)
    assert parsed.weight_transfer_config.backend == "align_host"


def test_sampling_options() -> None:
    from vllm import SamplingParams

    options = sampling_options(SamplingSettings(5, temperature=0.7, stop_token_ids=(3,)), seed=9)
    sampling = SamplingParams(**options, skip_reading_prefix_cache=True)
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.logprobs) == (5, 0.7, 9, 0)


def test_server_routes() -> None:
    """Every route that the client calls is in the source of vLLM's servers."""
    import vllm

    client = "".join(file.read_text(encoding="utf-8") for file in SOURCES)
    called = set(re.findall(r'"(?:GET|POST)", "(/[a-z0-9_/]+)', client))
    assert {"/pause", "/update_weights", "/inference/v1/generate"} <= called
    folder = Path(vllm.__path__[0]) / "entrypoints"
    servers = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    offered = set(re.findall(r'router\.(?:get|post)\(\s*"(/[a-z0-9_/]+)"', servers))
    assert called - offered == set()
