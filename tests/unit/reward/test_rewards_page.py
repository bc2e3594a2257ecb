"""The example of docs/rewards.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from align.config.rewards import FunctionReward, Rewards
from align.errors import UserError
from align.reward.process import FunctionProcess, UserFunction

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = PAGE.split("<!-- example -->")[1]
    program, recipe = re.findall(r"```\w+\n(.*?)```", example, re.DOTALL)
    (tmp_path / "mine.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rewards = TypeAdapter(Rewards).validate_python(yaml.safe_load(recipe)["rewards"])
    found = {}
    with FunctionProcess() as functions:
        for reward in rewards:
            assert isinstance(reward, FunctionReward)
            file, _, name = reward.path.partition(":")
            function = UserFunction(reward.path, file, name, reward.batched, reward.timeout_s)
            rows = [{"source": "RFC 1"}, {"source": "RFC 2"}]
            found[name] = functions.score(function, ["p", "q"], ["see RFC 1", "no no no"], rows).scores
        cites = UserFunction("mine.py:cites", "mine.py", "cites", batched=False, timeout_s=20)
        with pytest.raises(UserError) as caught:
            functions.score(cites, ["p"] * 4, ["Water boils at"] * 4, [{"source": "W"}] * 3 + [{}])
    assert found == {"short": [-0.09, -0.08], "cites": [1.0, 0.0], "judged": [1.0, pytest.approx(1 / 3)]}
    assert str(caught.value) in PAGE


def test_the_recipe_at_the_top_is_one() -> None:
    block = re.search(r"\n    rewards:\n(      .*\n)+", PAGE)
    assert block is not None
    kinds = [r.kind for r in TypeAdapter(Rewards).validate_python(yaml.safe_load(block.group())["rewards"])]
    assert kinds == ["model", "remote", "function", "math"]
    table = {row.split("`")[1] for row in PAGE.splitlines() if re.match(r"\| `\w+` \| (?!for|texts|with)", row)}
    assert {"model", "remote", "function", "math", "exact", "regex", "format", "length"} <= table
