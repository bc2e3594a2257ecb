"""Write the tables of docs/plan.md: plans of Hunyuan-Large and Hy3 on clusters, and the results of bench_plan.py."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from markdown_table import table

from align.config import load_recipe
from align.plan.job import Job, jobs_of
from align.plan.report import described
from align.plan.search import (
    SMALL_LORA,
    Plan,
    evaluate,
    feasible,
    micro_batches,
    structures,
    with_micro_batch,
)
from align.plan.setting import GB, Cluster
from align.plan.speed import GPUS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
RESULTS = ROOT / "benchmarks" / "results"
GPU, HOST_GB = "h20", 2000
SIZES = [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512]
BATCH = 1536  # divisible by 512 and by 24
HY3_GPU, HY3_SIZES = "h100", [8, 16, 24, 32, 64, 128]


def cluster(gpus: int, host_gb: float = HOST_GB, gpu: str = GPU) -> Cluster:
    return Cluster(gpus, -(-gpus // 8), GPUS[gpu].memory_gb * GB, host_gb * GB)


def jobs(name: str = "hunyuan-large") -> dict[str, Job]:
    """Workloads of a shipped recipe: full and LoRA fine-tuning at 2,048 tokens, and full PPO."""
    batches = [
        f"stages.sft.batch_size={BATCH}",
        f"stages.ppo.batch_size={BATCH}",
        f"stages.ppo.mini_batch_size={BATCH}",
    ]
    recipe = load_recipe(name, batches)
    found = {job.name: job for job in jobs_of(recipe, name, None)}
    return {
        "full SFT": found["sft"],
        "SFT, LoRA on attention": found["sft"].with_lora(SMALL_LORA),
        "full PPO": found["ppo"],
    }


def cell(job: Job, where: Cluster, gpu: str = GPU, *, whole_experts: bool = False) -> str:
    """The fastest plan that fits. whole_experts: without expert parallelism."""
    plans = feasible(job, where, GPUS[gpu].rates)
    plans = [plan for plan in plans if plan.setting.expert_parallel_size == 1 or not whole_experts]
    if not plans:
        return f"no: {least_short(job, where)}"
    best = plans[0]
    needed = [f"{(best.memory.gpu_bytes + where.reserve) / GB:.0f}"]
    if best.memory.host_bytes:
        needed.append(f"{best.memory.host_bytes * where.gpus_per_host / GB:,.0f}")
    setting = re.sub(r", \d+ micro-batch.*", "", described(job, best.setting))
    return f"{' / '.join(needed)} GB; {setting}; {best.duration.fastest:,.0f}–{best.duration.slowest:,.0f} s"


def least_short(job: Job, where: Cluster) -> str:
    """The largest shortage of the setting that comes closest to fitting."""
    plans = [
        evaluate(job, with_micro_batch(setting, micro_batches(job, where.gpus)[-1]), where, GPUS[GPU].rates)
        for setting in structures(job, where)
    ]
    nearest = min((plan for plan in plans if plan.setting.deepspeed), key=lack)
    worst = max(nearest.shortages, key=lambda short: short.needed / short.available)
    return f"{worst.needed / GB:,.0f} of {worst.available / GB:,.0f} GB per {worst.where}"


def lack(plan: Plan) -> float:
    return max(short.needed / short.available if short.available else float("inf") for short in plan.shortages)


def clusters_table() -> str:
    kinds = jobs()
    rows = [
        [f"{gpus} in {cluster(gpus).hosts}", *(cell(job, cluster(gpus)) for job in kinds.values())] for gpus in SIZES
    ]
    return table(["GPUs in hosts", *kinds], rows)


def hy3_table() -> str:
    """Full and LoRA fine-tuning of Hy3, also without expert parallelism as in Tencent's guide."""
    kinds = {name: job for name, job in jobs("hy3").items() if "SFT" in name}
    columns = [
        (f"{name}{', no expert parallelism' * whole}", job, whole) for name, job in kinds.items() for whole in (0, 1)
    ]
    rows = []
    for gpus in HY3_SIZES:
        where = cluster(gpus, gpu=HY3_GPU)
        cells = [cell(job, where, HY3_GPU, whole_experts=bool(whole)) for _, job, whole in columns]
        rows.append([f"{gpus} in {where.hosts}", *cells])
    return table(["GPUs in hosts", *(name for name, _, _ in columns)], rows)


def least_gpus(job: Job, host_gb: float) -> int | None:
    """Smallest number of GPUs, in hosts of eight, on which some setting fits; None if 64 hosts are too few."""
    for hosts in range(1, 65):
        where = cluster(8 * hosts, host_gb)
        if feasible(replace(job, batch=where.gpus), where, GPUS[GPU].rates):
            return where.gpus
    return None


def hosts_table() -> str:
    kinds = {name: job for name, job in jobs().items() if "SFT" in name}
    rows = [
        [f"{host_gb:,} GB", *(str(least_gpus(job, host_gb)) for job in kinds.values())]
        for host_gb in (1000, 1500, 1800, 2000, 2300, 3000, 4000)
    ]
    return table(["memory per host", *kinds], rows)


def measured_table(name: str = "plan") -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        [case, f"{one['measured'] / 1e6:,.1f}", f"{one['planned'] / 1e6:,.1f}", f"{one['planned / measured']:.3f}"]
        for case, one in found["results"].items()
    ]
    made = (
        f"`{found['command']}`, {found['date'][:10]}, {found['hardware']['cores']} cores of {found['hardware']['cpu']}."
    )
    return table(["run", "measured, MB", "planned, MB", "planned / measured"], rows) + f"\n\n{made}"


def families_table() -> str:
    return measured_table("plan_families")


def sharded_table() -> str:
    return measured_table("plan_sharded")


TABLES = {
    "clusters": clusters_table,
    "hosts": hosts_table,
    "hy3": hy3_table,
    "measured": measured_table,
    "sharded": sharded_table,
    "families": families_table,
}


def written(page: str) -> str:
    """The page with new tables."""
    for name, make in TABLES.items():
        start, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        assert after, name
        page = before + start + make() + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
