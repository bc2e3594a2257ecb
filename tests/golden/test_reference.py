"""The model against outputs of the released reference code (see data/README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import align.models  # noqa: F401
from tests.near import assert_near

GOLDEN = Path(__file__).parent / "data"
EPS = torch.finfo(torch.float32).eps
NAMES = ["top1-cla2-tied", "top2-cla2-untied"]


@pytest.fixture(params=NAMES)
def case(request):
    folder = GOLDEN / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, load_file(folder / "golden.safetensors")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_loss_and_gradients(case, attention) -> None:
    _, model, golden = case
    model.set_attn_implementation(attention)
    ids, mask = golden["input_ids"].long(), golden["attention_mask"].long()
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    wanted = golden["logits"][mask.bool()]
    assert_near(output.logits[mask.bool()], wanted, units=64)
    assert output.loss.item() == pytest.approx(golden["loss"].item(), rel=16 * EPS)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key, norm in golden.items():
        if not key.startswith("grad_norm/"):
            continue
        gradient = published_gradient(key.removeprefix("grad_norm/"), gradients)
        smallest = EPS * max(value.item() for name, value in golden.items() if name.startswith("grad_norm/"))
        assert gradient.norm().item() == pytest.approx(norm.item(), rel=1e-4, abs=smallest), key


def published_gradient(name: str, gradients: dict) -> torch.Tensor:
    """The gradient of a parameter by its published name; experts are slices of stacked parameters."""
    expert = re.fullmatch(r"(.*mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if not expert:
        return gradients[name.replace("gate.wg", "gate")]
    prefix, index, part = expert.groups()
    if part == "down":
        return gradients[f"{prefix}.down_proj"][int(index)]
    return gradients[f"{prefix}.gate_up_proj"][int(index)].chunk(2)[part == "up"]


def test_selected_experts(case) -> None:
    _, model, golden = case
    mask = golden["attention_mask"].bool()
    output = model(golden["input_ids"].long(), attention_mask=mask.long(), output_router_logits=True)
    wanted = golden["selected_experts"].long()
    for layer, logits in enumerate(output.router_logits):
        chosen = logits.topk(wanted.shape[-1]).indices.view(*mask.shape, -1)
        assert torch.equal(chosen[mask].sort(-1).values, wanted[layer][mask].sort(-1).values)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(case, use_cache) -> None:
    _, model, golden = case
    for ids, mask, wanted in zip(golden["input_ids"].long(), golden["attention_mask"].bool(), golden["greedy_ids"]):
        prompt = ids[mask][: int(mask.sum()) // 2][None]
        wanted = wanted[wanted >= 0]
        tokens = model.generate(
            prompt,
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(tokens[0], wanted[: tokens.shape[1]].long())


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_of_a_padded_batch(case, side) -> None:
    """All rows in one batch: `generate` with left padding, one forward pass per token with right padding."""
    _, model, golden = case
    rows = [row[row >= 0].long() for row in golden["greedy_ids"]]
    prompts = [row[:-24] for row in rows]
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    if side == "left":
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert all(torch.equal(made[i, width:], row[-24:]) for i, row in enumerate(rows))
        return
    lengths = mask.sum(1)
    for step in range(24):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        token = logits[torch.arange(len(rows)), lengths - 1].argmax(-1)
        assert token.tolist() == [row[len(row) - 24 + step].item() for row in rows]
        ids, mask = (torch.nn.functional.pad(x, (0, 1)) for x in (ids, mask))
        ids[torch.arange(len(rows)), lengths], mask[torch.arange(len(rows)), lengths] = token, 1
        lengths = lengths + 1


def test_greedy_tokens_continued_from_a_cache(case) -> None:
    """One forward pass caches the prompt and 11 of the reference's 24 tokens; `generate` gets the 12th token and
    continues from the cache with the last 12."""
    _, model, golden = case
    for row in golden["greedy_ids"]:
        row = row[row >= 0].long()[None]
        known = row.shape[1] - 12
        with torch.no_grad():
            cache = model(row[:, : known - 1], use_cache=True).past_key_values
        made = model.generate(
            row[:, :known],
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(made, row)


@pytest.mark.parametrize("shards", ["50GB", "200KB"])
def test_saving_restores_the_published_layout(case, tmp_path, shards) -> None:
    folder, model, _ = case
    model.save_pretrained(tmp_path, max_shard_size=shards)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "200KB")
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    published = load_file(folder / "model.safetensors")
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in published)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    kept, given = (json.loads((f / "config.json").read_text()) for f in (tmp_path, folder))
    assert {k: kept.get(k) for k in given if k != "torch_dtype"} == {
        k: v for k, v in given.items() if k != "torch_dtype"
    }
