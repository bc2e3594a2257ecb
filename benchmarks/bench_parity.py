"""Outputs of align, align in vLLM, transformers and vLLM's own model against those of the released reference code.

The checkpoints are small and random, in the published layout (`--golden DIR`, or $ALIGN_GOLDEN, or ../shared/golden).
transformers and vLLM implement this family as `hunyuan_v1_moe`, so they load copies of the files with that model type.
Each row of the table is computed in a new process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import in_new_process, write
from safetensors.torch import load_file

CASES = ("top1-cla2-tied", "top2-cla2-untied")
GROWN = "align in vLLM against align in transformers"
DEFAULT = Path(__file__).parents[2] / "shared" / "golden"


def against(logits: torch.Tensor, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest differences of logits and of next-token log-probabilities, where the mask is 1."""
    mask = golden["attention_mask"].bool()
    difference = (logits - golden["logits"])[mask].abs().max().item()
    ours, theirs = (x.log_softmax(-1)[mask] for x in (logits, golden["logits"]))
    return {"logits": difference, "log-probabilities": (ours - theirs).abs().max().item()}


def greedy_rows(golden: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(prompt, the reference's 24 greedy tokens) of each row."""
    rows = [[t for t in row.tolist() if t >= 0] for row in golden["greedy_ids"]]
    return [(row[:-24], row[-24:]) for row in rows]


@torch.no_grad()
def in_transformers(folder: Path, golden: dict[str, torch.Tensor], model: Any) -> dict[str, Any]:
    ids, mask = golden["input_ids"].long(), golden["attention_mask"].long()
    found = against(model(ids, attention_mask=mask).logits, golden)
    same = total = 0
    for prompt, wanted in greedy_rows(golden):
        given = torch.tensor([prompt])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        same += sum(a == b for a, b in zip(made[0, len(prompt) :].tolist(), wanted, strict=True))
        total += 24
    return {**found, "greedy tokens": f"{same} of {total}"}


def align_row(folder: Path, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    from align.models.hunyuan import HunYuanForCausalLM

    return in_transformers(folder, golden, HunYuanForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def copied(folder: Path, target: Path) -> Path:
    """Copy the checkpoint without the reference's outputs, which vLLM would load as weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("golden.safetensors"))
    return target


def known_to_others(folder: Path, target: Path) -> Path:
    """Copy the checkpoint under the model type of transformers and vLLM."""
    copied(folder, target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "hunyuan_v1_moe", "architectures": ["HunYuanMoEV1ForCausalLM"]}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def transformers_row(folder: Path, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    from transformers import HunYuanMoEV1ForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        copy = known_to_others(folder, Path(temporary) / "model")
        model, info = HunYuanMoEV1ForCausalLM.from_pretrained(copy, dtype=torch.float32, output_loading_info=True)
    return {**in_transformers(folder, golden, model.eval()), "tensors not found": len(info["missing_keys"])}


def in_vllm(folder: Path, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 2**20,
        enable_prefix_caching=False,
    )
    rows = [r[m.bool()].tolist() for r, m in zip(golden["input_ids"], golden["attention_mask"], strict=True)]
    scored = llm.generate(
        [{"prompt_token_ids": row} for row in rows],
        SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    worst = 0.0
    for row, output, logits in zip(rows, scored, golden["logits"], strict=True):
        expected = logits[: len(row) - 1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        given = torch.tensor([p[t].logprob for p, t in zip(output.prompt_logprobs[1:], row[1:], strict=True)])
        worst = max(worst, (expected - given).abs().max().item())
    same = total = 0
    for prompt, wanted in greedy_rows(golden):
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        same += sum(a == b for a, b in zip(output.outputs[0].token_ids, wanted, strict=True))
        total += 24
    return {"log-probabilities": worst, "greedy tokens": f"{same} of {total}"}


def align_in_vllm_row(folder: Path, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        return in_vllm(copied(folder, Path(temporary) / "model"), golden)


def vllm_row(folder: Path, golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        return in_vllm(known_to_others(folder, Path(temporary) / "model"), golden)


@torch.no_grad()
def grown_row(folder: Path, _: Any) -> dict[str, Any]:
    """The quickstart's model, with random instead of zero down projections of the experts, in vLLM.

    The reference is align in transformers.
    """
    from transformers import AutoTokenizer

    from align.models.hot_start import convert_hot_start
    from align.models.hunyuan import HunYuanForCausalLM

    convert_hot_start("smollm2-135m-instruct", folder, experts=4, top_k=1, seed=0)
    model = HunYuanForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.normal_(std=0.02)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    texts = ["The standard library has a module for", "def fibonacci(n):", "A mixture of experts is a network in which"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    continued = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        prompt = ids[mask.bool()][None]
        continued.append(model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)[0])
    golden = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "logits": model(**batch).logits,
        "greedy_ids": torch.nn.utils.rnn.pad_sequence(continued, batch_first=True, padding_value=-1),
    }
    del model
    return in_vllm(folder, golden)


ROWS = {
    "align": align_row,
    "align in vLLM": align_in_vllm_row,
    "transformers hunyuan_v1_moe": transformers_row,
    "vLLM hunyuan_v1_moe": vllm_row,
}


def main() -> None:
    if len(sys.argv) == 4:  # one row, in a new process
        warnings.simplefilter("ignore")
        folder = Path(sys.argv[3])
        try:
            if sys.argv[1] == GROWN:
                found = grown_row(folder, None)
            else:
                found = ROWS[sys.argv[1]](folder, load_file(folder / "golden.safetensors"))
        except Exception as error:  # the reason why another library cannot run it is the result
            found = {"fails": str(error).strip().splitlines()[-1][:200]}
        print(json.dumps(found))
        return
    golden = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ALIGN_GOLDEN", DEFAULT))
    if not golden.is_dir():
        print(f"{golden}: the reference's outputs are not on this machine; nothing to compare")
        return
    results = {c: {row: in_new_process(row, c, str(golden / c)) for row in ROWS} for c in CASES}
    with tempfile.TemporaryDirectory() as temporary:
        grown = in_new_process(GROWN, GROWN, str(Path(temporary) / "model"))
    write("parity", {**results, "SmolLM2 as the quickstart grows it": {GROWN: grown}})


if __name__ == "__main__":
    main()
