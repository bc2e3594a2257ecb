"""`align plan`: published requirements, printed lines, errors for bad input, no heavy imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.config import load_recipe
from align.config.presets import PRESETS
from align.errors import UserError
from align.plan.command import Options, plan_recipe
from align.plan.job import Job, jobs_of
from align.plan.memory import memory
from align.plan.report import overrides
from align.plan.search import SMALL_LORA, changed, evaluate, feasible, joint, micro_batches, remedies
from align.plan.setting import GB, Cluster, Setting, setting_of, unusable
from align.plan.shape import shape_of
from align.plan.speed import GPUS

ROOT = Path(__file__).parents[3]
H20 = GPUS["h20"].rates


def large(*overrides: str) -> dict[str, Job]:
    recipe = load_recipe("hunyuan-large", overrides)
    return {job.name: job for job in jobs_of(recipe, "hunyuan-large", None)}


def h20(hosts: int, host_gb: float = 2000) -> Cluster:
    return Cluster(8 * hosts, hosts, 96 * GB, host_gb * GB)


def fits(job: Job, cluster: Cluster) -> bool:
    return bool(feasible(replace(job, batch=cluster.gpus), cluster, H20))


# --- facts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_gb", [2000, 2300])
def test_full_fine_tuning_of_hunyuan_large_takes_32_gpus(host_gb: float) -> None:
    # Tencent's README, for ZeRO-3 with offload, 2048 tokens and H20 GPUs (96 GB): at least 32 GPUs.
    job = large()["sft"]
    assert job.length == 2048
    assert [fits(job, h20(hosts, host_gb)) for hosts in (1, 2, 3, 4)] == [False, False, False, True]
    assert all(plan.setting.offload_optimizer for plan in feasible(replace(job, batch=32), h20(4, host_gb), H20))


def test_lora_of_hunyuan_large_takes_8_gpus_and_offload() -> None:
    # The same README: at least 8 GPUs. The weights alone (2 x 388.7e9 bytes) exceed 8 x 96 GB, so they are offloaded.
    plans = feasible(replace(large()["sft"].with_lora(SMALL_LORA), batch=8), h20(1), H20)
    assert plans
    assert all(plan.setting.offload_parameters == "cpu" for plan in plans)


def test_ppo_of_hunyuan_large_has_a_plan() -> None:
    (job,) = (job for name, job in large().items() if name == "ppo")
    plan = feasible(job, h20(16), H20)[0]
    assert plan.fits
    assert plan.memory.gpu_bytes + 4 * GB <= 96 * GB
    assert {member.role for member in job.members} == {"policy", "critic", "reference", "reward model"}
    # policy, critic, reference and reward model are sharded over all GPUs, or offloaded
    weights = sum(size for name, size in (plan.memory.gpu | plan.memory.host).items() if name.endswith(" weights"))
    assert weights * 128 > 4 * 2 * 388e9


def test_the_smallest_change_is_found() -> None:
    cluster = h20(1)
    job = large("parallel.expert_parallel_size=8")["sft"]
    recipe = load_recipe("hunyuan-large", ["parallel.expert_parallel_size=8"])
    plan = evaluate(job, setting_of(job, recipe.parallel, 8), cluster, H20)
    assert [short.where for short in plan.shortages] == ["GPU", "host"]
    found = {remedy.name: remedy for remedy in remedies(job, plan.setting, cluster, H20)}
    assert found["more GPUs"].plan.setting.gpus == 32
    assert found["more GPUs"].changes == 1
    assert found["LoRA on attention"].plan.fits
    assert "other settings" not in found


def test_a_remedy_changes_as_little_as_possible() -> None:
    job = large()["sft"]
    wanted = Setting(64, True, 1, 16, None, None, True, 1)
    plan = evaluate(job, wanted, h20(8), H20)
    assert not plan.fits
    (near,) = (remedy.plan for remedy in remedies(job, wanted, h20(8), H20) if remedy.name == "other settings")
    everything = feasible(job, h20(8), H20)
    assert len(changed(near.setting, wanted)) == min(
        len(changed(replace(p.setting, micro_batch=1), wanted)) for p in everything
    )


NVME = "offload: {optimizer: nvme, parameters: cpu, path: /scratch}"


@pytest.mark.parametrize("written", [[], [f"parallel={{processes: 8, expert_parallel_size: 8, {NVME}}}"]])
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_recipe_with_the_proposed_changes_has_the_planned_setting(written: list[str], stage: str) -> None:
    """A small model fits with and without offloading, expert parallelism and NVMe, so the search finds all of them."""
    (job,) = jobs_of(load_recipe("hunyuan-large", written), "small", stage)
    plans = feasible(job, Cluster(8, 1, 96 * GB, 2000 * GB, nvme=4000 * GB), H20)
    kinds = {
        (s.zero_stage, s.expert_parallel_size, s.offload_optimizer, s.offload_parameters, s.rollout_gpus): plan
        for plan in plans
        for s in [plan.setting]
        if s.zero_stage  # only ZeRO stages 1 to 3
    }
    named = [(3, 1, None, None, 1), (1, 8, "cpu", None, 1), (3, 2, None, "nvme", 1)]
    for plan in (*(kinds[name] for name in named), *list(kinds.values())[::5]):
        recipe = load_recipe("hunyuan-large", [*written, *overrides(plan)])
        (again,) = jobs_of(recipe, "small", stage)
        assert setting_of(again, recipe.parallel, 8) == replace(
            plan.setting, rollout_gpus=again.rollouts.gpus_per_server if again.rollouts else 1
        )


def test_one_process_without_deepspeed_is_proposed_without_the_section() -> None:
    (job,) = jobs_of(load_recipe("hunyuan-large"), "small", "sft")
    plan = next(plan for plan in feasible(job, Cluster(1, 1, 96 * GB), H20) if not plan.setting.deepspeed)
    assert load_recipe("hunyuan-large", overrides(plan)).parallel is None


def test_reward_models_are_sharded() -> None:
    # 388.7e9 weights of two bytes, sharded over 128 ranks. A reward server takes no memory on the planned GPUs.
    setting = Setting(128, True, 3, 16)
    sharded = memory(large()["ppo"], setting)
    weights = 2 * 388.7e9 / 128
    assert sharded.gpu["reward model weights"] == pytest.approx(weights, rel=1e-3)
    remote = memory(large("stages.ppo.rewards=[{kind: remote, url: 'http://127.0.0.1:8100'}]")["ppo"], setting)
    assert sharded.gpu_bytes - remote.gpu_bytes == pytest.approx(weights, rel=1e-3)
    assert "reward model" not in " ".join(remote.phases[remote.peak])


def test_a_reward_model_larger_than_the_policy_can_be_the_peak() -> None:
    # The policy is tiny and has LoRA adapters, so memory peaks in the forward pass of the frozen reward model.
    lora = ["stages.ppo.lora={}", "stages.ppo.advantage_estimator=grpo", "stages.ppo.completions_per_prompt=4"]
    job = large(*lora)["ppo"]
    policy, *others = job.members
    small = replace(job, members=(replace(policy, shape=shape_of("tiny", PRESETS["tiny"])), *others))
    assert memory(small, Setting(128, True, 3, 1)).peak == "reward model: frozen forward"


def test_ema_weights_are_counted() -> None:
    # 388.7e9 weights of four bytes, sharded over 128 ranks. They are stored with the moments, on the GPU or the host.
    plain, ema = (large(*change)["ppo"] for change in ([], ["stages.ppo.ema_decay=0.9"]))
    for place in (None, "cpu"):
        setting = Setting(128, True, 3, 16, offload_optimizer=place)
        one, other = memory(plain, setting), memory(ema, setting)
        more = [other.gpu_bytes - one.gpu_bytes, other.host_bytes - one.host_bytes]
        assert more[place == "cpu"] == pytest.approx(4 * 388.7e9 / 128, rel=1e-3)
        assert more[place != "cpu"] == 0


def test_ranks_of_ppo_may_have_unequal_shares() -> None:
    job = large("stages.ppo.mini_batch_size=128", "stages.ppo.batch_size=512")["ppo"]
    plans = feasible(job, Cluster(96, 12, 140 * GB, 2000 * GB), H20)
    assert all(plan.setting.accumulation(job) * plan.setting.micro_batch * 96 >= 128 for plan in plans)
    # 128 completions on 96 ranks: a third of the ranks has two, the others have one.
    assert micro_batches(job, 96) == [2, 1]
    assert {plan.setting.micro_batch for plan in plans} <= {1, 2}
    assert all(unusable(job, plan.setting) is None for plan in plans)
    assert unusable(large()["sft"], plans[0].setting) is not None


def test_what_search_lists_fits_and_is_ordered() -> None:
    plans = feasible(large()["dpo"], h20(8), H20)
    assert all(plan.fits for plan in plans)
    assert [plan.duration.seconds for plan in plans] == sorted(plan.duration.seconds for plan in plans)
    assert len({plan.setting for plan in plans}) == len(plans)


def test_one_section_serves_all_stages() -> None:
    plans = joint(list(large().values()), h20(16), H20)
    assert plans is not None
    assert [plan.job.name for plan in plans] == ["sft", "reward_model", "dpo", "ppo"]
    assert (
        len({(p.setting.zero_stage, p.setting.expert_parallel_size, p.setting.offload_optimizer) for p in plans}) == 1
    )
    assert all(plan.fits for plan in plans)


def test_more_memory_never_makes_less_fit() -> None:
    job = large()["sft"]
    small, big = (
        {replace(plan.setting, micro_batch=1) for plan in feasible(job, Cluster(64, 8, gb * GB, 2000 * GB), H20)}
        for gb in (40, 80)
    )
    assert small < big


def test_measured_rates_replace_assumed_ones() -> None:
    job, cluster = large()["sft"], h20(8)
    slow = feasible(job, cluster, H20)[0].duration.parts["compute"]
    fast = feasible(job, cluster, replace(H20, tflops=2 * H20.tflops))[0].duration.parts["compute"]
    assert slow == pytest.approx(2 * fast)


# --- what is printed -------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["plan", *arguments])
    return capsys.readouterr().out


def test_tiny_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "tiny", "--gpu", "h100", "--stage", "sft")
    assert found.splitlines()[0] == "tiny: 2,954,624 parameters, 890,240 active per token"
    # 2,954,624 parameters, each with 4 bytes of weights and 8 bytes of moments.
    assert "  policy weights               0.012" in found
    assert "  policy optimizer moments     0.024" in found
    assert "  fits          4.1 of 80.0 GB per GPU" in found


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("hunyuan-large", 388_698_128_640), ("medium", 8_021_488_128), ("small", 346_114_560), ("tiny", 2_954_624)],
)
def test_states_of_the_presets(capsys: pytest.CaptureFixture[str], preset: str, parameters: int) -> None:
    changes = ["parallel.offload.optimizer=null", "parallel.expert_parallel_size=1", "stages.sft.data.max_length=512"]
    arguments = ["hunyuan-large", "--model", preset, "--gpus", "64", "--gpu", "b200", "--stage", "sft", "--json"]
    (plan,) = json.loads(printed(capsys, *arguments, *changes))["plans"]
    step = plan["phases"]["optimizer step"]
    kept = sum(step[f"policy {name}"] for name in ("weights", "gradients", "fp32 weights", "optimizer moments"))
    assert kept == pytest.approx(16 * parameters / 64)


def test_json_holds_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["hunyuan-large", "--model", "hunyuan-large", "--gpus", "64", "--gpu", "h100", "--host-memory", "2000"]
    found = json.loads(printed(capsys, *arguments, "--json"))
    text = printed(capsys, *arguments)
    assert found["cluster"]["hosts"] == 8
    for plan in found["plans"]:
        assert plan["gpu_bytes"] == pytest.approx(max(sum(m.values()) for m in plan["phases"].values()))
        assert f"(peak: {plan['peak_phase']})" in text
        assert plan["fits"] is not bool(plan["remedies"])
        for remedy in plan["remedies"]:
            assert " ".join(remedy["overrides"]) in text


def test_search_prints_settings_that_the_recipe_takes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["hunyuan-large", "--model", "hunyuan-large", "--gpu", "h200", "--host-memory", "2000"]
    found = printed(capsys, *arguments, "--search", "--show", "2")
    proposal = found.splitlines()[-1].split()
    recipe = load_recipe("hunyuan-large", proposal)
    assert recipe.parallel is not None
    assert recipe.parallel.processes == 64
    assert "does not fit" not in printed(capsys, *arguments, *proposal)


ROWS_OF_512 = ["max_prompt_length=480", "rollout.max_model_length=512"]
ALONE = ["parallel.processes=1", "parallel.expert_parallel_size=1"]
LARGE = ["hunyuan-large", "--model", "hunyuan-large"]


def proposals(found: str) -> list[list[str]]:
    """The lines of a report that are recipe overrides."""
    return [line.split() for line in found.splitlines() if re.fullmatch(r" +\S+=\S+( \S+=\S+)*", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        ([*LARGE, "--gpus", "8", "--gpu", "h20"], 8),
        ([*LARGE, "--gpus", "24", "--gpu", "h20", "--host-memory", "2000", "--stage", "ppo"], 2),
        ([*LARGE, "--gpus", "1", "--gpu", "b200", *ALONE, "stages.sft.batch_size=3", "stages.dpo.batch_size=5"], 4),
        (["tiny", "--gpu-memory", "4.1"], 4),
        (["tiny", "--gpu-memory", "4.1", "stages.dpo.batch_size=9", "stages.dpo.micro_batch_size=3"], 3),
        (["tiny", "--gpu-memory", "4.04", "--search", "stages.pretrain.batch_size=6"], 2),
        (["quickstart", "--gpu-memory", "4.7", "--stage", "dpo"], 1),
    ],
)
def test_the_recipe_takes_each_proposal_as_a_whole(
    capsys: pytest.CaptureFixture[str], arguments: list[str], least: int
) -> None:
    given = [word for word in arguments if "=" in word]
    lines = proposals(printed(capsys, *arguments))
    if "24" in arguments:  # 24 processes do not divide the 128 rows of the stages that are not planned
        assert all("stages.sft.batch_size=144" in line for line in lines if "parallel.processes=24" in line)
    assert len(lines) >= least
    for line in lines:
        cli.main(["check", "--without-files", arguments[0], *given, *line])
        assert capsys.readouterr().out.splitlines()[0] == f"{arguments[0]}: ok"


@pytest.mark.parametrize(
    "arguments",
    [
        [*LARGE, "--gpus", "8", "--gpu", "h20"],
        [*LARGE, "--gpus", "1", "--gpu", "h20", "--host-memory", "2000"],
        ["tiny", "--gpu-memory", "4.1"],
        ["hunyuan-large", "--model", "small", "--gpus", "1", "--gpu-memory", "5"],
        ["tiny", "--gpu-memory", "4.45", "--stage", "ppo", *(f"stages.ppo.{change}" for change in ROWS_OF_512)],
    ],
)
def test_planning_a_proposal_gives_the_proposed_plan(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    plans = json.loads(printed(capsys, *arguments, "--json"))["plans"]
    found = [(plan["stage"], remedy) for plan in plans for remedy in plan["remedies"]]
    assert len(found) >= 3
    for stage, remedy in found:
        settings = remedy["settings"]
        cluster = ["--stage", stage, "--gpus", str(settings["gpus"]), "--hosts", str(settings["hosts"]), "--json"]
        (again,) = json.loads(printed(capsys, *arguments, *cluster, *remedy["overrides"]))["plans"]
        assert again["fits"], (stage, remedy)
        assert again["settings"] == settings
        assert again["gpu_bytes"] == pytest.approx(remedy["gpu_bytes"])


def test_gpus_not_divisible_by_the_expert_parallel_size_get_proposals(capsys: pytest.CaptureFixture[str]) -> None:
    """Each proposal fits when it is planned on its own number of GPUs."""
    arguments = [*LARGE, "--gpu", "h20", "--host-memory", "2000", "--stage", "sft"]
    found = printed(capsys, *arguments, "--gpus", "8")
    assert "  cannot run    expert_parallel_size 16 does not divide 8 GPUs\n" in found
    lines = proposals(found)
    assert len(lines) == 2  # more GPUs, and LoRA
    for line in lines:
        again = printed(capsys, *arguments, *line, *(["stages.sft.lora={}", *line] if "lora" in " ".join(line) else []))
        assert "  fits  " in again
        assert "cannot run" not in again
    (plan,) = json.loads(printed(capsys, *arguments, "--gpus", "8", "--json"))["plans"]
    assert plan["cannot_run"] == "expert_parallel_size 16 does not divide 8 GPUs"
    assert not plan["fits"]
    assert [" ".join(remedy["overrides"]) for remedy in plan["remedies"]] == [" ".join(line) for line in lines]


def test_experts_not_divisible_by_the_expert_parallel_size_get_proposals(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "hunyuan-large", "--gpu", "h100", "--model", "small", "--stage", "dpo")
    assert "  cannot run    expert_parallel_size 16 does not divide the 8 experts of small\n" in found
    assert any("parallel.expert_parallel_size=8" in line for line in proposals(found))


def test_a_search_that_finds_nothing_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*LARGE, "--gpus", "8", "--gpu", "h20", "--host-memory", "2000", "--stage", "sft"]
    plain, search = (printed(capsys, *arguments, *flag) for flag in ([], ["--search"]))
    assert "sft: no setting fits\n  smallest changes that make it fit:\n" in search
    assert proposals(search) == proposals(plain) != []
    found = json.loads(printed(capsys, *arguments, "--search", "--json"))
    assert found["plans"] == []
    changes = [remedy["overrides"] for remedy in found["nothing_fits"]["sft"]]
    assert changes == proposals(plain)


@pytest.mark.parametrize(
    ("gpus", "changes", "idle", "advice"),
    [
        (
            2,
            [],
            1,
            "a mini-batch of 16 completions has 1 micro-batch for 2 GPUs; lower stages.ppo.micro_batch_tokens to 768",
        ),
        (2, ["micro_batch_tokens=768"], 0, ""),
        (16, ["micro_batch_tokens=96"], 0, ""),
        (
            32,
            ["micro_batch_tokens=96"],
            16,
            "a mini-batch of 16 completions has 16 micro-batches for 32 GPUs; "
            "raise stages.ppo.mini_batch_size to 32 or more, or use at most 16 GPUs",
        ),
        (32, ["micro_batch_tokens=96", "mini_batch_size=32"], 0, ""),
    ],
)
def test_idle_gpus_are_counted(
    capsys: pytest.CaptureFixture[str], gpus: int, changes: list[str], idle: int, advice: str
) -> None:
    """Rows have 96 tokens, mini-batches 16 or 32 rows, and micro-batches by default at most 4096 tokens."""
    words = [f"stages.ppo.{change}" for change in changes]
    found = printed(capsys, "tiny", "--gpu", "h100", "--gpus", str(gpus), "--stage", "ppo", *words)
    assert (f"{idle} of {gpus} GPUs idle" in found) is bool(idle)
    assert f"  idle          {advice}\n" in found if idle else "idle" not in found


def test_more_gpus_have_smaller_micro_batches_as_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(
        capsys, "tiny", "--gpu", "h100", "--gpus", "4", "--stage", "sft"
    )  # 8 rows per step and per micro-batch
    assert "  setting       ZeRO-3, 1 micro-batch of 2 rows\n  fits " in found


def test_search_counts_idle_gpus_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *LARGE, "--gpus", "256", "--gpu", "h100", "--stage", "ppo", "--search")
    settings = [line for line in found.splitlines() if "ZeRO-" in line]
    assert len(settings) > 2
    assert all("1 micro-batch of 1 completion, 128 of 256 GPUs idle" in line for line in settings)


def test_one_is_singular(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["tiny", "--gpu-memory", "4.1"],
        ["tiny", "--gpu-memory", "4.1", "--search"],
        [*LARGE, "--gpus", "1", "--gpu", "h20"],
        [*LARGE, "--gpus", "8", "--gpu", "h20"],
    ):
        found = printed(capsys, *arguments)
        assert "1 host" in found
        assert not re.findall(
            r"(?<![\d,.])1 (?:\w+ )?(?:GPUs|hosts|processes|micro-batches|rows|pairs|settings)\b", found
        )


def test_a_micro_batch_costs_the_same_in_the_search_and_in_the_recipe() -> None:
    one, two = (large(f"stages.sft.micro_batch_size={size}")["sft"] for size in (1, 2))
    setting = setting_of(two, None, 64)
    assert setting.micro_batch == 2
    assert memory(one, setting).gpu_bytes == memory(two, setting).gpu_bytes


def test_every_shipped_recipe_has_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        stand_in = ["--model", "hunyuan-large"] if path.stem == "hunyuan-large" else []
        found = printed(capsys, str(path), "--gpu", "h100", *stand_in)
        assert "GB per GPU" in found


def test_plan_does_not_import_torch() -> None:
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "vllm", "deepspeed", "accelerate"}
    code = (
        "import sys, align.cli\n"
        "align.cli.main(['plan', 'hunyuan-large', '--model', 'hunyuan-large', '--gpu', 'h20', '--search'])\n"
        f"assert not set(sys.modules) & {heavy!r}, set(sys.modules) & {heavy!r}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, capture_output=True)


# --- the page --------------------------------------------------------------------------------------------------


def plan_table() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan_table
    finally:
        sys.path.pop(0)
    return plan_table


def test_rows_of_the_page_equal_the_planner() -> None:
    tables, page = plan_table(), (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for gpus in (8, 32, 128):
        cells = [tables.cell(job, tables.cluster(gpus)) for job in tables.jobs().values()]
        assert f"| {gpus} in {-(-gpus // 8)} | {' | '.join(cells)} |" in page


@pytest.mark.slow
def test_the_whole_page_equals_the_planner() -> None:
    tables, page = plan_table(), (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert tables.written(page) == page


@pytest.mark.parametrize(("name", "cases"), [("plan", 17), ("plan_sharded", 10), ("plan_families", 16)])
def test_the_measured_peaks_are_as_near_as_the_page_says(name: str, cases: int) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["results"]
    assert len(found) >= cases
    for case, one in found.items():
        error = 0.08 if "experts over" in case else 0.05
        assert one["planned"] == pytest.approx(one["measured"], rel=error), case


# --- bad input -------------------------------------------------------------------------------------------------

EVALUATE_ONLY = """
name: nothing
model: {kind: scratch, preset: tiny, tokenizer: {vocab_size: 1024, data: [{kind: python_docs, view: text}]}}
stages:
  pairs: {kind: sample, train: [{kind: python_docs, view: prompts}]}
"""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny"], "the GPU memory is unknown; pass --gpu-memory in GB, or --gpu with one of a100-40, a100,"),
        (["tiny", "--gpu", "h100", "--gpus", "0"], "--gpus 0: the number must be 1 or more."),
        (["tiny", "--gpu-memory", "0"], "--gpu-memory 0: the memory must be more than 0 GB."),
        (["tiny", "--gpu-memory", "nan"], "--gpu-memory nan: the memory must be more than 0 GB."),
        (
            ["tiny", "--gpu-memory", "8", "--reserve", "8"],
            "--reserve 8: must be 0 or more and less than the GPU's 8 GB.",
        ),
        (["tiny", "--gpu", "h100", "--host-memory", "-1"], "--host-memory -1: the memory must be more than 0 GB."),
        (["tiny", "--gpu", "h100", "--tflops", "0"], "--tflops 0: a measured rate must be more than 0."),
        (
            ["tiny", "--gpu", "h100", "--gpus", "8", "--hosts", "3"],
            "--hosts 3: does not divide 8 GPUs; set --hosts to a divisor of 8.",
        ),
        (["tiny", "--gpu", "h100", "--search", "--show", "0"], "--show 0: the number of settings must be 1 or more."),
        (["tiny", "--gpu", "abacus"], "--gpu abacus: unknown; use one of a100-40, a100,"),
        (
            ["tiny", "--gpu", "h100", "--gpus", "3"],
            "stages.pretrain: batch_size 8 is not divisible by 3 GPUs; set batch_size to 9, or --gpus to a",
        ),
        (
            ["tiny", "--gpu", "h100", "--gpus", "65"],
            "--gpus 65: cannot be divided evenly over 9 hosts of at most 8 GPUs; use 64 or 72 GPUs, or set",
        ),
        (["tiny", "--gpu", "h100", "--gpus", "9"], "; use 8 or 10 GPUs, or set the number of hosts with --hosts."),
        (
            ["tiny", "--gpu", "h100", "--stage", "spt"],
            "--stage spt: the recipe has no such stage; use one of pretrain, sft,",
        ),
        (["tiny", "--gpu", "h100", "--stage", "pairs"], "--stage pairs: a stage of kind 'sample' does not train;"),
        (
            ["tiny", "--gpu", "h100", "stages.sft.data.max_length=4096", "--stage", "sft"],
            "stages.sft: rows of 4096 tokens exceed the model's max_position_embeddings 512; shorten them to at most",
        ),
        (
            ["hunyuan-large", "--gpu", "h100", "model.path=models/mine"],
            "'models/mine' is not on this machine, so its",
        ),
        (["tiny", "--gpu", "h100", "--model", "nowhere"], "--model nowhere: neither a preset (hunyuan-large, medium,"),
    ],
)
def test_bad_input_gets_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *arguments])
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert sentence in written.err
    assert written.err.count("\n") == 1
    assert written.out == ""


@pytest.mark.parametrize("size", [16, 3])
def test_expert_parallel_size_is_checked_against_the_gpus(size: int) -> None:
    """The size is checked against --gpus, not the recipe's processes; the first proposal is a valid recipe."""
    recipe = load_recipe("tiny", [f"parallel.expert_parallel_size={size}"])
    (stage,) = json.loads(plan_recipe(recipe, Options(gpus=8, gpu="h100", stage="sft", json=True)))["plans"]
    assert stage["cannot_run"] == f"expert_parallel_size {size} does not divide 8 GPUs"
    proposed = load_recipe("tiny", stage["remedies"][0]["overrides"]).parallel
    assert proposed is not None
    assert (proposed.processes, proposed.process_group_problem()) == (8, None)


def test_rollouts_name_their_engine_and_small_times_keep_their_digits() -> None:
    recipe = load_recipe("tiny", ["stages.ppo.rollout.engine=huggingface", "parallel.processes=2"])
    said = plan_recipe(recipe, Options(gpu="h100"))
    assert "vLLM" not in said
    assert "transformers generation" in said
    assert "0.0 ms" not in said
    assert len(set(re.findall("[0-9.]+ µs", said))) > 3


def test_a_recipe_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nothing.yaml"
    path.write_text(EVALUATE_ONLY, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"recipe 'nothing': no stage trains a model \(kinds: sample\); add a stage of kind pretrain,"
    ):
        plan_recipe(load_recipe(path), Options(gpu="h100"))


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        plan_recipe(load_recipe("tiny"), Options(gpu="h100", model=str(tmp_path)))


def test_a_folder_gives_sizes_as_a_preset_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["small"]), encoding="utf-8")
    recipe = load_recipe("tiny", [f"model={{kind: pretrained, path: {tmp_path}}}"])
    assert jobs_of(recipe, None, "sft")[0].members[0].parameters == 346_114_560
    named = jobs_of(load_recipe("tiny"), "small", "sft")[0].members[0]
    assert named.parameters == 346_114_560
