"""A run whose reward function fails midway resumes once it is fixed, and ends like an uninterrupted run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.errors import UserError
from align.pipeline import run
from tests.unit.rl.runs import lines, recipe

FUNCTION = """
from pathlib import Path
calls = 0
def score(prompts, completions, rows):
    global calls
    calls += 1
    if Path("fail").exists() and calls == 3:
        raise ConnectionError("the judge is gone")
    return [len(set(completion)) for completion in completions]
"""


def test_a_run_resumes_after_its_reward_function_was_fixed(
    tmp_path: Path, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTION, encoding="utf-8")
    scored = {"kind": "function", "path": "mine.py:score", "normalise": "running"}
    short = {"kind": "length", "max_tokens": 4, "buffer": 20}
    plan = recipe(tmp_path, rewards=[scored, short], checkpoint_every=1)
    uninterrupted, interrupted = start("uninterrupted"), start("interrupted")
    said: list[str] = []
    run(plan, uninterrupted, say=said.append)
    (tmp_path / "fail").touch()
    with pytest.raises(
        UserError, match=r"'mine.py:score' raised ConnectionError: the judge is gone \(mine.py line 8\)"
    ):
        run(plan, interrupted, say=said.append)
    assert len(lines(interrupted)) == 2
    (tmp_path / "fail").unlink()
    run(plan, interrupted, resume=True, say=said.append)
    assert "  resuming at step 2" in said
    values = r"score -?\d+\.\d{3}  KL -?\d+\.\d{3}  length \d+\.\d  memory \d+\.\d GiB  [\d,]+ tokens/s  0:\d\d"
    assert len([line for line in said if re.fullmatch(rf"  step 4/4  {values}", line)]) == 2  # of each finished run
    assert not [line for line in said if line.startswith("  step 1/4")]
    assert lines(interrupted) == lines(uninterrupted)
    assert len({line["reward/mine.py:score"] for line in lines(uninterrupted)}) > 1
