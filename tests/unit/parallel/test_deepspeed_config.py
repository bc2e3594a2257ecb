"""The parallel section of a recipe: its DeepSpeed configuration and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.config import load_recipe
from align.config.parallel import Offload, Parallel
from align.errors import UserError
from align.parallel.deepspeed_config import deepspeed_config

GOLDEN = Path(__file__).parent / "deepspeed_configs.json"
CASES = {
    "zero_3_experts": (Parallel(processes=8, expert_parallel_size=4), "bfloat16"),
    "zero_3_offload": (Parallel(processes=2, offload=Offload(optimizer="cpu", parameters="cpu")), "bfloat16"),
    "zero_2": (Parallel(processes=4, zero_stage=2), "float32"),
    "zero_0": (Parallel(processes=2, zero_stage=0), "float32"),
}


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_config_is_the_golden_one(name: str) -> None:
    parallel, dtype = CASES[name]
    config = deepspeed_config(parallel, micro_batch_size=2, accumulation=3, max_grad_norm=0.5, dtype=dtype)
    assert config == json.loads(GOLDEN.read_text())[name]


def test_deepspeed_accepts_the_golden_configurations() -> None:
    """DeepSpeed's own parser reads the configurations, in a subprocess: other tests must not import DeepSpeed."""
    program = (
        "import json, os, sys; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "for config in json.load(open(sys.argv[1])).values():\n"
        "    config['train_batch_size'] = 6\n"  # 2 rows * 3 micro-batches on one process
        "    DeepSpeedConfig(config)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(GOLDEN)], check=True, timeout=300, capture_output=True)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("{zero_stage: 2, offload: {parameters: cpu}}", "offload.parameters needs zero_stage 3"),
        ("{zero_stage: 0, offload: {optimizer: cpu}}", "offload.optimizer needs zero_stage 1, 2 or 3"),
        ("{processes: 2, zero_stage: 0, expert_parallel_size: 2}", "expert_parallel_size needs zero_stage 1, 2 or 3"),
        ("{processes: 3}", "batch_size 8 is not divisible by 3 processes"),
        ("{zero_stage: 4}", "'parallel.zero_stage' is 4, but must be one of 0, 1, 2 or 3"),
    ],
)
def test_contradictory_settings_are_refused(section: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", [f"parallel={section}"])
    assert sentence in str(refused.value)


@pytest.mark.slow
def test_a_single_process_uses_neither_deepspeed_nor_scikit_learn(tmp_path: Path) -> None:
    """Without a `parallel` section, a run joins no process group and imports only `known` modules of align.parallel.

    scikit-learn, which transformers would import, is not imported, and transformers still finds it afterwards.
    """
    program = (
        "import importlib.util, sys\n"
        "from align.config import load_recipe\n"
        "from align.pipeline import run\n"
        "from pathlib import Path\n"
        "changes = ['stages.pretrain.max_steps=1', 'model.tokenizer.vocab_size=300']\n"
        "run(load_recipe('tiny', changes), Path(sys.argv[1]), only='pretrain')\n"
        "ours = {name for name in sys.modules if name.startswith('align.parallel.')}\n"
        "known = ('async_io', 'deepspeed_config', 'group', 'micro_batches', 'offload', 'sharding', 'steps')\n"
        "assert ours <= {f'align.parallel.{name}' for name in known}, ours\n"
        "import torch\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert 'sklearn' not in sys.modules\n"
        "from transformers.utils import is_sklearn_available\n"
        "assert is_sklearn_available() == bool(importlib.util.find_spec('sklearn'))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300, capture_output=True)
