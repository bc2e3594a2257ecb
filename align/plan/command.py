"""`align plan`: from a recipe and a cluster to text or JSON."""

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
from align.plan.speed import GPUS, TFLOPS_EFFICIENCY, WIRE_EFFICIENCY, Gpu, Rates

DEFAULT_GPU = "h100"


@dataclass(frozen=True)
class Question:
    """What the command line says; memory in GB (1e9 bytes), rates as reached and not as on a data sheet."""

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


def answer(recipe: Recipe, question: Question) -> str:
    """What `align plan` prints."""
    if question.show < 1:
        raise UserError(f"--show {question.show}: must be 1 or more.")
    cluster, (rates, source) = cluster_of(recipe, question), rates_of(question)
    jobs = jobs_of(recipe, question.model, question.stage)
    for job in jobs:
        _check(job, cluster)
    if question.search:
        return _search(jobs, recipe, cluster, rates, source, question)
    answers = [_stage(job, setting_of(job, recipe.parallel, cluster.gpus), cluster, rates) for job in jobs]
    if question.json:
        return _json(cluster, rates, source, [_stage_values(*one, cluster) for one in answers])
    blocks = [report.header(jobs[0], cluster, rates, source)]
    blocks += [report.text(*one) for one in answers]
    if len(jobs) > 1 and any(changes for *_, changes in answers):
        blocks.append(report.joint_text(joint(jobs, cluster, rates)))
    return "\n\n".join(blocks)


Answer = tuple[Job, Setting, Plan | str, list[Remedy]]


def _stage(job: Job, wanted: Setting, cluster: Cluster, rates: Rates) -> Answer:
    """(the stage, what is wanted of it, its plan or why there can be none, what would make it fit)."""
    plan = unusable(job, wanted) or evaluate(job, wanted, cluster, rates)
    fits = not isinstance(plan, str) and plan.fits
    return job, wanted, plan, [] if fits else remedies(job, wanted, cluster, rates)


def _stage_values(
    job: Job, setting: Setting, plan: Plan | str, changes: Sequence[Remedy], cluster: Cluster
) -> report.Values:
    reason = plan if isinstance(plan, str) else None
    if isinstance(plan, str):
        values = report.stage_values(job, setting, cluster) | {"fits": False}
    else:
        values = report.plan_values(plan)
    return values | {"cannot_run": reason, "remedies": [_remedy_values(remedy) for remedy in changes]}


def _search(
    jobs: Sequence[Job], recipe: Recipe, cluster: Cluster, rates: Rates, source: str, question: Question
) -> str:
    found = [(job, feasible(job, cluster, rates)) for job in jobs]
    changes = {
        job.name: [] if some else remedies(job, setting_of(job, recipe.parallel, cluster.gpus), cluster, rates)
        for job, some in found
    }
    if question.json:
        plans = [report.plan_values(plan) for _, some in found for plan in some[: question.show]]
        nothing = {
            job.name: [_remedy_values(remedy) for remedy in changes[job.name]] for job, some in found if not some
        }
        return _json(cluster, rates, source, plans, nothing_fits=nothing)
    blocks = [report.header(jobs[0], cluster, rates, source)]
    blocks += [report.search_text(job, plans, question.show, changes[job.name]) for job, plans in found]
    return "\n\n".join([*blocks, report.joint_text(joint(jobs, cluster, rates))] if len(jobs) > 1 else blocks)


def _json(cluster: Cluster, rates: Rates, source: str, plans: list[report.Values], **more: report.Values) -> str:
    values = {"cluster": asdict(cluster), "rates": asdict(rates) | {"source": source}, "plans": plans, **more}
    return json.dumps(values, indent=2)


def _remedy_values(remedy: Remedy) -> report.Values:
    plan: Plan = remedy.plan
    return {
        "what": remedy.what,
        "changes": remedy.changes,
        "overrides": report.written_as(remedy),
        "tokens_a_row": plan.job.length,
        "settings": report.setting_values(plan.job, plan.setting, plan.cluster),
        "gpu_bytes": plan.memory.gpu_bytes,
        "seconds_a_step": {"fastest": plan.duration.fastest, "slowest": plan.duration.slowest},
    }


def _check(job: Job, cluster: Cluster) -> None:
    """Refuse what no setting can mend."""
    if not micro_batches(job, cluster.gpus):
        raise UserError(
            f"stages.{job.name}: {cluster.gpus} GPUs cannot share batch_size {job.batch} evenly; set it to "
            f"{cluster.gpus * -(-job.batch // cluster.gpus)}, or use a number of GPUs that divides it (--gpus)."
        )


def cluster_of(recipe: Recipe, question: Question) -> Cluster:
    gpus = question.gpus
    if gpus is None:
        gpus = recipe.parallel.processes if recipe.parallel else 1
    hosts = question.hosts if question.hosts is not None else -(-gpus // 8)
    for flag, number in (("--gpus", gpus), ("--hosts", hosts)):
        if number < 1:
            raise UserError(f"{flag} {number}: must be 1 or more.")
    if gpus % hosts and question.hosts is None:
        even = [number for number in range(1, 2 * gpus) if number % -(-number // 8) == 0]
        below, above = max(n for n in even if n < gpus), min(n for n in even if n > gpus)
        raise UserError(
            f"--gpus {gpus}: {hosts} hosts of at most eight GPUs cannot all have the same number; use {below} or "
            f"{above}, or say with --hosts how many hosts there are."
        )
    if gpus % hosts:
        raise UserError(f"--hosts {hosts} does not divide {gpus} GPUs; every host has the same number.")
    if question.gpu_memory is None and question.gpu is None:
        raise UserError(
            f"the GPUs' memory is missing; give --gpu-memory in GB, or --gpu with one of {', '.join(GPUS)}."
        )
    memory = _gpu(question.gpu).memory_gb if question.gpu_memory is None and question.gpu else question.gpu_memory
    assert memory is not None
    sizes = {"--gpu-memory": memory, "--host-memory": question.host_memory, "--nvme": question.nvme}
    for flag, size in sizes.items():
        if size is not None and not 0 < size < float("inf"):
            raise UserError(f"{flag} {size:g}: must be more than 0 GB.")
    if not 0 <= question.reserve < memory:
        raise UserError(f"--reserve {question.reserve:g}: must be 0 or more and less than the GPU's {memory:g} GB.")
    return Cluster(
        gpus=gpus,
        hosts=hosts,
        gpu_memory=memory * GB,
        host_memory=question.host_memory * GB if question.host_memory else None,
        nvme=question.nvme * GB if question.nvme else None,
        reserve=question.reserve * GB,
    )


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}; for others give --gpu-memory and --tflops.")
    return GPUS[name]


def rates_of(question: Question) -> tuple[Rates, str]:
    """The rates to reckon with, and where they come from in words."""
    name = question.gpu or DEFAULT_GPU
    rates = _gpu(name).rates
    given = {"tflops": question.tflops, "link": question.link, "network": question.network, "host": question.host_link}
    measured = {field: rate for field, rate in given.items() if rate is not None}
    for field, rate in measured.items():
        if not 0 < rate < float("inf"):
            raise UserError(f"--{field.replace('host', 'host-link')} {rate:g}: a rate must be more than 0.")
    source = f"{TFLOPS_EFFICIENCY:.0%} and {WIRE_EFFICIENCY:.0%} of {name}'s peak rates"
    if measured:
        source = f"given: {', '.join(measured)}; else {source}"
    return replace(rates, **measured), source
