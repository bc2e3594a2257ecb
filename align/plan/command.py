"""`align plan`: turn a recipe and a cluster into a report, as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from align.config.recipe import Recipe
from align.errors import UserError
from align.plan import report
from align.plan.job import Job, jobs_of
from align.plan.search import Plan, Remedy, evaluate, feasible, joint, micro_batches, remedies
from align.plan.setting import GB, Cluster, Setting, setting_of, unusable
from align.plan.speed import GPUS, LINK_EFFICIENCY, TFLOPS_EFFICIENCY, Gpu, Rates

DEFAULT_GPU = "h100"


@dataclass(frozen=True)
class Options:
    """Flags of `align plan`. None: the default, which depends on the recipe or on other flags.

    gpus, hosts: size of the cluster.
    gpu: a name in `GPUS`, for memory and peak rates.
    gpu_memory: GB (1e9 bytes) of memory per GPU.
    host_memory, nvme: GB of memory and of NVMe disk per host.
    reserve: GB kept free per GPU.
    tflops: measured TFLOP/s per GPU.
    link, network, host_link: measured GB/s per GPU to GPUs of its host, to other hosts, and to its host's memory.
    model: preset or folder with the sizes of the recipe's model and of checkpoints that are not on this machine.
    stage: plan only this stage.
    search: list the settings that fit; `show` limits how many per stage.
    json: print JSON.
    """

    gpus: int | None = None
    hosts: int | None = None
    gpu: str | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None
    nvme: float | None = None
    reserve: float = 4.0
    tflops: float | None = None
    link: float | None = None
    network: float | None = None
    host_link: float | None = None
    model: str | None = None
    stage: str | None = None
    search: bool = False
    show: int = 10
    json: bool = False


def plan_recipe(recipe: Recipe, options: Options) -> str:
    """The report that `align plan` prints."""
    if options.show < 1:
        raise UserError(f"--show {options.show}: the number of settings must be 1 or more.")
    cluster, (rates, source) = cluster_of(recipe, options), rates_of(options)
    jobs = jobs_of(recipe, options.model, options.stage)
    for job in jobs:
        _check(job, cluster)
    if options.search:
        return _search(jobs, recipe, cluster, rates, source, options)
    plans = [_stage(job, setting_of(job, recipe.parallel, cluster.gpus), cluster, rates) for job in jobs]
    if options.json:
        return _json(cluster, rates, source, [_stage_values(*plan, cluster) for plan in plans], **_in_4_bits(jobs))
    blocks = [report.header(jobs[0], cluster, rates, source)]
    blocks += [report.text(*plan) for plan in plans]
    if len(jobs) > 1 and any(changes for *_, changes in plans):
        blocks.append(report.joint_text(joint(jobs, cluster, rates)))
    return "\n\n".join([*blocks, *_in_4_bits_text(jobs)])


def _in_4_bits(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The stages with weights in 4 bits, whose plan counts these weights in the recipe's dtype."""
    names = [job.name for job in jobs if any(member.lora and member.lora.quantize for member in job.members)]
    return {"counted_without_quantize": names} if names else {}


def _in_4_bits_text(jobs: Sequence[Job]) -> list[str]:
    return [
        f"{', '.join(names)}: weights in 4 bits (lora.quantize) are counted in the recipe's dtype, so less memory is "
        "needed than planned; they cannot be combined with `parallel`, which proposals may contain."
        for names in _in_4_bits(jobs).values()
    ]


StagePlan = tuple[Job, Setting, Plan | str, list[Remedy]]
"""(stage, requested setting, its plan or the reason why it cannot run, changes that make it fit)."""


def _stage(job: Job, requested: Setting, cluster: Cluster, rates: Rates) -> StagePlan:
    """Plan a stage under the requested setting. If the setting does not fit, also search for remedies."""
    plan = unusable(job, requested) or evaluate(job, requested, cluster, rates)
    fits = not isinstance(plan, str) and plan.fits
    return job, requested, plan, [] if fits else remedies(job, requested, cluster, rates)


def _stage_values(
    job: Job, setting: Setting, plan: Plan | str, changes: Sequence[Remedy], cluster: Cluster
) -> report.Values:
    reason = plan if isinstance(plan, str) else None
    if isinstance(plan, str):
        values = report.stage_values(job, setting, cluster) | {"fits": False}
    else:
        values = report.plan_values(plan)
    return values | {"cannot_run": reason, "remedies": [_remedy_values(remedy) for remedy in changes]}


def _search(jobs: Sequence[Job], recipe: Recipe, cluster: Cluster, rates: Rates, source: str, options: Options) -> str:
    found = [(job, feasible(job, cluster, rates)) for job in jobs]
    changes = {
        job.name: [] if some else remedies(job, setting_of(job, recipe.parallel, cluster.gpus), cluster, rates)
        for job, some in found
    }
    if options.json:
        plans = [report.plan_values(plan) for _, some in found for plan in some[: options.show]]
        unmet = {job.name: [_remedy_values(remedy) for remedy in changes[job.name]] for job, some in found if not some}
        return _json(cluster, rates, source, plans, nothing_fits=unmet, **_in_4_bits(jobs))
    blocks = [report.header(jobs[0], cluster, rates, source)]
    requested = {job.name: setting_of(job, recipe.parallel, cluster.gpus) for job in jobs}
    blocks += [
        report.search_text(job, plans, options.show, changes[job.name], requested[job.name]) for job, plans in found
    ]
    blocks += [report.joint_text(joint(jobs, cluster, rates))] if len(jobs) > 1 else []
    return "\n\n".join([*blocks, *_in_4_bits_text(jobs)])


def _json(
    cluster: Cluster, rates: Rates, source: str, plans: list[report.Values], **more: report.Values | list[str]
) -> str:
    values = {"cluster": asdict(cluster), "rates": asdict(rates) | {"source": source}, "plans": plans, **more}
    return json.dumps(values, indent=2)


def _remedy_values(remedy: Remedy) -> report.Values:
    plan: Plan = remedy.plan
    return {
        "name": remedy.name,
        "changes": remedy.changes,
        "overrides": report.written_as(remedy),
        "tokens_per_row": plan.job.length,
        "settings": report.setting_values(plan.job, plan.setting, plan.cluster),
        "gpu_bytes": plan.memory.gpu_bytes,
        "seconds_per_step": {"fastest": plan.duration.fastest, "slowest": plan.duration.slowest},
    }


def _check(job: Job, cluster: Cluster) -> None:
    """Raise UserError if the batch cannot be divided evenly over the GPUs."""
    if not micro_batches(job, cluster.gpus):
        raise UserError(
            f"stages.{job.name}: batch_size {job.batch} is not divisible by {cluster.gpus} GPUs; set batch_size to "
            f"{cluster.gpus * -(-job.batch // cluster.gpus)}, or --gpus to a divisor of {job.batch}."
        )


def cluster_of(recipe: Recipe, options: Options) -> Cluster:
    gpus = options.gpus
    if gpus is None:
        gpus = recipe.parallel.processes if recipe.parallel else 1
    hosts = options.hosts if options.hosts is not None else -(-gpus // 8)
    for flag, number in (("--gpus", gpus), ("--hosts", hosts)):
        if number < 1:
            raise UserError(f"{flag} {number}: the number must be 1 or more.")
    if gpus % hosts and options.hosts is None:
        even = [number for number in range(1, 2 * gpus) if number % -(-number // 8) == 0]
        below, above = max(n for n in even if n < gpus), min(n for n in even if n > gpus)
        raise UserError(
            f"--gpus {gpus}: cannot be divided evenly over {hosts} hosts of at most 8 GPUs; use {below} or {above} "
            "GPUs, or set the number of hosts with --hosts."
        )
    if gpus % hosts:
        raise UserError(f"--hosts {hosts}: does not divide {gpus} GPUs; set --hosts to a divisor of {gpus}.")
    if options.gpu_memory is None and options.gpu is None:
        raise UserError(f"the GPU memory is unknown; pass --gpu-memory in GB, or --gpu with one of {', '.join(GPUS)}.")
    memory = _gpu(options.gpu).memory_gb if options.gpu_memory is None and options.gpu else options.gpu_memory
    assert memory is not None
    sizes = {"--gpu-memory": memory, "--host-memory": options.host_memory, "--nvme": options.nvme}
    for flag, size in sizes.items():
        if size is not None and not 0 < size < float("inf"):
            raise UserError(f"{flag} {size:g}: the memory must be more than 0 GB.")
    if not 0 <= options.reserve < memory:
        raise UserError(f"--reserve {options.reserve:g}: must be 0 or more and less than the GPU's {memory:g} GB.")
    return Cluster(
        gpus=gpus,
        hosts=hosts,
        gpu_memory=memory * GB,
        host_memory=options.host_memory * GB if options.host_memory else None,
        nvme=options.nvme * GB if options.nvme else None,
        reserve=options.reserve * GB,
    )


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name}: unknown; use one of {', '.join(GPUS)}, or pass --gpu-memory and --tflops.")
    return GPUS[name]


def rates_of(options: Options) -> tuple[Rates, str]:
    """The rates for the estimate, and a description of their source."""
    name = options.gpu or DEFAULT_GPU
    rates = _gpu(name).rates
    given = {"tflops": options.tflops, "link": options.link, "network": options.network, "host": options.host_link}
    measured = {field: rate for field, rate in given.items() if rate is not None}
    for field, rate in measured.items():
        if not 0 < rate < float("inf"):
            raise UserError(f"--{field.replace('host', 'host-link')} {rate:g}: a measured rate must be more than 0.")
    source = f"{TFLOPS_EFFICIENCY:.0%} and {LINK_EFFICIENCY:.0%} of {name}'s peak rates"
    if measured:
        source = f"measured: {', '.join(measured)}; otherwise {source}"
    return replace(rates, **measured), source
