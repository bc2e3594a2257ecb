"""Arguments of `align serve-rollout`, and a recipe's server settings."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from align import cli
from align.config.rollout import Rollout
from align.errors import UserError
from align.rollout import started_server
from align.rollout.placement import Placement
from align.rollout.serve import _cores_per_rank, command_line, serve_settings
from align.rollout.started_server import StartedServer
from tests.integration.forked import replace_popen

PROMPTS = {"kind": "file", "path": "prompts.jsonl"}


def write_recipe(folder: Path, stages: dict) -> str:
    values = {"name": "r", "seed": 5, "model": {"kind": "pretrained", "path": "m"}, "stages": stages}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def ppo(**rollout) -> dict:
    rewards = [{"kind": "function", "path": "length"}]
    settings = {"max_new_tokens": 8, "max_model_length": 96} | rollout
    return {"kind": "ppo", "prompts": [PROMPTS], "max_prompt_length": 64, "rewards": rewards, "rollout": settings}


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128, "model_type": "hunyuan"}))
    return folder


def test_a_checkpoint_with_flags(tmp_path):
    stage = tmp_path / "sft"
    make_checkpoint(stage / "model")
    served = serve_settings(str(stage), None, None, {"max_model_length": 100, "cache_gib": None, "dtype": "bfloat16"})
    assert served.checkpoint == stage / "model"
    assert (served.rollout.max_model_length, served.rollout.cache_gib, served.dtype) == (100, None, "bfloat16")


def test_a_recipes_stage_with_its_settings(tmp_path):
    recipe = write_recipe(tmp_path, {"first": ppo(), "second": ppo(max_sequences=7) | {"init_from": "first"}})
    make_checkpoint(tmp_path / "run" / "base" / "model")
    make_checkpoint(tmp_path / "run" / "first" / "model")
    served = serve_settings(recipe, None, tmp_path / "run", {})
    assert served.checkpoint == tmp_path / "run" / "base" / "model"
    assert (served.seed, served.rollout.max_model_length, served.rollout.max_sequences) == (5, 96, 64)
    served = serve_settings(recipe, "second", tmp_path / "run", {"max_sequences": 9, "tensor_parallel_size": 2})
    assert served.checkpoint == tmp_path / "run" / "first" / "model"
    assert (served.rollout.max_sequences, served.rollout.tensor_parallel_size) == (9, 2)


def test_targets_that_cannot_be_served(tmp_path):
    recipe = write_recipe(tmp_path, {"first": ppo()})
    with pytest.raises(UserError, match=r"stage that generates completions\. Pass --stage with one of: first"):
        serve_settings(recipe, "sft", None, {})
    with pytest.raises(UserError, match="run that stage first"):
        serve_settings(recipe, None, tmp_path / "run", {})
    with pytest.raises(UserError, match="there is no such recipe file; check the path"):
        serve_settings(str(tmp_path / "nowhere.yaml"), None, None, {})
    folder = make_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match=r"--stage needs a recipe, but .* is a checkpoint\. Remove --stage\."):
        serve_settings(str(folder), "ppo", None, {})
    with pytest.raises(UserError, match=r"--cache-gib: input should be greater than 0\."):
        serve_settings(str(folder), None, None, {"cache_gib": -1.0})


def error_of(*arguments: str) -> str:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stopped:
        cli.main(["serve-rollout", *arguments])
    assert stopped.value.code == 2
    return error.getvalue()


def test_the_command_refuses_in_one_sentence(tmp_path):
    folder = str(make_checkpoint(tmp_path / "model"))
    assert "max_position_embeddings 128" in error_of(folder, "--max-model-length", "200")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: cannot listen there" in error_of(folder, "--max-model-length", "100", "--port", port)
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in error_of(str(tmp_path / "empty"))


def test_a_model_shorter_than_the_default(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    assert serve_settings(str(folder), None, None, {}).rollout.max_model_length == 128


def test_flags_of_vllm():
    options = {"max_model_len": 96, "enforce_eager": True, "enable_prefix_caching": False, "a": {"backend": "b"}}
    expected = ["--max-model-len", "96", "--enforce-eager", "--no-enable-prefix-caching", "--a", '{"backend": "b"}']
    assert command_line(options) == expected


def test_a_started_server_gets_every_setting(tmp_path):
    """The command's own parser reads the settings back."""
    rollout = Rollout(
        engine="remote",
        start_servers=1,
        max_model_length=100,
        max_sequences=3,
        cache_gib=0.25,
        tensor_parallel_size=2,
        prefix_caching=False,
        return_routing=True,
        weight_transfer="http",
    )
    place = Placement(["3"])
    server = StartedServer(tmp_path, rollout, dtype="bfloat16", seed=4, port=1234, placement=place)
    options = vars(cli.parse(server._command[3:]))
    assert {key: options[key] for key in ("port", "dtype", "seed", "weight_transfer", "host")} == {
        "port": 1234,
        "dtype": "bfloat16",
        "seed": 4,
        "weight_transfer": "host",
        "host": "127.0.0.1",
    }
    for name in ("max_model_length", "max_sequences", "cache_gib", "tensor_parallel_size", "prefix_caching"):
        assert options[name] == getattr(rollout, name)
    assert options["return_routing"] is True
    assert server._environment["CUDA_VISIBLE_DEVICES"] == "3"
    server.close()


@pytest.mark.slow
def test_the_error_of_a_server_that_cannot_start_has_the_reason(tmp_path, monkeypatch):
    """The server exits at once, because the folder has no weights: the engine does not wait for the start timeout."""
    from align.rollout.remote import RemoteEngine

    replace_popen(monkeypatch, started_server)
    folder = make_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128, "model_type": "llama"}))
    rollout = Rollout(engine="remote", start_servers=1, max_model_length=100)
    with pytest.raises(UserError, match=r"no rollout server responds: http://127\.0\.0\.1:\d+ \(it exited: "):
        RemoteEngine(folder, rollout, dtype="float32", seed=0)


def test_cores_of_each_rank(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert _cores_per_rank(2) == "0,1|2,3"
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7})
    assert _cores_per_rank(2) == "7|7"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "remote", "start_servers": 2, "weight_transfer": "ipc"},
            "rollout.weight_transfer: ipc supports one server with one GPU, but the recipe has more; use one "
            "server with one GPU, or set weight_transfer to auto",
        ),
        (
            {"engine": "remote"},
            "rollout.engine is remote, but neither servers nor start_servers is set; set one",
        ),
        (
            {"engine": "remote", "servers": ["http://a:1"], "start_servers": 1},
            "rollout.engine is remote, but both servers and start_servers are set; set one",
        ),
        (
            {"servers": ["http://a:1"]},
            "rollout.servers needs `engine: remote`; set it, or remove servers",
        ),
        (
            {"start_servers": 2},
            "rollout.start_servers needs `engine: remote`; set it, or remove start_servers",
        ),
        (
            {"tensor_parallel_size": 2},
            "rollout.tensor_parallel_size 2 needs `engine: remote`; set it, or remove tensor_parallel_size",
        ),
        (
            {"engine": "remote", "servers": ["localhost:8001"]},
            "rollout.servers: 'localhost:8001' is not a valid server URL; write it as http://HOST:PORT",
        ),
        (
            {"engine": "remote", "servers": ["http://a:1", "http://a:1"]},
            "rollout.servers lists a server twice; remove one of the two",
        ),
        (
            {"engine": "huggingface", "return_routing": True},
            "rollout.return_routing needs rollout.engine vllm or remote; change engine, or remove return_routing",
        ),
    ],
)
def test_contradictory_settings(changes, message):
    with pytest.raises(ValidationError) as error:
        Rollout(**changes)
    assert error.value.errors()[0]["msg"] == f"Value error, {message}"
