"""Every stage on a tiny Qwen3-MoE model, with vLLM rollouts and routing replay, to a model for plain transformers.

`python -m tests.families --chain MODEL_TYPE` does the same for another family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.families.chain import check_chain
from tests.integration import forked

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def fork(words: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    process = forked.align(words, environment, libraries=forked.VLLM)
    output, _ = process.communicate(timeout=500)
    return process.wait(), output


def test_sampler_and_trainer_agree_in_every_stage(tmp_path: Path) -> None:
    mismatch = check_chain("qwen3_moe", tmp_path, fork)
    assert max(mismatch.values()) < 1e-5
