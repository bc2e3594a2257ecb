"""`align check` accepts and refuses the same recipes as `align run`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli import main
from align.config import load_recipe
from align.config.parts import FileSource
from align.config.recipe import Recipe
from align.config.stages import TrainingStage
from align.errors import UserError
from align.launch import processes as launch


def test_overrides_are_checked_with_the_recipe(capsys) -> None:
    main(["check", "tiny", "stages.dpo.beta=0.2"])
    assert capsys.readouterr().out.splitlines()[0] == "tiny: ok"
    with pytest.raises(SystemExit) as ended:
        main(["check", "tiny", "quickstart", "stages.dpo.beta=-1"])
    problems = capsys.readouterr().err
    assert ended.value.code == 2
    assert problems.count("stages.dpo.beta") == 2


def test_overrides_without_a_recipe_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "stages.dpo.beta=0.2"])
    assert ended.value.code == 2
    assert "overrides but no recipe; add the name or file of a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("stages.sft.bach_size=8", "did you mean 'batch_size'?"),
        ("stages.sft.max_length=8", "did you mean 'data.max_length' or 'evaluate.max_length'?"),
        ("stages.ppo.learning_rate=1e-4", "did you mean 'critic.learning_rate' or 'optimizer.learning_rate'?"),
        ("stages.ppo.estimator_kind=grpo", "known keys are advantage_estimator, batch_size"),
        ("stages.dpo.lora.r=8", "known keys are alpha, attention, dora, dropout, experts, groups, init, layers"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(change: str, hint: str) -> None:
    """The suggestion is a similar key, or the key in another section. A dissimilar key is never suggested, since it
    sets something else."""
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [change])
    assert hint in str(error.value)


@pytest.mark.parametrize("processes", [3, 5, 32])
def test_uneven_batches_are_reported_for_all_stages_with_valid_values(processes: int) -> None:
    """The recipe is accepted with the suggested values."""
    wanted = [f"parallel.processes={processes}"]
    with pytest.raises(UserError) as error:
        load_recipe("tiny", wanted)
    lines = str(error.value).splitlines()
    named = [re.search(r"stages\.(\w+): .* processes .*; set batch_size to (\d+),", line) for line in lines]
    assert [match[1] for match in named if match] == ["pretrain", "sft", "reward_model", "dpo"]
    load_recipe("tiny", wanted + [f"stages.{match[1]}.batch_size={match[2]}" for match in named if match])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_first_recipes_run_on_one_two_and_four_processes(processes: int, capsys) -> None:
    main(["check", "tiny", "quickstart", "--nproc", str(processes)])
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert said == ["tiny: ok", "quickstart: ok"]


def test_a_forward_pass_has_the_tokens_of_full_rows_by_default() -> None:
    stage = load_recipe("tiny").stages["dpo"]
    assert isinstance(stage, TrainingStage)
    assert (stage.micro_batch_size, stage.data.max_length) == (16, 128)
    assert stage.pass_tokens == 16 * 2 * 128  # a pair has two sequences
    assert stage.model_copy(update={"micro_batch_tokens": 500}).pass_tokens == 500


DENSE = "model={kind: scratch, preset: tiny, tokenizer: ./nowhere, config: {num_experts: 1}}"
LAYERS = "model={kind: scratch, preset: tiny, tokenizer: ./nowhere, config: {num_experts: [8, 6, 1, 8, 5]}}"


@pytest.mark.parametrize(
    ("recipe", "size", "changes", "told"),
    [
        ("tiny", 4, [], None),  # the preset has 8
        ("tiny", 16, [], 8),
        ("tiny", 16, ["model.config.num_experts=16"], None),
        ("tiny", 16, [DENSE], None),
        ("tiny", 4, [LAYERS], 6),  # the preset has four layers, so the fifth number is ignored
        ("quickstart", 4, [], None),
        ("quickstart", 8, [], 4),
        ("quickstart", 8, ["model.experts=8"], None),
        ("quickstart", 8, ["model.path=./nowhere"], "unknown key"),
    ],
)
def test_uneven_experts_are_reported_without_a_checkpoint(
    recipe: str, size: int, changes: list[str], told: int | str | None, capsys
) -> None:
    """The recipe alone determines the number of experts. The expected numbers are counted by hand."""
    batches = [f"stages.{stage}.batch_size=16" for stage in ("sft", "reward_model", "dpo")]
    batches += ["stages.pretrain.batch_size=16"] if recipe == "tiny" else []
    words = ["check", "--without-files", recipe, f"parallel={{processes: 16, expert_parallel_size: {size}}}"]
    if told is None:
        main([*words, *batches, *changes])
        assert capsys.readouterr().out.splitlines()[0] == f"{recipe}: ok"
        return
    with pytest.raises(SystemExit):
        main([*words, *batches, *changes])
    sentence = (
        f"parallel.expert_parallel_size {size} does not divide the {told} experts of the recipe's model; set it to "
    )
    said = capsys.readouterr().err
    assert told in said if isinstance(told, str) else said.startswith(f"{recipe}: {sentence}")


@pytest.mark.parametrize(("processes", "experts", "sizes"), [(16, 8, [1, 2, 4, 8]), (6, 8, [1, 2]), (6, 7, [1])])
def test_valid_expert_parallel_sizes_are_suggested(processes: int, experts: int, sizes: list[int], capsys) -> None:
    """Exactly the suggested sizes are accepted."""
    changes = [f"stages.{stage}.batch_size={processes}" for stage in ("pretrain", "sft", "reward_model", "dpo")]
    changes += [f"model.config.num_experts={experts}", f"parallel.processes={processes}"]
    words = ["check", "--without-files", "tiny", *changes]
    with pytest.raises(SystemExit):
        main([*words, f"parallel.expert_parallel_size={processes}"])
    told = re.search(r"; set it to ([0-9, or]+)\.$", capsys.readouterr().err)
    assert told is not None
    assert [int(number) for number in re.findall("[0-9]+", told[1])] == sizes
    for size in range(1, processes + 1):
        if size in sizes:
            main([*words, f"parallel.expert_parallel_size={size}"])
        else:
            with pytest.raises(SystemExit):
                main([*words, f"parallel.expert_parallel_size={size}"])


def test_a_wrong_number_of_processes_does_not_limit_the_suggested_sizes(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--without-files", "tiny", "parallel.expert_parallel_size=16"])
    processes, experts = capsys.readouterr().err.splitlines()
    assert "the number of processes, 1 (parallel.processes, --nproc); set it to a divisor" in processes
    assert experts.endswith("the 8 experts of the recipe's model; set it to 1, 2, 4 or 8.")


WITHOUT_TORCH = """
import sys
from align.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("command", [["check"], ["plan", "--gpu", "h100"], ["run", "--nproc", "2"]])
def test_all_unknown_keys_of_a_configuration_are_reported_without_torch(command: list[str], tmp_path) -> None:
    words = [*command, "tiny", "model.config={head_dim: 3, xyz: 4, num_experts: 4}"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "'head_dim' is not a key of HunYuanConfig; write 'attention_head_dim'" in done.stderr
    assert "'xyz' is not a key" in done.stderr
    assert "num_experts" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_a_kind_is_a_file() -> None:
    source = load_recipe("tiny", ["stages.sft.data.train=[{path: rows.jsonl}]"]).stages["sft"].data.train[0]
    assert isinstance(source, FileSource)
    assert Recipe.model_validate_json(load_recipe("tiny").model_dump_json()) == load_recipe("tiny")


def checkpoint(folder: Path, **config: object) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("where", ["model.path", "stages.dpo.init_from", "stages.ppo.rewards.0.init_from"])
@pytest.mark.parametrize("inside", ["", "model"])
def test_experts_of_a_checkpoint_on_this_machine_are_counted(tmp_path: Path, capsys, where: str, inside: str) -> None:
    """The path names a checkpoint or a stage's folder. With --without-files, config.json is not read."""
    path = recipe_with(tmp_path, rewards=[{"kind": "model", "init_from": checkpoint(tmp_path / "six", num_experts=6)}])
    eight = tmp_path / "eight"
    checkpoint(eight / inside, num_experts=8)
    words = ["check", path, f"{where}={eight}", "parallel={processes: 6, expert_parallel_size: 6}"]
    words.append("stages.dpo.batch_size=6")
    with pytest.raises(SystemExit):
        main(words)
    field = "stages.ppo.rewards" if "rewards" in where else where
    owner = "the recipe's model" if where == "model.path" else f"the model of {field}"
    sentence = f"parallel.expert_parallel_size 6 does not divide the 8 experts of {owner}; set it to 1 or 2."
    assert capsys.readouterr().err == f"{path}: {sentence}\n"
    main([*words, "--without-files"])


def test_expert_parallelism_does_not_concern_evaluation(tmp_path: Path, capsys) -> None:
    path = recipe_with(tmp_path, rewards=[{"kind": "model", "init_from": checkpoint(tmp_path / "two", num_experts=2)}])
    evaluate = "{kind: evaluate, models: [base], prompts: [{kind: file, path: " + str(tmp_path / "rows.jsonl") + "}]}"
    words = [f"model.path={checkpoint(tmp_path / 'nine', num_experts=9)}", f"stages={{evaluate: {evaluate}}}"]
    main(["check", path, *words, "parallel={processes: 2, expert_parallel_size: 2}"])
    assert capsys.readouterr().out == f"{path}: ok\n"


def test_problems_are_reported_before_ranks_are_started(tmp_path: Path, capsys, monkeypatch) -> None:
    for name in launch.PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("ranks are started"))
    path = recipe_with(tmp_path)
    (tmp_path / "hosts").write_text("here slots=3\n")
    two = checkpoint(tmp_path / "two", num_experts=2)
    offload = f"offload: {{optimizer: nvme, path: {tmp_path / 'nowhere'}}}"
    parallel = f"{{processes: 4, expert_parallel_size: 4, hostfile: {tmp_path / 'hosts'}, {offload}}}"
    with pytest.raises(SystemExit) as ended:
        main(["run", path, "--run-dir", str(tmp_path / "run"), f"model.path={two}", f"parallel={parallel}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "it has 3 slots, but parallel.processes is 4" in said
    assert f"nowhere does not exist (paths are relative to {Path.cwd()})" in said
    assert "does not divide the 2 experts of the recipe's model" in said
    assert not (tmp_path / "run").exists()


def recipe_with(tmp_path: Path, **ppo: object) -> str:
    """Write a recipe with a model on the hub and pairs from an earlier stage; return its path.

    ppo: settings of its PPO stage.
    """
    prompts = [{"kind": "file", "path": str(tmp_path / "rows.jsonl")}]
    stages = {
        "pairs": {"kind": "sample", "train": prompts},
        "dpo": {"kind": "dpo", "data": {"train": [{"kind": "stage", "stage": "pairs"}]}},
        "ppo": {"kind": "ppo", "prompts": prompts, "rewards": [{"kind": "length", "max_tokens": 8}], **ppo},
    }
    content = {"name": "t", "model": {"kind": "pretrained", "path": "owner/name"}, "stages": stages}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(tmp_path / "t.yaml")


def test_results_of_earlier_stages_and_hub_models_are_not_required(tmp_path: Path, capsys) -> None:
    """The file of a reward function must exist, but is not run."""
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    reward = {"kind": "function", "path": f"{tmp_path / 'mine.py'}:score"}
    path = recipe_with(tmp_path, rewards=[reward, {"kind": "function", "path": "reference_f1"}])
    main(["check", path])
    assert capsys.readouterr().out == f"{path}: ok\n"


def test_everything_missing_is_reported_at_once(tmp_path: Path, capsys) -> None:
    rewards = [{"kind": "function", "path": "absent.py:score"}, {"kind": "model", "init_from": "./absent-model"}]
    path = recipe_with(tmp_path, rewards=rewards, init_from="./absent-parent")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["check", path, "model.path=./absent-base"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    things = ("./absent-base", "rows.jsonl", "rows.jsonl", "./absent-parent", "./absent-model", "absent.py")
    assert len(told) == len(things)
    assert all(thing in line for thing, line in zip(things, told, strict=True))
    main(["check", "--without-files", "--json", path])
    assert json.loads(capsys.readouterr().out) == {path: {"ok": True, "error": None}}
