"""Search a stage's settings: find those that fit, the fastest one, and the smallest changes that make the stage fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from align.config.lora import Lora
from align.plan.job import Job
from align.plan.memory import Memory, memory
from align.plan.setting import Cluster, OffloadTarget, Setting, rows_per_pass, unusable
from align.plan.speed import Duration, Rates, duration, engine_sizes

SMALL_LORA = Lora(rank=16, shared_mlp=False, experts=False)
"""Adapters on attention only, proposed if full fine-tuning does not fit."""

MOST_HOSTS = 1024


@dataclass(frozen=True)
class Shortage:
    """A memory that is too small.

    where: GPU, host or NVMe.
    needed, available: bytes per GPU; per host for host and NVMe.
    """

    where: str
    needed: float
    available: float


@dataclass(frozen=True)
class Plan:
    """A stage under one setting: memory, time, and the shortages that keep it from fitting."""

    job: Job
    setting: Setting
    cluster: Cluster
    memory: Memory
    duration: Duration
    shortages: tuple[Shortage, ...]

    @property
    def fits(self) -> bool:
        return not self.shortages


@dataclass(frozen=True)
class Remedy:
    """A change that makes a stage fit.

    name: kind of change, as printed.
    changes: number of settings that change.
    plan: the stage after the change.
    also: recipe overrides that are not part of the setting.
    """

    name: str
    changes: int
    plan: Plan
    also: tuple[str, ...] = ()


@lru_cache(maxsize=100_000)
def evaluate(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Plan:
    found = memory(job, setting)
    return Plan(job, setting, cluster, found, duration(job, setting, cluster, rates), _shortages(found, cluster))


def _shortages(found: Memory, cluster: Cluster) -> tuple[Shortage, ...]:
    limits: list[tuple[str, float, float | None]] = [
        ("GPU", found.gpu_bytes + cluster.reserve, cluster.gpu_memory),
        ("host", found.host_bytes * cluster.gpus_per_host, cluster.host_memory),
        ("NVMe", found.nvme_bytes * cluster.gpus_per_host, cluster.nvme or 0),
    ]
    return tuple(
        Shortage(where, needed, available)
        for where, needed, available in limits
        if available is not None and needed > available
    )


# --- search space ----------------------------------------------------------------------------------------------


def structures(job: Job, cluster: Cluster) -> Iterator[Setting]:
    """Every setting that DeepSpeed and the model allow, with a micro-batch of one example."""
    gpus = cluster.gpus
    yield from _variants(job, Setting(1, False, 0) if gpus == 1 else None)
    places: list[OffloadTarget | None] = [None, "cpu", "nvme"] if cluster.nvme else [None, "cpu"]
    experts = [layer.num_experts for member in job.members for layer in member.shape.layers if layer.experts]
    sizes = [ep for ep in range(1, gpus + 1) if gpus % ep == 0 and all(count % ep == 0 for count in set(experts))]
    for stage, ep, optimizer, parameters in product((0, 1, 2, 3), sizes if experts else [1], places, places):
        if (parameters or optimizer == "nvme") and stage != 3:
            continue
        if stage == 0 and (optimizer or ep > 1):
            continue
        yield from _variants(job, Setting(gpus, True, stage, ep, optimizer, parameters))


def _variants(job: Job, setting: Setting | None) -> Iterator[Setting]:
    """The setting with each combination of activation checkpointing, engine sleep and tensor-parallel size."""
    if setting is None:
        return
    sleeps = (False, True) if job.rollouts is not None and job.rollouts.engine == "vllm" else (False,)
    sizes = engine_sizes(job, setting.gpus) if job.rollouts is not None and job.rollouts.engine == "vllm" else [1]
    if job.rollouts is not None and job.rollouts.engine == "remote":
        sizes = [job.rollouts.gpus_per_server]
    for checkpointing, sleep, size in product((False, True), sleeps, sizes):
        yield replace(setting, gradient_checkpointing=checkpointing, rollout_sleep=sleep, rollout_gpus=size)


def micro_batches(job: Job, gpus: int) -> list[int]:
    """Sizes that divide a rank's share of the batch into equal micro-batches, largest first.

    Empty if the batch cannot be divided evenly over the GPUs. PPO's share is rounded up instead.
    """
    if job.batch % gpus and job.rollouts is None:
        return []
    share = -(-job.batch // gpus)
    return [size for size in range(share, 0, -1) if share % size == 0]


def largest_that_fits(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Plan | None:
    """The plan with the largest micro-batch that fits.

    It is the fastest one, because every micro-batch gathers the weights again.
    """
    sizes = micro_batches(job, setting.gpus)
    if not sizes:
        return None
    smallest = evaluate(job, with_micro_batch(setting, sizes[-1]), cluster, rates)
    if not smallest.fits:
        return None
    for size in sizes[:-1]:
        plan = evaluate(job, with_micro_batch(setting, size), cluster, rates)
        if plan.fits:
            return plan
    return smallest


def with_micro_batch(setting: Setting, size: int) -> Setting:
    return replace(setting, micro_batch=size)


def feasible(job: Job, cluster: Cluster, rates: Rates) -> list[Plan]:
    """Plans of all settings that fit, each with its largest micro-batch, fastest first."""
    found = (largest_that_fits(job, structure, cluster, rates) for structure in structures(job, cluster))
    return sorted((plan for plan in found if plan is not None), key=lambda plan: plan.duration.seconds)


# --- remedies --------------------------------------------------------------------------------------------------

KNOBS = (
    "zero_stage",
    "expert_parallel_size",
    "offload_optimizer",
    "offload_parameters",
    "gradient_checkpointing",
    "micro_batch",
    "rollout_gpus",
    "rollout_sleep",
)


def changed(new: Setting, old: Setting) -> list[str]:
    """Names of the settings in which two plans for the same GPUs differ."""
    return [knob for knob in KNOBS if getattr(new, knob) != getattr(old, knob)]


def nearest(job: Job, requested: Setting, cluster: Cluster, rates: Rates) -> Plan | None:
    """The plan that fits with the fewest changes to `requested`; among several, the fastest."""
    best: Plan | None = None
    for structure in structures(job, cluster):
        for size in micro_batches(job, cluster.gpus):
            setting = with_micro_batch(structure, size)
            distance = len(changed(setting, requested))
            if best is not None and distance > len(changed(best.setting, requested)):
                continue
            plan = evaluate(job, setting, cluster, rates)
            if plan.fits and (best is None or _order(plan, requested) < _order(best, requested)):
                best = plan
    return best


def _order(plan: Plan, requested: Setting) -> tuple[int, float]:
    return len(changed(plan.setting, requested)), plan.duration.seconds


def remedies(job: Job, requested: Setting, cluster: Cluster, rates: Rates) -> list[Remedy]:
    """Changes that make a stage fit if its `requested` setting does not: at most one of each kind, smallest first."""
    found = []
    near = nearest(job, requested, cluster, rates)
    if near is not None:
        found.append(Remedy("other settings", len(changed(near.setting, requested)), near))
    others = (change(job, requested, cluster, rates) for change in (_more_gpus, _adapters, _shorter))
    found += [remedy for remedy in others if remedy]
    return sorted(found, key=lambda remedy: remedy.changes)


def kinds_tried(job: Job, requested: Setting) -> list[str]:
    """Kinds of change that `remedies` considers."""
    kinds = ["other settings", "more GPUs"]
    kinds += ["LoRA on attention"] * job.full_fine_tuning
    return kinds + ["shorter sequences"] * (unusable(job, requested) is None)


def _with_least_changes(job: Job, requested: Setting, cluster: Cluster, rates: Rates) -> tuple[int, Plan] | None:
    if unusable(job, requested) is None:
        plan = evaluate(job, requested, cluster, rates)
        if plan.fits:
            return 0, plan
    near = nearest(job, requested, cluster, rates)
    return None if near is None else (len(changed(near.setting, requested)), near)


def larger_clusters(cluster: Cluster, *, coarsely: bool = False) -> Iterator[Cluster]:
    """Clusters with more hosts of the same kind, smallest first. A single host is first filled up to 8 GPUs.

    coarsely: grow the number of hosts by an eighth at a time instead of by one.
    """
    if cluster.hosts == 1:
        for gpus in (2, 4, 8):
            if gpus > cluster.gpus:
                yield replace(cluster, gpus=gpus)
    per_host = cluster.gpus_per_host if cluster.hosts > 1 else max(8, cluster.gpus)
    hosts = 2 if cluster.hosts == 1 else cluster.hosts + 1
    while hosts <= MOST_HOSTS:
        yield replace(cluster, gpus=hosts * per_host, hosts=hosts)
        hosts += max(1, hosts // 8) if coarsely else 1


def _more_gpus(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Remedy | None:
    """The smallest cluster on which the setting fits unchanged; otherwise one on which another setting fits."""
    for larger in larger_clusters(cluster):
        requested = _on(job, setting, larger.gpus)
        if unusable(job, requested) is None and evaluate(job, requested, larger, rates).fits:
            return Remedy("more GPUs", 1, evaluate(job, requested, larger, rates))
    for larger in larger_clusters(cluster, coarsely=True):  # each step runs a search
        found = _with_least_changes(job, _on(job, setting, larger.gpus), larger, rates)
        if found is not None:
            return Remedy("more GPUs", 1 + found[0], found[1])
    return None


def _on(job: Job, setting: Setting, gpus: int) -> Setting:
    zero_stage = setting.zero_stage if setting.deepspeed else 3
    return replace(setting, gpus=gpus, deepspeed=True, zero_stage=zero_stage, micro_batch=rows_per_pass(job, gpus))


def _adapters(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Remedy | None:
    if not job.full_fine_tuning:
        return None
    found = _with_least_changes(job.with_lora(SMALL_LORA), setting, cluster, rates)
    stage = f"stages.{job.name}"
    sections = [stage if member.role != "critic" else f"{stage}.critic" for member in job.learners]
    off = ("shared_mlp", "experts")
    also = tuple(f"{section}.lora.{key}=false" for section in sections for key in off)
    return None if found is None else Remedy("LoRA on attention", 1 + found[0], found[1], also)


def _shorter(whole: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Remedy | None:
    stage, length = f"stages.{whole.name}", whole.length // 2
    if unusable(whole, setting) is not None:
        return None
    while length >= 128:
        job = replace(whole, length=length)
        also: tuple[str, ...] = (f"{stage}.data.max_length={length}",)
        if job.by_tokens:
            also += (f"{stage}.micro_batch_tokens={setting.micro_batch * job.sequences * length}",)
        if job.rollouts is not None:
            completion = job.rollouts.max_new_tokens * length // whole.length
            job = replace(job, rollouts=replace(job.rollouts, max_new_tokens=max(1, completion)))
            prompt = f"{stage}.max_prompt_length={length - completion}"
            tokens = f"{stage}.micro_batch_tokens={setting.micro_batch * length}"
            also = (prompt, f"{stage}.rollout.max_new_tokens={completion}", tokens)
        found = evaluate(job, setting, cluster, rates)
        if found.fits:
            return Remedy(f"sequences of {length} tokens", 1, found, also)
        length //= 2
    return None


def joint(jobs: Sequence[Job], cluster: Cluster, rates: Rates) -> list[Plan] | None:
    """Plans of all stages under the common `parallel` section that fits every stage with the smallest total step time.

    None if no section fits every stage.
    """
    best: tuple[float, list[Plan]] | None = None
    common = {_shared(structure) for job in jobs for structure in structures(job, cluster)}
    for section in sorted(common, key=str):
        plans = []
        for job in jobs:
            own = [s for s in structures(job, cluster) if _shared(s) == section]
            fitting = [plan for s in own if (plan := largest_that_fits(job, s, cluster, rates)) is not None]
            if not fitting:
                break
            plans.append(min(fitting, key=lambda plan: plan.duration.seconds))
        else:
            seconds = sum(plan.duration.seconds for plan in plans)
            if best is None or seconds < best[0]:
                best = seconds, plans
    return best[1] if best else None


def _shared(setting: Setting) -> tuple[bool, int, int, str | None, str | None]:
    """The part of a setting that all stages of a recipe have in common: its `parallel` section."""
    return (
        setting.deepspeed,
        setting.zero_stage,
        setting.expert_parallel_size,
        setting.offload_optimizer,
        setting.offload_parameters,
    )
