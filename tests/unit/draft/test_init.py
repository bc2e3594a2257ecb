"""`align init`: its recipes pass `align check`, for every shape of rows, stage and way to train."""

from __future__ import annotations

import json
import shlex
from itertools import product
from pathlib import Path

import pytest
import yaml

from align import cli
from align.config import load_recipe
from align.draft.data import KINDS, look_at
from align.draft.machine import Machine, ModelLook, look_at_model, read_this_machine
from align.draft.recipe import Draft, stages_for, text_of, too_small, trains_fully, write_recipe
from align.errors import UserError
from align.launch.nvidia import Gpu, NvidiaMachine

ANSWER = "It is the sum of the numbers. " * 10
ROWS = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]},
    "alpaca": {"instruction": "Add", "input": "1, 2", "output": ANSWER},
    "prompt_completion": {"prompt": "Hi", "completion": ANSWER},
    "preference": {"prompt": "Hi", "chosen": ANSWER, "rejected": "No."},
    "unpaired": {"prompt": "Hi", "completion": ANSWER, "label": True},
    "text": {"text": ANSWER},
    "token_ids": {"input_ids": list(range(100)), "labels": list(range(100))},
}
STAGES = {
    "messages": {"sft", "pretrain"},
    "alpaca": {"sft", "pretrain"},
    "prompt_completion": {"sft", "pretrain"},
    "preference": {"dpo", "reward_model", "kto"},
    "unpaired": {"kto"},
    "text": {"pretrain"},
    "token_ids": {"sft", "pretrain"},
}
"""{shape: the stages that train on it}, by docs/data.md."""
CPU = Machine(2, 0, 25.0, "CPU", False)
GPUS = Machine(64, 6, 80.0, "H100", True)


def write(folder: Path, shape: str, count: int = 50) -> str:
    rows = [json.dumps(ROWS[shape] | ({"label": n % 2 == 0} if shape == "unpaired" else {})) for n in range(count)]
    (folder / f"{shape}.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / f"{shape}.jsonl")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a small Llama without a chat template; its weights are 1 GB by their size."""
    folder = tmp_path / "base model"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    return folder


@pytest.mark.parametrize("shape", ROWS)
def test_shapes_are_recognised_and_offered_to_their_stages(shape: str, tmp_path: Path) -> None:
    look = look_at(write(tmp_path, shape))
    assert (look.shape, look.rows, look.whole) == (shape, 50, True)
    assert set(look.stages) == STAGES[shape]
    assert 90 <= look.tokens <= 110  # 300 characters, or 100 token ids


@pytest.mark.parametrize(
    ("shape", "stage"), [(shape, stage) for shape, stages in STAGES.items() for stage in sorted(stages)]
)
def test_every_draft_passes_the_check(shape: str, stage: str, tmp_path: Path, checkpoint: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = stages_for([look_at(write(tmp_path, shape))], [stage])
    models = [("owner/name", ModelLook()), (str(checkpoint), look_at_model(str(checkpoint)))]
    for number, (lora, machine, (model, look)) in enumerate(product((True, False), (CPU, GPUS), models)):
        out = tmp_path / f"{number}.yaml"
        write_recipe(out, text_of(Draft("run", model, look, data, machine, lora)))
        cli.main(["check", str(out), "--quiet"])
        settings = load_recipe(out).stages[stage]
        assert (settings.lora is not None) == lora
        assert settings.batch_size % max(1, machine.gpus) == 0


def test_files_go_to_the_stages_that_accept_them(tmp_path: Path, checkpoint: Path, monkeypatch, capsys) -> None:
    """Through the command; the stages run in their order, each from the one before."""
    monkeypatch.chdir(tmp_path)
    pairs, chats = write(tmp_path, "preference"), write(tmp_path, "messages")
    words = ["init", "my law.yaml", "--model", str(checkpoint), "--data", pairs, chats]
    cli.main([*words, "--stage", "dpo", "sft", "reward_model", "--gpus", "4", "--gpu", "h100", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["stages"] == {"sft": chats, "reward_model": pairs, "dpo": pairs}
    recipe = load_recipe("my law.yaml")
    assert [(name, stage.init_from) for name, stage in recipe.stages.items()] == [
        ("sft", "base"),
        ("reward_model", "sft"),
        ("dpo", "sft"),
    ]
    assert (recipe.name, recipe.parallel.processes, recipe.dtype) == ("my-law", 4, "bfloat16")
    assert recipe.model.add_tokens == ["<|im_start|>", "<|im_end|>"]
    for command in said["commands"]:  # they are valid commands on this recipe
        assert cli.parse(shlex.split(command)[1:])
    assert said["commands"][-1] == "align chat runs/my-law/dpo"


def test_nothing_is_overwritten(tmp_path: Path, capsys) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", str(out), "--model", "owner/name", "--data", write(tmp_path, "text")])
    assert ended.value.code == 2
    assert out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_a_recipe_that_does_not_pass_the_check_is_not_written(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    data = stages_for([look_at(write(tmp_path, "text"))], ["pretrain"])
    out = tmp_path / "recipe.yaml"
    with pytest.raises(UserError, match=r"recipe\.yaml: model\.path"):
        write_recipe(out, text_of(Draft("run", str(checkpoint), ModelLook(), data, CPU, lora=True)))
    assert not any(path.suffix == ".yaml" for path in tmp_path.iterdir())


def test_without_a_terminal_missing_flags_are_named(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["init"])
    assert ended.value.code == 2
    sentence = "align init: --model and --data are missing, and standard input is not a terminal. Pass them."
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_questions_in_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    """An invalid answer is requested again; an empty one selects the default."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "preference")
    answers = iter(["owner/name", "nowhere.jsonl", "preference.jsonl", "sft", "reward_model kto", "maybe", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    cli.main(["init"])
    assert next(answers, None) is None
    recipe = load_recipe("recipe.yaml")
    assert list(recipe.stages) == ["reward_model", "kto"]
    assert recipe.stages["kto"].init_from == "base"  # a reward model is no language model
    assert recipe.stages["kto"].lora is not None
    assert "'maybe' is neither yes nor no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "wanted", "problem"),
    [
        (["messages"], ["dpo"], "--stage dpo: no data for it"),
        (["messages", "preference"], ["sft"], "no stage uses its preference rows"),
    ],
)
def test_data_and_stages_that_do_not_fit(rows: list[str], wanted: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        stages_for([look_at(write(tmp_path, shape)) for shape in rows], wanted)


def test_prompts_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    with pytest.raises(UserError, match="prompts without answers"):
        look_at(str(tmp_path / "prompts.jsonl"))


def test_columns_with_other_names(tmp_path: Path, capsys, monkeypatch) -> None:
    """The error names the flag that the second call has."""
    monkeypatch.chdir(tmp_path)
    Path("qa.csv").write_text("question,answer\nHi,Hello\n")
    words = ["init", "--model", "owner/name", "--data", "qa.csv"]
    with pytest.raises(SystemExit):
        cli.main(words)
    flags = capsys.readouterr().err.partition("for example ")[2].strip().rstrip(".")
    assert flags == "--columns prompt=question completion=answer"
    cli.main([*words, *flags.split()])
    cli.main(["check", "recipe.yaml", "--quiet"])
    (source,) = load_recipe("recipe.yaml").stages["sft"].data.train
    assert source.columns == {"prompt": "question", "completion": "answer"}


def test_memory_decides_between_lora_and_all_weights(tmp_path: Path, checkpoint: Path) -> None:
    """0.5e9 parameters in bf16 need 8 GB for AdamW in fp32."""
    look = look_at_model(str(checkpoint))
    assert look == ModelLook(0.5e9, 256, False)
    assert trains_fully(look, Machine(2, 0, 14.0, "CPU", False))
    assert not trains_fully(look, Machine(2, 0, 13.0, "CPU", False))
    data = stages_for([look_at(write(tmp_path, "text"))], ["pretrain"])
    drafts = [Draft("run", "m", look, data, Machine(2, 0, 6.0, "CPU", False), lora) for lora in (True, False)]
    assert [too_small(draft) is None for draft in drafts] == [True, False]


def test_rows_are_not_longer_than_the_context(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 4000}) + "\n")
    data = stages_for([look_at(str(tmp_path / "long.jsonl"))], ["pretrain"])
    text = text_of(Draft("run", "m", look_at_model(str(checkpoint)), data, CPU, lora=True))
    assert yaml.safe_load(text)["stages"]["pretrain"]["data"]["max_length"] == 256


@pytest.mark.parametrize(
    ("shape", "stage", "count", "machine", "lora", "wanted"),
    [
        # 50 rows: an eighth of them per step, three epochs, a tenth held out; 4,096 tokens per pass are 4 rows.
        ("messages", "sft", 50, CPU, True, (6, 4, 2e-4, 3, 0.1, False)),
        # A pair has two sequences, so 2 pairs per pass.
        ("preference", "dpo", 50, CPU, True, (6, 2, 1e-5, 3, 0.1, False)),
        ("preference", "dpo", 50, CPU, False, (6, 2, 1e-6, 3, 0.1, False)),
        # 400 rows are not a small file. Six GPUs: the smallest multiple of 6 from 32, 6 pairs per GPU and step.
        ("preference", "dpo", 400, GPUS, True, (36, 6, 1e-5, 1, 0.05, True)),
        # Too few rows to hold some out.
        ("messages", "sft", 39, CPU, True, (4, 4, 2e-4, 3, 0, False)),
    ],
)
def test_the_numbers_of_a_draft(
    shape: str, stage: str, count: int, machine: Machine, lora: bool, wanted: tuple, tmp_path: Path
) -> None:
    data = stages_for([look_at(write(tmp_path, shape, count))], [stage])
    text = text_of(Draft("run", "m", ModelLook(), data, machine, lora, max_length=1024))
    found = yaml.safe_load(text)["stages"][stage]
    assert found["data"]["max_length"] == 1024
    assert (
        found["batch_size"],
        found["micro_batch_size"],
        float(found["optimizer"]["learning_rate"]),
        found["epochs"],
        found["data"].get("held_out_fraction", 0),
        found.get("gradient_checkpointing", False),
    ) == wanted


@pytest.mark.parametrize(
    ("shape", "stage", "template", "adds"),
    [
        ("messages", "sft", False, True),
        ("messages", "sft", True, False),
        ("messages", "sft", None, False),  # not known: the checkpoint is not on this machine
        ("text", "pretrain", False, False),
    ],
)
def test_a_template_is_added_to_a_tokenizer_without_one(
    shape: str, stage: str, template: bool | None, adds: bool, tmp_path: Path
) -> None:
    data = stages_for([look_at(write(tmp_path, shape))], [stage])
    found = yaml.safe_load(text_of(Draft("run", "m", ModelLook(template=template), data, CPU, lora=True)))
    assert ("add_tokens" in found["model"]) == adds
    assert found["stages"][stage]["lora"].get("train_embeddings", False) == adds


def test_the_length_is_that_of_long_rows_with_a_template(tmp_path: Path) -> None:
    """89 short rows and ten of 600 characters: 200 tokens and 64 of a template need 512, not 256. One row of 1,000,000
    characters is not a reason for a longer context, and the longer answer of a pair counts."""
    texts = ["short"] * 89 + ["x" * 600] * 10 + ["x" * 10**6]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    look = look_at(str(tmp_path / "texts.jsonl"))
    assert (look.tokens, look.length) == (200, 512)
    pair = {"prompt": "Hi", "chosen": "y" * 300, "rejected": "x" * 600}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    assert look_at(str(tmp_path / "pairs.jsonl")).tokens == 201


def test_the_size_of_a_model_in_float32(checkpoint: Path) -> None:
    """1 GB of weights: half a billion parameters in bf16, a quarter in fp32, whichever of the two keys has the type."""
    config = json.loads((checkpoint / "config.json").read_text())
    for key, kind, parameters in (
        ("dtype", "bfloat16", 5e8),
        ("torch_dtype", "bfloat16", 5e8),
        ("dtype", "float32", 2.5e8),
    ):
        own = {name: value for name, value in config.items() if name != "torch_dtype"} | {key: kind}
        (checkpoint / "config.json").write_text(json.dumps(own))
        assert look_at_model(str(checkpoint)).parameters == parameters


def test_several_gpus_train_what_one_does_not() -> None:
    """10e9 parameters need 160 GB: 60 % of four GPUs of 80 GB hold them, 60 % of one do not."""
    assert trains_fully(ModelLook(10e9), Machine(64, 4, 80.0, "H100", True))
    assert not trains_fully(ModelLook(10e9), Machine(64, 1, 80.0, "H100", True))


def test_the_smallest_and_oldest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine_of(*gpus: Gpu) -> Machine:
        monkeypatch.setattr("align.draft.machine.read_machine", lambda: NvidiaMachine(gpus))
        return read_this_machine()

    ampere, turing = Gpu(0, "A100", 81920, (8, 0)), Gpu(1, "T4", 16384, (7, 5))
    assert machine_of(ampere, ampere).bfloat16
    found = machine_of(ampere, turing)
    assert (found.gpus, found.bfloat16) == (2, False)
    assert found.memory_gb == pytest.approx(17.18, abs=0.01)  # 16 GiB
    assert machine_of().gpus == 0


def test_the_stages_of_the_command_are_those_of_drafts() -> None:
    from align.cli.init import STAGES as offered

    assert set(offered) == set(KINDS)
