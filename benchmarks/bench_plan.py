"""The planner's peak memory against that of real runs of small models on a CPU, stage by stage.

Each case runs in new processes. Every allocation and release of torch's allocator is counted in order, so interpreter,
imports and fragmentation are not included; the peak over the steps is compared.

    python benchmarks/bench_plan.py             HunYuan, one process
    python benchmarks/bench_plan.py sharded     HunYuan, two and four processes
    python benchmarks/bench_plan.py families    other families, one process
    python benchmarks/bench_plan.py "sft, wide" one case
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))
import harness

from align.config import load_recipe
from align.config.parallel import Parallel
from align.config.parts import Optimizer
from align.config.presets import PRESETS
from align.config.recipe import BASE, Recipe
from align.parallel.deepspeed_config import deepspeed_config
from align.plan.job import Job, Member, jobs_of
from align.plan.memory import memory
from align.plan.setting import Setting, setting_of
from align.plan.shape import shape_of
from align.run.manifest import code_version
from tests.families.planned import peak_of

NARROW = {"num_hidden_layers": 4}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_experts": 16,
}
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    # model_type: values of its configuration. Tied embeddings; a mixture; latent attention with a shared expert and a
    # dense first layer; sinks, windows and biases of experts.
    "llama": SIZES | {"intermediate_size": 1024, "tie_word_embeddings": True},
    "qwen3_moe": SIZES | ROUTED | {"num_experts": 16, "head_dim": 32},
    "deepseek_v3": SIZES
    | ROUTED
    | {
        "intermediate_size": 512,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 64,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "gpt_oss": SIZES
    | {
        "head_dim": 32,
        "intermediate_size": 256,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}
LORA = {"rank": 8, "experts": False, "train_router": True}
STEPS = 3

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: (kind, model, changes to the stage)
    "pretrain, narrow": ("pretrain", NARROW, {}),
    "pretrain, wide": ("pretrain", WIDE, {}),
    "pretrain, wide, accumulation 2": ("pretrain", WIDE, {"batch_size": 16}),
    "pretrain, wide, checkpointing": ("pretrain", WIDE, {"gradient_checkpointing": True}),
    "sft, narrow": ("sft", NARROW, {}),
    "sft, wide": ("sft", WIDE, {}),
    "sft, wide, LoRA": ("sft", WIDE, {"lora": LORA}),
    "sft, wide, LoRA on experts": ("sft", WIDE, {"lora": {"rank": 8, "train_router": True}}),
    "reward_model, narrow": ("reward_model", NARROW, {}),
    "reward_model, wide": ("reward_model", WIDE, {}),
    "dpo, narrow": ("dpo", NARROW, {}),
    "dpo, wide": ("dpo", WIDE, {}),
    "dpo, wide, LoRA": ("dpo", WIDE, {"lora": LORA}),
    "ppo, narrow": ("ppo", NARROW, {}),
    "ppo, wide": ("ppo", WIDE, {}),
    "ppo, wide, checkpointing": ("ppo", WIDE, {"gradient_checkpointing": True}),
    "ppo, wide, average": ("ppo", WIDE, {"ema_decay": 0.9}),
}
OF_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{name}, {family}": (kind, {"model_type": family} | FAMILIES[family], {"lora": LORA} if name != kind else {})
    for family, names in {
        "llama": ("sft", "sft with LoRA", "reward_model", "dpo", "ppo"),
        "qwen3_moe": ("sft", "sft with LoRA", "dpo", "ppo"),
        "deepseek_v3": ("sft", "dpo", "ppo"),
        "gpt_oss": ("sft", "sft with LoRA", "dpo", "ppo"),
    }.items()
    for name, kind in ((name, name.split()[0]) for name in names)
}

SHARDED: dict[str, tuple[str, Setting]] = {
    # name: (dtype, setting); full fine-tuning of WIDE under DeepSpeed with the loss of the SFT stage
    name: (dtype, Setting(gpus, True, stage, ep, gradient_checkpointing="checkpointing" in name, micro_batch=8))
    for name, gpus, stage, ep, dtype in (
        ("2 processes, ZeRO-1", 2, 1, 1, "float32"),
        ("2 processes, ZeRO-2", 2, 2, 1, "float32"),
        ("2 processes, ZeRO-3", 2, 3, 1, "float32"),
        ("2 processes, ZeRO-3, bfloat16", 2, 3, 1, "bfloat16"),
        ("2 processes, ZeRO-3, checkpointing", 2, 3, 1, "float32"),
        ("2 processes, ZeRO-3, experts over 2", 2, 3, 2, "float32"),
        ("4 processes, ZeRO-2", 4, 2, 1, "float32"),
        ("4 processes, ZeRO-3", 4, 3, 1, "float32"),
        ("4 processes, ZeRO-3, bfloat16", 4, 3, 1, "bfloat16"),
        ("4 processes, ZeRO-3, experts over 2", 4, 3, 2, "float32"),
    )
}


GROUPS: dict[str, tuple[str, Iterable[str]]] = {
    "families": ("plan_families", OF_FAMILIES),
    "sharded": ("plan_sharded", SHARDED),
}
"""{argument: (file of the results, cases)}."""


def rows(kind: str) -> list[dict[str, Any]]:
    """Rows of one length, as the plan assumes. The sides of a pair begin differently, and most tokens have a loss.

    Sequences are longer than those for which attention on a CPU has code of its own, which stores its weights.
    """
    words, others = (" ".join(f"word{(i + start) % 7}" for i in range(14)) for start in (0, 1))
    answer, other = " ".join([words] * 6), " ".join([others] * 6)
    if kind == "pretrain":
        return [{"text": " ".join([words] * 600)}] * 4
    if kind == "ppo":
        return [{"prompt": answer, "reference": words}] * 64
    if kind == "sft":
        return [{"prompt": "word1", "completion": answer}] * 64
    return [{"prompt": "word1", "chosen": answer, "rejected": other}] * 64


def recipe_for(kind: str, model: dict[str, Any], changes: dict[str, Any], folder: Path, length: int) -> Recipe:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), encoding="utf-8")
    source = {"kind": "file", "path": str(data)}
    stage: dict[str, Any] = {"kind": kind, "batch_size": 8}
    if kind == "ppo":
        stage |= {
            "prompts": [source],
            "steps": STEPS,
            "max_prompt_length": length,
            "mini_batch_size": 8,
            "micro_batch_tokens": 8 * (length + 32),
            "epochs": 1,
            "rewards": [{"kind": "function", "path": "reference_f1"}],
            "rollout": {"engine": "huggingface", "max_new_tokens": 32, "max_model_length": length + 32},
        }
    else:
        stage |= {"data": {"train": [source], "max_length": length}, "micro_batch_size": 8, "max_steps": STEPS}
    tokenizer = {"vocab_size": 1024, "data": [{"kind": "python_docs", "view": "text", "limit": 200}]}
    sizes = {key: value for key, value in model.items() if key != "model_type"}
    of_family = {"model_type": model["model_type"]} if "model_type" in model else {"preset": "tiny"}
    values = {
        "name": "plan",
        "model": {"kind": "scratch", "config": sizes, "tokenizer": tokenizer} | of_family,
        "stages": {"measured": stage | changes},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_recipe(path)


def measure(case: str) -> dict[str, Any]:
    """Run the case's stage under torch's memory profiler."""
    from torch.profiler import ProfilerActivity, profile

    from align import pipeline
    from align.run.context import StageContext

    kind, model, changes = (CASES | OF_FAMILIES)[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draft = recipe_for(kind, model, changes, folder, 512)
        pipeline.run(draft, folder / "run", only=BASE, say=lambda line: None)
        length = longest_row(draft, folder) if kind != "pretrain" else 160
        recipe = recipe_for(kind, model, changes, folder, length)
        context = StageContext(recipe, "measured", folder / "run", say=lambda line: None)
        module, mark = ("align.recipes.ppo", "RunLog") if kind == "ppo" else ("align.train.fit", "count_parameters")
        stage = importlib.import_module(module)
        loaded: list[tuple[int, int]] = []
        call = getattr(stage, mark)  # called once the stage's models are loaded, before anything else

        def note_and_call(*arguments: Any, **named: Any) -> Any:
            loaded.append((time.time_ns(), live_tensor_bytes()))
            return call(*arguments, **named)

        setattr(stage, mark, note_and_call)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            pipeline.run_stage(context)
        (job,) = jobs_of(recipe, str(folder / "run" / BASE), None)
    # Weights come from mapped files, which the allocator does not see, so the count starts after they are loaded.
    return {"measured": peak_of(profiler, *loaded[0]), **planned(job, setting_of(job, recipe.parallel, 1))}


def measure_sharded(case: str) -> dict[str, Any]:
    """Largest peak of all ranks in three DeepSpeed steps of the SFT stage's loss; runs on each rank under torchrun."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from align.models.hunyuan import HunYuanConfig, HunYuanForCausalLM
    from align.parallel.engine import FunctionOfModel
    from align.parallel.experts import shard_experts
    from align.parallel.group import start_deepspeed
    from align.train.objectives import CrossEntropy
    from align.train.optimizer import build_optimizer
    from align.train.passes import Example, PackedPass, totals_of

    dtype, setting = SHARDED[case]
    start_deepspeed("gloo")
    torch.manual_seed(0)
    values = {**PRESETS["tiny"], **WIDE}
    model = HunYuanForCausalLM(HunYuanConfig(**values)).to(getattr(torch, dtype))
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    length, rows = 160, setting.micro_batch  # longer than the sequences for which attention on a CPU has its own code
    shard_experts(model, setting.expert_parallel_size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine, *_ = deepspeed.initialize(
            model=FunctionOfModel(model),
            optimizer=build_optimizer(model, Optimizer()),
            config=deepspeed_settings(setting, dtype),
        )
        start, now = time.time_ns(), live_tensor_bytes()
        mask = torch.arange(length) > 0
        for _ in range(STEPS):
            examples = [Example((torch.randint(0, values["vocab_size"], (length,)),), (mask,)) for _ in range(rows)]
            packed = PackedPass(examples, torch.device("cpu"))
            found = engine(CrossEntropy().measure, packed, totals_of(examples))
            engine.backward(found.loss)
            del found
            engine.step()
    peak = peak_of(profiler, start, now)
    peaks: list[Any] = [None] * setting.gpus
    dist.all_gather_object(peaks, peak)
    policy = Member("policy", shape_of("wide", values), "all")
    job = Job("measured", "sft", (policy,), dtype, rows * setting.gpus, rows, length)
    return {"measured": max(peaks), "ranks": peaks, **planned(job, setting)}


def deepspeed_settings(setting: Setting, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration for one setting."""
    parallel = Parallel(processes=setting.gpus, zero_stage=setting.zero_stage)
    return deepspeed_config(
        parallel, micro_batch_size=setting.micro_batch, accumulation=1, max_grad_norm=1.0, dtype=dtype
    )


def run_sharded(case: str) -> dict[str, Any]:
    """The run with the lowest peak of at most three; gloo's threads free buffers late, above all on a busy machine."""
    found = start_ranks(case)
    for _ in range(2):
        if found["measured"] > 1.02 * found["planned"]:
            found = min(found, start_ranks(case), key=lambda run: run["measured"])
    return found


def start_ranks(case: str) -> dict[str, Any]:
    """Start the ranks of one run; return the JSON that rank 0 prints."""
    ranks = str(SHARDED[case][1].gpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, __file__, case]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"measured"')]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[0])


def live_tensor_bytes() -> int:
    """Bytes of all tensor storages that Python can reach."""
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def longest_row(recipe: Recipe, folder: Path) -> int:
    """Tokens of the longest row, which becomes the stage's limit."""
    from align.data.prepare import prepare_dpo_pairs, prepare_prompts, prepare_reward_pairs, prepare_sft
    from align.train.checkpoint import load_tokenizer
    from align.train.steps import row_lengths

    tokenizer = load_tokenizer(folder / "run" / BASE / "model")
    stage: Any = recipe.stages["measured"]
    if stage.kind == "ppo":
        found, _ = prepare_prompts(stage.prompts, tokenizer, max_prompt_length=512, seed=0, stage_dirs={})
        return max(len(row.ids) for row in found)
    if stage.kind == "sft":
        data = prepare_sft(stage.data, tokenizer, assistant_only_loss=True, seed=0, stage_dirs={})
        return max(row_lengths(data.train))
    if stage.kind == "reward_model":
        return max(row_lengths(prepare_reward_pairs(stage.data, tokenizer, seed=0, stage_dirs={}).train))
    pairs = prepare_dpo_pairs(stage.data, tokenizer, seed=0, stage_dirs={}).train
    return max(len(ids) for ids in pairs["prompt_ids"]) + max(row_lengths(pairs))


def planned(job: Job, setting: Setting) -> dict[str, Any]:
    found = memory(job, setting, on_cpu=True)
    return {
        "planned": round(found.gpu_bytes),
        "moment": found.peak,
        "components": {name: round(size) for name, size in found.gpu.items()},
    }


def main() -> None:
    only = sys.argv[1] if len(sys.argv) > 1 else None
    if only not in (None, *GROUPS):
        case = sys.argv[1]
        found = measure_sharded(case) if case in SHARDED else measure(case)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        if case in SHARDED:
            from align.launch.ending import end_process

            end_process(0)
        return
    results, version = {}, code_version()
    name, cases = GROUPS[only] if only else ("plan", CASES)
    for case in cases:
        found = run_sharded(case) if case in SHARDED else harness.in_new_process(case)
        found["planned / measured"] = round(found["planned"] / found["measured"], 3)
        results[case] = found
        print(case, found["planned / measured"], found["moment"], flush=True)
        harness.write(name, results, option=only or "", show=False, version=version)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # With several threads, policy and critic of PPO would train in parallel, unlike on a GPU.
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
