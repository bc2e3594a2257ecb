"""Which settings fit, which of them is the fastest, and which is the smallest change that would make a stage fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from align.config.parts import Lora
from align.plan.job import Job
from align.plan.memory import Memory, memory
from align.plan.setting import Cluster, Place, Setting, rows_a_pass, unusable
from align.plan.speed import Duration, Rates, duration, engine_sizes

SMALL_LORA = Lora(rank=16, shared_mlp=False, experts=False, train_router=False)
"""What is proposed where full fine-tuning does not fit: adapters on attention alone."""

MOST_HOSTS = 1024


@dataclass(frozen=True)
class Shortage:
    """What does not fit: bytes needed and there, on one GPU, one host or one host's disk."""

    where: str
    needed: float
    available: float


@dataclass(frozen=True)
class Plan:
    """A stage under one setting."""

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

    what: in words; changes: how many things are changed; also: changes to the recipe that the setting does not name.
    """

    what: str
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
        ("host", found.host_bytes * cluster.gpus_a_host, cluster.host_memory),
        ("NVMe", found.nvme_bytes * cluster.gpus_a_host, cluster.nvme or 0),
    ]
    return tuple(
        Shortage(where, needed, available)
        for where, needed, available in limits
        if available is not None and needed > available
    )


# --- the space -------------------------------------------------------------------------------------------------


def structures(job: Job, cluster: Cluster) -> Iterator[Setting]:
    """Every way to spread a stage that DeepSpeed and the model allow, with the smallest micro-batch."""
    gpus = cluster.gpus
    yield from _variants(job, Setting(1, False, 0) if gpus == 1 else None)
    places: list[Place | None] = [None, "cpu", "nvme"] if cluster.nvme else [None, "cpu"]
    experts = [layer.num_experts for member in job.members for layer in member.shape.layers if layer.experts]
    sizes = [ep for ep in range(1, gpus + 1) if gpus % ep == 0 and all(count % ep == 0 for count in set(experts))]
    for stage, ep, optimizer, parameters in product((0, 1, 2, 3), sizes if experts else [1], places, places):
        if (parameters or optimizer == "nvme") and stage != 3:
            continue
        if stage == 0 and (optimizer or ep > 1):
            continue
        yield from _variants(job, Setting(gpus, True, stage, ep, optimizer, parameters))


def _variants(job: Job, setting: Setting | None) -> Iterator[Setting]:
    """With and without recomputed activations and sleeping engines, over as many GPUs an engine as there may be."""
    if setting is None:
        return
    sleeps = (False, True) if job.rollouts is not None and job.rollouts.engine == "vllm" else (False,)
    sizes = engine_sizes(job, setting.gpus) if job.rollouts is not None and job.rollouts.engine == "vllm" else [1]
    if job.rollouts is not None and job.rollouts.engine == "remote":
        sizes = [job.rollouts.gpus_a_server]
    for checkpointing, sleep, size in product((False, True), sleeps, sizes):
        yield replace(setting, gradient_checkpointing=checkpointing, rollout_sleep=sleep, rollout_gpus=size)


def micro_batches(job: Job, gpus: int) -> list[int]:
    """Sizes that split the batch evenly over the ranks, the largest first; PPO's last pass may be a smaller one."""
    if job.batch % gpus and job.kind != "ppo":
        return []
    share = -(-job.batch // gpus)
    return [size for size in range(share, 0, -1) if share % size == 0]


def largest_that_fits(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Plan | None:
    """The same structure with the most examples a pass: every pass has its share of gathering, so it is the fastest."""
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
    """Every setting that fits, with its largest micro-batch, the fastest first."""
    found = (largest_that_fits(job, structure, cluster, rates) for structure in structures(job, cluster))
    return sorted((plan for plan in found if plan is not None), key=lambda plan: plan.duration.seconds)


# --- what to change --------------------------------------------------------------------------------------------

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
    """The settings in which two plans of the same GPUs differ."""
    return [knob for knob in KNOBS if getattr(new, knob) != getattr(old, knob)]


def nearest(job: Job, wanted: Setting, cluster: Cluster, rates: Rates) -> Plan | None:
    """The feasible setting that differs from `wanted` in the fewest things, the fastest of those."""
    best: Plan | None = None
    for structure in structures(job, cluster):
        for size in micro_batches(job, cluster.gpus):
            setting = with_micro_batch(structure, size)
            distance = len(changed(setting, wanted))
            if best is not None and distance > len(changed(best.setting, wanted)):
                continue
            plan = evaluate(job, setting, cluster, rates)
            if plan.fits and (best is None or _order(plan, wanted) < _order(best, wanted)):
                best = plan
    return best


def _order(plan: Plan, wanted: Setting) -> tuple[int, float]:
    return len(changed(plan.setting, wanted)), plan.duration.seconds


def remedies(job: Job, wanted: Setting, cluster: Cluster, rates: Rates) -> list[Remedy]:
    """Changes to what is `wanted`, which does not fit or cannot run, one of each sort, the smallest first."""
    found = []
    near = nearest(job, wanted, cluster, rates)
    if near is not None:
        found.append(Remedy("other settings", len(changed(near.setting, wanted)), near))
    others = (sort(job, wanted, cluster, rates) for sort in (_more_gpus, _adapters, _shorter))
    found += [remedy for remedy in others if remedy]
    return sorted(found, key=lambda remedy: remedy.changes)


def _with_least_changes(job: Job, wanted: Setting, cluster: Cluster, rates: Rates) -> tuple[int, Plan] | None:
    if unusable(job, wanted) is None:
        plan = evaluate(job, wanted, cluster, rates)
        if plan.fits:
            return 0, plan
    near = nearest(job, wanted, cluster, rates)
    return None if near is None else (len(changed(near.setting, wanted)), near)


def larger_clusters(cluster: Cluster, *, coarsely: bool = False) -> Iterator[Cluster]:
    """The same hosts, more of them (coarsely: by an eighth at a time); where there is one, first the same host with
    more GPUs, up to eight."""
    if cluster.hosts == 1:
        for gpus in (2, 4, 8):
            if gpus > cluster.gpus:
                yield replace(cluster, gpus=gpus)
    a_host = cluster.gpus_a_host if cluster.hosts > 1 else max(8, cluster.gpus)
    hosts = 2 if cluster.hosts == 1 else cluster.hosts + 1
    while hosts <= MOST_HOSTS:
        yield replace(cluster, gpus=hosts * a_host, hosts=hosts)
        hosts += max(1, hosts // 8) if coarsely else 1


def _more_gpus(job: Job, setting: Setting, given: Cluster, rates: Rates) -> Remedy | None:
    """The fewest GPUs on which the settings fit as they are, else few on which any do."""
    for cluster in larger_clusters(given):
        wanted = _on(job, setting, cluster.gpus)
        if unusable(job, wanted) is None and evaluate(job, wanted, cluster, rates).fits:
            return Remedy("more GPUs", 1, evaluate(job, wanted, cluster, rates))
    for cluster in larger_clusters(given, coarsely=True):  # each is a search of its own
        found = _with_least_changes(job, _on(job, setting, cluster.gpus), cluster, rates)
        if found is not None:
            return Remedy("more GPUs", 1 + found[0], found[1])
    return None


def _on(job: Job, setting: Setting, gpus: int) -> Setting:
    zero_stage = setting.zero_stage if setting.deepspeed else 3
    return replace(setting, gpus=gpus, deepspeed=True, zero_stage=zero_stage, micro_batch=rows_a_pass(job, gpus))


def _adapters(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Remedy | None:
    if not job.full_fine_tuning:
        return None
    found = _with_least_changes(job.with_lora(SMALL_LORA), setting, cluster, rates)
    stage = f"stages.{job.name}"
    sections = [stage if member.role != "critic" else f"{stage}.critic" for member in job.learners]
    off = ("shared_mlp", "experts", "train_router")
    also = tuple(f"{section}.lora.{key}=false" for section in sections for key in off)
    return None if found is None else Remedy("LoRA on attention", 1 + found[0], found[1], also)


def _shorter(whole: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Remedy | None:
    stage, length = f"stages.{whole.name}", whole.length // 2
    if unusable(whole, setting) is not None:
        return None
    while length >= 128:
        job = replace(whole, length=length)
        also: tuple[str, ...] = (f"{stage}.data.max_length={length}",)
        if job.rollouts is not None:
            completion = job.rollouts.max_new_tokens * length // whole.length
            job = replace(job, rollouts=replace(job.rollouts, max_new_tokens=max(1, completion)))
            prompt = f"{stage}.max_prompt_length={length - completion}"
            tokens = f"{stage}.micro_batch_tokens={setting.micro_batch * length}"
            also = (prompt, f"{stage}.rollout.max_new_tokens={completion}", tokens)
        found = evaluate(job, setting, cluster, rates)
        if found.fits:
            return Remedy(f"rows of {length} tokens", 1, found, also)
        length //= 2
    return None


def joint(jobs: Sequence[Job], cluster: Cluster, rates: Rates) -> list[Plan] | None:
    """One `parallel` section under which every stage fits, with the smallest sum of step times."""
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
    """What all stages of a recipe have in common: its `parallel` section."""
    return (
        setting.deepspeed,
        setting.zero_stage,
        setting.expert_parallel_size,
        setting.offload_optimizer,
        setting.offload_parameters,
    )
