"""Every name of the installed vLLM that align uses exists; after an upgrade, each missing name fails here in one line.

No engine is started. test_vllm_engine.py and test_remote_vllm.py test the behaviour. `make compat` checks the same for
versions that are not installed.
"""

from __future__ import annotations

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
from tests.compat.contract import ATTRIBUTES, CALLS
from tests.compat.usage import Import, usage

ROOT = Path(__file__).parents[3]
SOURCES = sorted(Path(align.rollout.__path__[0]).rglob("*.py"))


def find(path: str) -> Any:
    """The object at a dotted path, `package.module:name` or `package.module:Class.method`."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def is_importable(one: Import) -> bool:
    try:
        found = importlib.import_module(one.module)
        if one.name and not hasattr(found, one.name):
            importlib.import_module(f"{one.module}.{one.name}")
    except ModuleNotFoundError:
        return False
    return True


def test_imports() -> None:
    """An import with `except ImportError` needs only one working alternative; the other is for another vLLM version."""
    groups = usage(ROOT, "vllm").imports
    assert ["from vllm import LLM"] in [[str(one) for one in each] for group in groups for each in group]
    assert len(groups) > 40
    for group in groups:
        assert any(all(map(is_importable, alternative)) for alternative in group), group


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[path for path, _ in CALLS])
def test_methods_take_our_arguments(function: str, arguments: dict[str, Any]) -> None:
    found = find(function)
    is_method = "." in function.partition(":")[2] and not inspect.ismethod(found)
    inspect.signature(found).bind(*([None] if is_method else []), **arguments)


@pytest.mark.parametrize(("owner", "names"), ATTRIBUTES, ids=[path for path, _ in ATTRIBUTES])
def test_objects_have_our_attributes(owner: str, names: str) -> None:
    kind = find(owner)
    source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1] if base.__module__.startswith("vllm"))
    fields = {name for base in kind.__mro__ for name in inspect.get_annotations(base)}
    for name in names.split():
        is_set = re.search(rf"self\.{name}(: [^=\n]+)? = ", source)
        assert name in fields or hasattr(kind, name) or is_set, f"{owner} has no {name}"


def test_environment_variables() -> None:
    from vllm import envs

    used = {name for file in SOURCES for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", file.read_text(encoding="utf-8"))}
    assert "VLLM_SERVER_DEV_MODE" in used
    assert used - set(envs.environment_variables) == set()


def test_engine_and_server_options(tmp_path: Path) -> None:
    """vLLM's parser accepts a server's command line, and its engine arguments include the options set on a GPU."""
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
    options |= {"hf_overrides": {"qk_norm": True}, "attention_backend": "CPU_MLA", "enable_prefix_caching": False}
    make_parser = serve_parser()[0]
    parsed = make_parser(FlexibleArgumentParser()).parse_args([*command_line(options), "--served-model-name", "a"])
    assert (parsed.tensor_parallel_size, parsed.tokens_only, parsed.max_model_len) == (2, True, 512)
    assert parsed.weight_transfer_config.backend == "align_host"
    assert (parsed.hf_overrides, parsed.enable_prefix_caching) == ({"qk_norm": True}, False)


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
