"""Use the additions of docs/extending.md. `test_extending.py` runs this in a process that imports the extended copy."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter

import align
from align.config import load_recipe
from align.config.ppo import PpoStage
from align.config.rewards import Rewards

ROOT = Path(align.__file__).parents[1]
assert Path.cwd() == ROOT, (Path.cwd(), ROOT)
PROMPTS = [{"kind": "file", "path": "prompts.jsonl"}]


def check_preference_loss() -> None:
    from align.losses.preference import preference_loss

    # One pair by hand: h(w) = -0.5, h(l) = -1, so the margin is -0.5 + 1 - 5 * 0.5 = -2 and beta * margin is -0.2.
    names = ("chosen_logprobs_B", "rejected_logprobs_B", "ref_chosen_logprobs_B", "ref_rejected_logprobs_B")
    tensors = dict(zip(names, map(torch.tensor, ([-2.5], [-5.0], [-2.0], [-4.0]))))
    loss, _ = preference_loss("dpop", tensors, {"beta": 0.1})
    assert math.isclose(loss, math.log(1 + math.exp(0.2)), rel_tol=1e-6)


def check_policy_loss_and_estimator() -> None:
    from align.losses.advantages import ADVANTAGE_ESTIMATORS, EstimatorInputs
    from align.losses.ppo import POLICY_LOSSES

    stage = PpoStage.model_validate(
        {
            "kind": "ppo",
            "policy_loss": "reinforce",
            "advantage_estimator": "opo",
            "completions_per_prompt": 2,
            "prompts": PROMPTS,
            "rewards": [{"kind": "math"}],
        }
    )
    # Scores 1 and 0 of lengths 1 and 3: the baseline is 1/4.
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    rewards = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    inputs = EstimatorInputs(rewards, mask, values=None, group_size=2, gamma=1.0, lam=1.0, value_lam=None, whiten=False)
    advantages, returns = ADVANTAGE_ESTIMATORS[stage.advantage_estimator](inputs)
    torch.testing.assert_close(advantages, torch.tensor([[0.75, 0, 0], [-0.25, -0.25, -0.25]]))
    assert returns is None
    logprobs = torch.tensor([[-1.0, 0, 0], [-2, -2, -2]], requires_grad=True)
    loss, _ = POLICY_LOSSES[stage.policy_loss](
        logprobs, logprobs.detach(), advantages, mask, clip_range=0.2, clip_range_high=None, weights=None, count=4
    )
    loss.backward()
    assert math.isclose(loss, (0.75 - 1.5) / 4, rel_tol=1e-6)
    torch.testing.assert_close(logprobs.grad, -advantages / 4)


def check_verifier() -> None:
    from align.reward.verifiers import VERIFIERS, Sample

    (reward,) = TypeAdapter(Rewards).validate_python([{"kind": "keywords", "words": ["Water", "ice"]}])
    texts = ["Ice is water.", "Water boils.", "steam"]
    scores = [VERIFIERS[type(reward)](reward, Sample(text, {}, 5)) for text in texts]
    assert scores == [1.0, 0.5, 0.0]


def check_task() -> None:
    from align.eval.tasks import built_in_tasks

    task = built_in_tasks()["stdlib"]
    assert (task.name, task.temperature, len(task.prompts), len(task.metrics)) == ("stdlib", 0.0, 1, 1)


def check_stage_and_family(folder: Path) -> None:
    """A recipe averages two checkpoints of the new family. The expected logits are those of transformers' Mixtral."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    from align.config.parts import FileSource
    from align.data.tokenizer import corpus, train_tokenizer
    from align.models.mix.modeling import MixConfig, MixForCausalLM
    from align.pipeline import run
    from align.train.checkpoint import load_policy

    (folder / "text.jsonl").write_text(json.dumps({"text": "To be or not to be."}) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(corpus([FileSource(path=str(folder / "text.jsonl"))], seed=0), 300)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        MixForCausalLM(MixConfig(**sizes, num_experts=4)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    stored = [load_file(folder / name / "model.safetensors") for name in ("one", "two")]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in stored[0]

    witness = MixtralForCausalLM(
        MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6)
    )
    witness.save_pretrained(folder / "mixtral")
    config = MixConfig(**sizes, num_experts=4).to_dict() | {"architectures": ["MixForCausalLM"]}
    (folder / "mixtral" / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder / "mixtral")(ids).logits
        torch.testing.assert_close(ours, witness.eval()(ids).logits, rtol=1e-4, atol=1e-5)

    recipe = {
        "name": "average",
        "model": {"kind": "pretrained", "path": str(folder / "one")},
        "stages": {"average": {"kind": "average", "models": ["base", str(folder / "two")]}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(load_recipe(folder / "recipe.yaml"), folder / "run", say=lambda line: None)
    mean = load_policy(folder / "run" / "average" / "model", "float32")
    found = load_file(folder / "run" / "average" / "model" / "model.safetensors")
    assert type(mean) is MixForCausalLM
    assert found.keys() == stored[0].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, (stored[0][name] + stored[1][name]) / 2, rtol=1e-5, atol=1e-7)


check_preference_loss()
check_policy_loss_and_estimator()
check_verifier()
check_task()
with tempfile.TemporaryDirectory() as scratch:
    check_stage_and_family(Path(scratch))
print("7 extensions work")
