"""LoRA adapters under evaluation have the log-probabilities of stock PEFT, and are merged only when they are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from align.eval import Options, adapters, evaluate
from align.eval.evaluation import records_of
from align.models.hunyuan import HunYuanForCausalLM
from tests.unit.eval.local_tasks import make_tokenizer, save_checkpoint

CHOICES = ["the sea", "a red house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it by stock PEFT, and a task with one question."""
    folder = tmp_path_factory.mktemp("adapters")
    save_checkpoint(folder / "base")
    for seed, name in enumerate(("one", "two")):
        model = HunYuanForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        wrapped = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "o_proj"])
        )
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text(json.dumps({"q": "the dog ran to", "options": CHOICES, "a": 0}) + "\n")
    (folder / "task.yaml").write_text(
        'name: t\ndata: rows.jsonl\nprompt: "{{ q }}"\nchoices: options\nanswer: a\n', encoding="utf-8"
    )
    return folder


@torch.no_grad()
def by_peft(folder: Path, adapter: str) -> list[float]:
    """Log-probability of each choice."""
    base = HunYuanForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(base, folder / adapter).eval(), make_tokenizer()
    found = []
    for choice in CHOICES:
        prompt = tokenizer("the dog ran to")["input_ids"]
        whole = tokenizer(f"the dog ran to {choice}")["input_ids"]
        logprobs = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        found.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
    return found


def test_adapters_are_checkpoints_of_their_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges: list[Path] = []
    original = adapters.merge_adapter

    def merge(base: Path, config: object, adapter: Path, target: Path) -> object:
        merges.append(adapter)
        return original(base, config, adapter, target)

    monkeypatch.setattr(adapters, "merge_adapter", merge)
    options = Options(dtype="float32", backend="hf")
    tuned = {"one": folder / "one", "two": folder / "two"}
    out = tmp_path / "o"
    results = evaluate([folder / "base"], [str(folder / "task.yaml")], adapters=tuned, out=out, options=options)
    assert results.models == ["base", "one", "two"]
    found = {
        name: [record.logprob for record in sorted(records_of(results, name), key=lambda record: record.place)]
        for name in results.models
    }
    for name in tuned:
        assert found[name] == pytest.approx(by_peft(folder, name), abs=1e-4)
        assert found[name] != pytest.approx(found["base"], abs=1e-2)
    assert results.content["models"]["two"]["adapter"] == str(folder / "two")
    assert merges == [folder / "one", folder / "two"]
    assert not list(out.glob(".merged-*"))
    evaluate([folder / "base"], [str(folder / "task.yaml")], adapters=tuned, out=out, options=options, resume=True)
    assert len(merges) == 2  # all answers are recorded
