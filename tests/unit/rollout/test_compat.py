"""`make compat` on small stand-ins for vLLM and align: it reports missing and changed names, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat import check, contract
from tests.compat.__main__ import allowed_versions, pins
from tests.compat.tree import Tree
from tests.compat.usage import usage

ROOT = Path(__file__).parents[3]
THEIRS = {
    "vllm/__init__.py": 'ATTRS = {"LLM": ".entry:LLM"}\ndef __getattr__(name): ...\n',
    "vllm/entry.py": "class LLM:\n    def generate(self, prompts, *, use_tqdm=True): ...\n",
    "vllm/old/__init__.py": "from .place import *\n",
    "vllm/old/place.py": "from ..parsers import make_parser\n",
    "vllm/parsers.py": "def make_parser(parser, subcommand=None): ...\n",
    "vllm/base.py": (
        "from abc import ABC, abstractmethod\n"
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Info:\n    address: str\n    port: int = 0\n"
        "@dataclass\nclass Trainer(Info):\n    rank: int = field(kw_only=True)\n"
        "class Source(ABC):\n"
        "    @abstractmethod\n    def metadata(self): ...\n"
        "    def send(self, bucket, dtype=None): ...\n"
    ),
    "vllm/kernels.py": "def norm(out, x, weight): ...\n",
    "vllm/platform.py": "class Platform:\n    def is_cpu(self): ...\ncurrent: Platform\n",
    "vllm/envs.py": 'environment = {"VLLM_QUIET": None}\n',
    "vllm/entrypoints/api.py": '@router.post("/pause")\ndef pause(): ...\n',
}
OURS = """
import vllm.entry
from vllm import LLM
from vllm import kernels as fast
from vllm.base import Source, Trainer
from vllm.platform import current
try:
    from vllm.new.place import make_parser
except ImportError:
    from vllm.old import make_parser

def use(llm, out, x):
    current.is_cpu()
    fast.norm(out, x, None)
    Trainer("a", 1, rank=0)
    call("POST", "/pause?mode=abort", "VLLM_QUIET")

class Ours(Source):
    def metadata(self):
        return []
    def send(self, bucket, dtype=None):
        super().send(bucket, dtype)
"""


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that replaces text in a file of THEIRS and returns the problems that `make compat` finds for OURS."""
    monkeypatch.setattr(contract, "CALLS", [("vllm:LLM.generate", {"prompts": [], "use_tqdm": False})])
    monkeypatch.setattr(contract, "ATTRIBUTES", [("vllm.base:Trainer", "rank address")])
    monkeypatch.setattr(contract, "READ", [("vllm.old:make_parser", "subcommand")])
    monkeypatch.setattr(contract, "OPTIONS", [])
    (tmp_path / "ours/align").mkdir(parents=True)
    (tmp_path / "ours/align/code.py").write_text(OURS)

    def problems(file: str = "vllm/entry.py", before: str = "", after: str = "", name: str | None = None) -> list[str]:
        for path, text in THEIRS.items():
            place = tmp_path / (name if name and path == file else path)
            place.parent.mkdir(parents=True, exist_ok=True)
            assert path != file or before in text
            place.write_text(text.replace(before, after) if path == file and before else text)
        return check.problems(Tree(tmp_path), usage(tmp_path / "ours", "vllm"), tmp_path / "ours")

    return problems


def test_a_package_that_fits_has_no_problem(found) -> None:
    assert found() == []


def test_a_module_that_moved_is_named_with_its_new_place(found) -> None:
    assert found("vllm/base.py", name="vllm/moved.py")[:2] == [
        "align/code.py:5: `from vllm.base import Source` fails: the module is gone; defined in vllm.moved",
        "align/code.py:5: `from vllm.base import Trainer` fails: the module is gone; defined in vllm.moved",
    ]


def test_one_of_two_alternative_imports_suffices(found) -> None:
    assert found("vllm/parsers.py", "make_parser", "build_parser")[0] == (
        "align/code.py:8: `from vllm.new.place import make_parser` fails: the module is gone"
    )


CHANGES = [
    # file, text, its replacement, expected problem
    (
        "vllm/entry.py",
        "use_tqdm=True",
        "progress=True",
        "vllm:LLM.generate does not take prompts, use_tqdm: got an unexpected keyword argument 'use_tqdm'",
    ),
    (
        "vllm/entry.py",
        "prompts, *",
        "prompts, lora, *",
        "vllm:LLM.generate does not take prompts, use_tqdm: missing a required argument: 'lora'",
    ),
    (
        "vllm/kernels.py",
        "weight",
        "weight, eps",
        "align/code.py:14: vllm.kernels:norm does not take the arguments of our call: missing a required argument: "
        "'eps'",
    ),
    ("vllm/kernels.py", "norm", "rms", "align/code.py:14: vllm.kernels has no attribute 'norm'"),
    (
        "vllm/platform.py",
        "is_cpu",
        "on_cpu",
        "align/code.py:13: vllm.platform:current has no attribute 'is_cpu'",
    ),
    (
        "vllm/base.py",
        "    port: int = 0\n",
        "",
        "align/code.py:15: vllm.base:Trainer does not take the arguments of our call: too many positional arguments",
    ),
    ("vllm/base.py", "rank", "index", "vllm.base:Trainer has no attribute 'rank'"),
    (
        "vllm/base.py",
        "    @abstractmethod\n    def metadata",
        "    @property\n    @abstractmethod\n    def metadata",
        "align/code.py:18: vllm.base:Source.metadata is a property, but Ours.metadata is a method",
    ),
    (
        "vllm/base.py",
        "    def send",
        "    @abstractmethod\n    def close(self): ...\n    def send",
        "align/code.py:18: Ours does not define vllm.base:Source.close, which is abstract",
    ),
    (
        "vllm/base.py",
        "bucket, dtype=None",
        "bucket, dtype=None, draft=False",
        "align/code.py:18: Ours.send overrides vllm.base:Source.send(bucket, dtype=None, draft=None): too many "
        "positional arguments",
    ),
    ("vllm/envs.py", "QUIET", "LOUD", "the environment variable VLLM_QUIET is not in vllm/envs.py"),
    ("vllm/entrypoints/api.py", "/pause", "/halt", "no server has the route /pause"),
    ("vllm/parsers.py", "subcommand", "command", "vllm.old:make_parser no longer contains 'subcommand'"),
]


@pytest.mark.parametrize(("file", "before", "after", "said"), CHANGES, ids=[said[:60] for *_, said in CHANGES])
def test_a_change_is_named(found, file: str, before: str, after: str, said: str) -> None:
    assert said in found(file, before, after)


def test_a_library_that_the_project_excludes_is_named(tmp_path: Path) -> None:
    metadata = tmp_path / "vllm-1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text('Requires-Dist: torch==1.0\nRequires-Dist: trl>=0\nRequires-Dist: peft==1; extra == "x"\n')
    (said,) = pins(tmp_path, ROOT)
    assert said.startswith("it requires torch==1.0, but pyproject.toml allows ")


def test_the_versions_that_are_allowed_are_those_that_are_checked() -> None:
    """Both ends of the range in pyproject.toml are versions that `make compat` checks."""
    assert allowed_versions(ROOT) == ["0.32.0", "0.33.0"]


def test_our_source_is_read_in_full() -> None:
    used = usage(ROOT, "vllm")
    modules = {one.module for group in used.imports for alternative in group for one in alternative}
    assert {"vllm.platforms", "vllm.entrypoints.common.cli_args", "vllm.distributed.weight_transfer.base"} <= modules
    classes = {(each.node.name, each.of.name) for each in used.subclasses}
    assert {("BucketSource", "WeightSource"), ("IpcTransfer", "IPCWeightTransferEngine")} <= classes
