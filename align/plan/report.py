"""Render plans as plain values (for JSON) and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.parallel import Parallel
from align.config.recipe import nearest_batch
from align.plan.job import Job, RolloutWork
from align.plan.memory import engine_bytes
from align.plan.search import Plan, Remedy, Shortage, kinds_tried
from align.plan.setting import GB, Cluster, Setting, counted, rows_per_pass
from align.plan.speed import Rates, server_gpus
from align.plan.traffic import traffic

Values = dict[str, Any]


def stage_values(job: Job, setting: Setting, cluster: Cluster) -> Values:
    """A stage's models, sizes and setting."""
    return {
        "stage": job.name,
        "kind": job.kind,
        "models": [
            {"role": m.role, "sizes": m.shape.name, "parameters": m.parameters, "trained": sum(m.trained_counts)}
            for m in job.members
        ],
        "tokens_per_row": job.length,
        "settings": setting_values(job, setting, cluster),
    }


def plan_values(plan: Plan) -> Values:
    """A plan as plain values, in bytes and seconds."""
    found = plan.memory
    return stage_values(plan.job, plan.setting, plan.cluster) | {
        "fits": plan.fits,
        "shortages": [{"where": s.where, "needed": s.needed, "available": s.available} for s in plan.shortages],
        "gpu_bytes": found.gpu_bytes,
        "peak_phase": found.peak,
        "phases": found.phases,
        "host_bytes_per_rank": found.host,
        "nvme_bytes_per_rank": found.nvme,
        "received_per_step": {
            f"{flow.name} ({flow.link})": size for flow, size in traffic(plan.job, plan.setting).items()
        },
        "seconds_per_step": {"fastest": plan.duration.fastest, "slowest": plan.duration.slowest, **plan.duration.parts},
        "tokens_per_step": plan.duration.tokens,
    }


def setting_values(job: Job, setting: Setting, cluster: Cluster) -> Values:
    values: Values = {
        "gpus": setting.gpus,
        "hosts": cluster.hosts,
        "deepspeed": setting.deepspeed,
        "zero_stage": setting.zero_stage,
        "expert_parallel_size": setting.expert_parallel_size,
        "offload_optimizer": setting.offload_optimizer,
        "offload_parameters": setting.offload_parameters,
        "gradient_checkpointing": setting.gradient_checkpointing,
        "micro_batch": setting.micro_batch,
        "accumulation": setting.accumulation(job),
        "idle_gpus": setting.idle(job),
    }
    if job.rollouts is not None:
        values |= {"rollout_gpus": setting.rollout_gpus, "rollout_sleep": setting.rollout_sleep}
    return values


def overrides(plan: Plan) -> list[str]:
    """The plan's settings as recipe overrides for `align run`."""
    setting, stage = plan.setting, f"stages.{plan.job.name}"
    found = []
    if setting.deepspeed:
        written = plan.job.parallel or Parallel(processes=setting.gpus)
        found += [f"parallel.processes={setting.gpus}", f"parallel.zero_stage={setting.zero_stage}"]
        if setting.expert_parallel_size > 1 or written.expert_parallel_size > 1:
            found.append(f"parallel.expert_parallel_size={setting.expert_parallel_size}")
        before = written.offload
        places = (
            ("optimizer", setting.offload_optimizer, before.optimizer),
            ("parameters", setting.offload_parameters, before.parameters),
        )
        found += [f"parallel.offload.{state}={now or 'null'}" for state, now, was in places if now or was]
        if "nvme" in (setting.offload_optimizer, setting.offload_parameters):
            found.append(f"parallel.offload.path={before.path or 'FOLDER'}")
        elif before.path:
            found.append("parallel.offload.path=null")
    elif plan.job.parallel is not None:
        found.append("parallel=null")
    if setting.gradient_checkpointing != plan.job.gradient_checkpointing:
        found.append(f"{stage}.gradient_checkpointing={str(setting.gradient_checkpointing).lower()}")
    if setting.micro_batch != rows_per_pass(plan.job, setting.gpus):
        if plan.job.by_tokens:
            tokens = setting.micro_batch * plan.job.sequences * plan.job.length
            found.append(f"{stage}.micro_batch_tokens={tokens}")
        else:
            found.append(f"{stage}.micro_batch_size={setting.micro_batch}")
    if plan.job.rollouts is not None and setting.rollout_sleep != plan.job.rollouts.sleeps:
        found.append(f"{stage}.rollout.sleep={str(setting.rollout_sleep).lower()}")
    return found


def batch_overrides(plan: Plan) -> list[str]:
    """Overrides that make the other stages' batch sizes divisible by the plan's processes."""
    gpus = plan.setting.gpus
    batches = {name: (batch, nearest_batch(batch, gpus)) for name, batch in plan.job.other_stages}
    return [f"stages.{name}.batch_size={even}" for name, (batch, even) in batches.items() if even != batch]


def described(job: Job, setting: Setting) -> str:
    """A setting in one line."""
    parts = [f"ZeRO-{setting.zero_stage}" if setting.deepspeed else "one process without DeepSpeed"]
    if setting.expert_parallel_size > 1:
        parts.append(f"expert parallel {setting.expert_parallel_size}")
    for state, place in (("optimizer", setting.offload_optimizer), ("weights", setting.offload_parameters)):
        if place:
            parts.append(f"{state} offloaded to {'NVMe' if place == 'nvme' else 'CPU'}")
    if setting.gradient_checkpointing:
        parts.append("activation checkpointing")
    micro_batch = counted(setting.micro_batch, _example(job))
    parts.append(f"{counted(setting.accumulation(job), 'micro-batch')} of {micro_batch}")
    if idle := setting.idle(job):
        parts.append(f"{idle} of {counted(setting.gpus, 'GPU')} idle")
    if job.rollouts is not None and setting.gpus > 1:
        parts.append(_engine(job.rollouts, setting))
    return ", ".join(parts)


def _example(job: Job) -> str:
    """Noun for an example of the batch."""
    return "pair" if job.sequences > 1 else "completion" if job.rollouts is not None else "row"


def _step(job: Job) -> str:
    """Noun for the unit of the estimated times."""
    return "iteration" if job.rollouts is not None else "step"


def _trained(job: Job) -> str:
    """Trained weights: all or LoRA; listed by model if the models differ."""
    kinds = {
        m.role: "all weights trained" if m.trained == "all" else "LoRA" for m in job.learners if m.trained != "head"
    }
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return ", ".join(f"{role}: {kind}" for role, kind in kinds.items())


def _engine(rollouts: RolloutWork, setting: Setting) -> str:
    if rollouts.engine == "remote":
        return f"{counted(rollouts.servers, 'external rollout server')}"
    if rollouts.engine == "huggingface":
        return "transformers generation on rank 0"
    size = f" tensor parallel {setting.rollout_gpus}" if setting.rollout_gpus > 1 else ""
    return f"vLLM{size}{' with sleep mode' * setting.rollout_sleep}"


def text(job: Job, setting: Setting, plan: Plan | str, remedies: Sequence[Remedy]) -> str:
    """The report of one stage.

    plan: the plan, or the reason why `setting` cannot run with any amount of memory.
    """
    batch = (
        f"{'batch' if job.rollouts is None else 'mini-batch'} of {job.batch:,} {_example(job)}{'s' * (job.batch > 1)}"
    )
    head = f"{job.name}: {job.kind}, {_trained(job)}, up to {job.length:,} tokens per sequence, {batch}"
    lines = [head, f"  setting       {described(job, setting)}", *_idle_lines(job, setting)]
    if isinstance(plan, str):
        lines.append(f"  cannot run    {plan}")
    else:
        lines += [f"  {verdict(plan)}", *_memory_table(plan), *_step_lines(plan)]
    if isinstance(plan, str) or not plan.fits:
        lines += _all_remedies(remedies, job, setting)
    return "\n".join(lines)


def _idle_lines(job: Job, setting: Setting) -> list[str]:
    """Advice that gives every rank a micro-batch; empty if no rank is idle."""
    if not setting.idle(job):
        return []
    stage, gpus, count = f"stages.{job.name}", setting.gpus, -(-job.batch // setting.micro_batch)
    tokens = f"lower {stage}.micro_batch_tokens to {max(1, job.batch // gpus) * job.length}"
    rows = f"raise {stage}.mini_batch_size to {gpus} or more, or use at most {counted(job.batch, 'GPU')}"
    needed = [tokens] * (setting.micro_batch > 1) + [rows] * (job.batch < gpus)
    shared = f"{counted(count, 'micro-batch')} for {counted(gpus, 'GPU')}"
    return [f"  idle          a mini-batch of {counted(job.batch, 'completion')} has {shared}; {'; '.join(needed)}"]


def _all_remedies(remedies: Sequence[Remedy], job: Job, setting: Setting) -> list[str]:
    if not remedies:
        return [f"  no change found that makes it fit; tried: {', '.join(kinds_tried(job, setting))}"]
    return ["  smallest changes that make it fit:", *(line for remedy in remedies for line in _remedy_lines(remedy))]


def verdict(plan: Plan) -> str:
    cluster, found = plan.cluster, plan.memory
    if not plan.fits:
        return f"does not fit  {'; '.join(map(_shortage, plan.shortages))}"
    needed = found.gpu_bytes + cluster.reserve
    fits = f"fits          {_gb(needed)} of {_gb(cluster.gpu_memory)} GB per GPU"
    if found.host_bytes:
        there = f" of {_gb(cluster.host_memory)}" if cluster.host_memory else ""
        fits += f", {_gb(found.host_bytes * cluster.gpus_per_host)}{there} GB per host"
    if found.nvme_bytes:
        fits += f", {_gb(found.nvme_bytes * cluster.gpus_per_host)} GB of NVMe per host"
    return fits


def _shortage(shortage: Shortage) -> str:
    per = {"GPU": "per GPU", "host": "of memory per host", "NVMe": "of NVMe per host"}[shortage.where]
    needs = f"needs {_gb(shortage.needed)} GB {per}"
    if not shortage.available:
        return f"{needs}; pass --nvme"
    return f"{needs}, but {_gb(shortage.available)} GB are available"


def _memory_table(plan: Plan) -> list[str]:
    """Memory of one rank by component, one column each for GPU, host and NVMe. The GPU column shows the peak phase."""
    found = plan.memory
    columns = [("GPU", found.gpu), ("host", found.host), ("NVMe", found.nvme)]
    columns = [(title, column) for title, column in columns if column]
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    width = max(len(name) for name in [*names, "reserve"])
    lines = [f"  {'GB per rank':<{width}}" + "".join(f"{title:>10}" for title, _ in columns)]
    for name in names:
        lines.append(f"  {name:<{width}}" + "".join(f"{_cell(column.get(name)):>10}" for _, column in columns))
    totals = "".join(f"{_gb(sum(column.values())):>10}" for _, column in columns)
    lines.append(f"  {'total':<{width}}{totals}   (peak: {found.peak})")
    lines.append(f"  {'reserve':<{width}}{_gb(plan.cluster.reserve):>10}")
    if plan.job.rollouts is not None and plan.job.rollouts.engine == "remote":
        lines.append(f"  rollouts      {_servers(plan)}")
    return lines


def _servers(plan: Plan) -> str:
    needed = server_gpus(plan.job, plan.cluster)
    if needed is None:
        return "a server does not fit on 64 GPUs of this kind"
    size = sum(engine_bytes(plan.job, needed).values()) + plan.cluster.reserve
    return f"each server needs {counted(needed, 'more GPU')} of this kind and uses {_gb(size)} GB on each"


def _step_lines(plan: Plan) -> list[str]:
    flows = sorted(traffic(plan.job, plan.setting).items(), key=lambda flow: -flow[1])
    step = _step(plan.job)
    spent = plan.duration
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in spent.parts.items())
    lines = [f"  {f'time/{step}':<13} {_seconds(spent.fastest)} to {_seconds(spent.slowest)} ({parts})"]
    if flows:
        moved = ", ".join(f"{flow.name} {_gb(size)}" for flow, size in flows)
        lines.append(f"  GB received per GPU and {step}: {moved}")
    return lines


def _remedy_lines(remedy: Remedy) -> list[str]:
    plan = remedy.plan
    where = ""
    if remedy.name == "more GPUs":
        where = f" ({plan.setting.gpus} in {counted(plan.cluster.hosts, 'host')})"
    cost = f"{_gpu_share(plan)}, {_pace(plan)} per {_step(plan.job)}"
    lines = [f"    {remedy.name}{where}: {described(plan.job, plan.setting)}; {cost}"]
    if written := written_as(remedy):
        lines.append(f"      {' '.join(written)}")
    return lines


def written_as(remedy: Remedy) -> list[str]:
    """A remedy as overrides for the whole recipe."""
    return [*overrides(remedy.plan), *remedy.also, *batch_overrides(remedy.plan)]


def _gpu_share(plan: Plan) -> str:
    return f"{_gb(plan.memory.gpu_bytes + plan.cluster.reserve)} GB per GPU"


def _pace(plan: Plan) -> str:
    return f"{_seconds(plan.duration.fastest)} to {_seconds(plan.duration.slowest)}"


def search_text(job: Job, plans: Sequence[Plan], shown: int, remedies: Sequence[Remedy], requested: Setting) -> str:
    """The settings that fit, fastest first. If none fits, the changes to `requested` that make the stage fit."""
    if not plans:
        return "\n".join([f"{job.name}: no setting fits", *_all_remedies(remedies, job, requested)])
    fit = "1 setting fits" if len(plans) == 1 else f"{len(plans)} settings fit"
    lines = [f"{job.name}: {fit}; estimated time per {_step(job)}"]
    for plan in plans[:shown]:
        host = plan.memory.host_bytes * plan.cluster.gpus_per_host
        hosts = f", {_gb(host)} GB per host" if host else ""
        lines.append(f"  {_pace(plan):>18}  {_gpu_share(plan)}{hosts}  {described(job, plan.setting)}")
    if len(plans) > shown:
        lines.append(f"  and {len(plans) - shown} more (--show)")
    return "\n".join(lines)


def joint_text(plans: Sequence[Plan] | None) -> str:
    """The fastest `parallel` section that every stage fits in."""
    if plans is None:
        return "all stages: no single `parallel` section fits every stage; plan each with --stage"
    written = dict.fromkeys(override for plan in plans for override in overrides(plan))
    title = "all stages: the fastest common `parallel` section that fits, with each stage's settings:"
    return f"{title}\n  {' '.join(written)}"


def header(job: Job, cluster: Cluster, rates: Rates, source: str) -> str:
    shape = job.members[0].shape
    memory = f" of {_gb(cluster.host_memory)} GB" if cluster.host_memory else ""
    return (
        f"{shape.name}: {shape.parameters():,} parameters, {shape.active:,} active per token\n"
        f"{counted(cluster.gpus, 'GPU')} of {_gb(cluster.gpu_memory)} GB in {counted(cluster.hosts, 'host')}{memory}; "
        f"times at {rates.tflops:.0f} TFLOP/s, {rates.link:.0f} GB/s within a host, {rates.network:.0f} GB/s between "
        f"hosts ({source})"
    )


def _cell(size: float | None) -> str:
    return "" if size is None else _gb(size)


def _gb(size: float) -> str:
    value = size / GB
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
