"""A plan as plain values (for JSON) and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.parallel import Parallel
from align.distributed.plan.job import Job, Rollouts
from align.distributed.plan.memory import engine_bytes
from align.distributed.plan.search import Plan, Remedy
from align.distributed.plan.setting import GB, Cluster, Setting
from align.distributed.plan.speed import Rates, server_gpus
from align.distributed.plan.traffic import traffic

Values = dict[str, Any]


def plan_values(plan: Plan) -> Values:
    """Everything that is known of a plan; bytes, seconds."""
    found = plan.memory
    return {
        "stage": plan.job.name,
        "kind": plan.job.kind,
        "models": [
            {"role": m.role, "sizes": m.shape.name, "parameters": m.parameters, "trained": sum(m.trained_counts)}
            for m in plan.job.members
        ],
        "tokens_a_row": plan.job.length,
        "settings": setting_values(plan),
        "fits": plan.fits,
        "shortages": [{"where": s.where, "needed": s.needed, "available": s.available} for s in plan.shortages],
        "gpu_bytes": found.gpu_bytes,
        "fullest_moment": found.fullest,
        "moments": found.moments,
        "host_bytes_a_rank": found.host,
        "nvme_bytes_a_rank": found.nvme,
        "received_a_step": {
            f"{flow.name} ({flow.wire})": size for flow, size in traffic(plan.job, plan.setting).items()
        },
        "seconds_a_step": {"fastest": plan.duration.fastest, "slowest": plan.duration.slowest, **plan.duration.parts},
        "tokens_a_step": plan.duration.tokens,
    }


def setting_values(plan: Plan) -> Values:
    setting = plan.setting
    values: Values = {
        "gpus": setting.gpus,
        "hosts": plan.cluster.hosts,
        "deepspeed": setting.deepspeed,
        "zero_stage": setting.zero_stage,
        "expert_parallel_size": setting.expert_parallel_size,
        "offload_optimizer": setting.offload_optimizer,
        "offload_parameters": setting.offload_parameters,
        "gradient_checkpointing": setting.gradient_checkpointing,
        "micro_batch": setting.micro_batch,
        "accumulation": setting.accumulation(plan.job),
    }
    if plan.job.rollouts is not None:
        values |= {"rollout_gpus": setting.rollout_gpus, "rollout_sleep": setting.rollout_sleep}
    return values


def overrides(plan: Plan) -> list[str]:
    """The plan's settings as changes to the recipe, in the form that `align run` takes them."""
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
        found += [f"parallel.offload.{what}={now or 'null'}" for what, now, was in places if now or was]
        if "nvme" in (setting.offload_optimizer, setting.offload_parameters):
            found.append(f"parallel.offload.path={before.path or 'FOLDER'}")
        elif before.path:
            found.append("parallel.offload.path=null")
    if setting.gradient_checkpointing != plan.job.gradient_checkpointing:
        found.append(f"{stage}.gradient_checkpointing={str(setting.gradient_checkpointing).lower()}")
    if setting.micro_batch != plan.job.micro_batch:
        if plan.job.kind == "ppo":
            found.append(f"{stage}.micro_batch_tokens={setting.micro_batch * plan.job.length}")
        else:
            found.append(f"{stage}.micro_batch_size={setting.micro_batch}")
    if plan.job.rollouts is not None and setting.rollout_sleep != plan.job.rollouts.sleeps:
        found.append(f"{stage}.rollout.sleep={str(setting.rollout_sleep).lower()}")
    return found


def described(job: Job, setting: Setting) -> str:
    """One line: how a stage is spread."""
    parts = [f"ZeRO-{setting.zero_stage}" if setting.deepspeed else "one process without DeepSpeed"]
    if setting.expert_parallel_size > 1:
        parts.append(f"experts over {setting.expert_parallel_size}")
    for what, place in (("optimizer", setting.offload_optimizer), ("weights", setting.offload_parameters)):
        if place:
            parts.append(f"{what} on {'NVMe' if place == 'nvme' else 'the CPU'}")
    if setting.gradient_checkpointing:
        parts.append("activations recomputed")
    unit = "pair" if job.sequences > 1 else "completion" if job.kind == "ppo" else "row"
    passes = setting.accumulation(job)
    parts.append(f"{setting.micro_batch} {unit}{'s' * (setting.micro_batch > 1)} x {passes} pass{'es' * (passes > 1)}")
    if job.rollouts is not None and setting.gpus > 1:
        parts.append(_engine(job.rollouts, setting))
    return ", ".join(parts)


def _engine(rollouts: Rollouts, setting: Setting) -> str:
    if rollouts.engine == "remote":
        return f"{rollouts.servers} rollout server{'s' * (rollouts.servers > 1)} elsewhere"
    return f"vLLM over {setting.rollout_gpus}{', which sleeps' * setting.rollout_sleep}"


def text(plan: Plan, remedies: Sequence[Remedy], why_not: str | None = None) -> str:
    """One stage's plan. why_not: what keeps it from running whatever the memory."""
    job = plan.job
    kinds = sorted({"full" if m.trained == "all" else "LoRA" for m in job.learners if m.trained != "head"})
    head = f"{job.name}: {job.kind}, {' and '.join(kinds)}, {job.length:,} tokens a row, batch {job.batch:,}"
    lines = [head, f"  as written    {described(job, plan.setting)}"]
    if why_not is not None:
        lines.append(f"  cannot run    {why_not}")
    else:
        lines += [f"  {verdict(plan)}", *_memory_table(plan), *_step_lines(plan)]
    if remedies:
        lines.append("  smallest changes that make it fit:" if why_not is None else "  smallest changes:")
        lines += [line for remedy in remedies for line in _remedy_lines(remedy)]
    elif not plan.fits or why_not is not None:
        lines.append("  no setting, number of GPUs, LoRA or shorter rows that were tried make it fit")
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    cluster, found = plan.cluster, plan.memory
    if not plan.fits:
        short = [
            f"a {s.where} needs {_gb(s.needed)} of {_gb(s.available)} GB" if s.available else f"there is no {s.where}"
            for s in plan.shortages
        ]
        return f"does not fit  {'; '.join(short)}"
    needed = found.gpu_bytes + cluster.reserve
    fits = f"fits          {_gb(needed)} of {_gb(cluster.gpu_memory)} GB a GPU"
    if found.host_bytes:
        there = f" of {_gb(cluster.host_memory)}" if cluster.host_memory else ""
        fits += f", {_gb(found.host_bytes * cluster.gpus_a_host)}{there} GB a host"
    if found.nvme_bytes:
        fits += f", {_gb(found.nvme_bytes * cluster.gpus_a_host)} GB of NVMe a host"
    return fits


def _memory_table(plan: Plan) -> list[str]:
    """Components by place, of one rank. The GPU's column is its fullest moment."""
    found = plan.memory
    columns = [("GPU", found.gpu), ("host", found.host), ("NVMe", found.nvme)]
    columns = [(title, column) for title, column in columns if column]
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    width = max(len(name) for name in [*names, "not for tensors"])
    lines = [f"  {'GB a rank':<{width}}" + "".join(f"{title:>10}" for title, _ in columns)]
    for name in names:
        lines.append(f"  {name:<{width}}" + "".join(f"{_cell(column.get(name)):>10}" for _, column in columns))
    totals = "".join(f"{_gb(sum(column.values())):>10}" for _, column in columns)
    lines.append(f"  {'all':<{width}}{totals}   (fullest moment: {found.fullest})")
    lines.append(f"  {'not for tensors':<{width}}{_gb(plan.cluster.reserve):>10}")
    if plan.job.rollouts is not None and plan.job.rollouts.engine == "remote":
        lines.append(f"  rollouts      {_servers(plan)}")
    return lines


def _servers(plan: Plan) -> str:
    needed = server_gpus(plan.job, plan.cluster)
    if needed is None:
        return "a server needs larger GPUs than these"
    size = sum(engine_bytes(plan.job, needed).values()) + plan.cluster.reserve
    return f"each server needs {needed} such GPUs beside these ({_gb(size)} GB each)"


def _step_lines(plan: Plan) -> list[str]:
    flows = sorted(traffic(plan.job, plan.setting).items(), key=lambda flow: -flow[1])
    step = "a round" if plan.job.rollouts is not None else "a step"
    spent = plan.duration
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in spent.parts.items())
    lines = [f"  time {step}   {_seconds(spent.fastest)} to {_seconds(spent.slowest)} ({parts})"]
    if flows:
        moved = ", ".join(f"{flow.name} {_gb(size)}" for flow, size in flows)
        lines.append(f"  GB received by a GPU {step}: {moved}")
    return lines


def _remedy_lines(remedy: Remedy) -> list[str]:
    plan = remedy.plan
    where = f" on {plan.setting.gpus} GPUs in {plan.cluster.hosts} hosts" if remedy.what == "more GPUs" else ""
    lines = [f"    {remedy.what}{where}: {described(plan.job, plan.setting)}; {_gpu_share(plan)}, {_pace(plan)}"]
    written = [*overrides(plan), *remedy.also]
    if written:
        lines.append(f"      {' '.join(written)}")
    return lines


def _gpu_share(plan: Plan) -> str:
    return f"{_gb(plan.memory.gpu_bytes + plan.cluster.reserve)} GB a GPU"


def _pace(plan: Plan) -> str:
    return f"{_seconds(plan.duration.fastest)} to {_seconds(plan.duration.slowest)}"


def search_text(job: Job, plans: Sequence[Plan], shown: int) -> str:
    """Feasible settings, the fastest first."""
    if not plans:
        return f"{job.name}: nothing fits"
    lines = [f"{job.name}: {len(plans)} settings fit; estimated seconds a {'round' if job.rollouts else 'step'}"]
    for plan in plans[:shown]:
        host = plan.memory.host_bytes * plan.cluster.gpus_a_host
        beside = f", {_gb(host)} GB a host" if host else ""
        lines.append(f"  {_pace(plan):>18}  {_gpu_share(plan)}{beside}  {described(job, plan.setting)}")
    if len(plans) > shown:
        lines.append(f"  and {len(plans) - shown} more (--show)")
    return "\n".join(lines)


def joint_text(plans: Sequence[Plan] | None) -> str:
    """One `parallel` section for all stages."""
    if plans is None:
        return "all stages: no single `parallel` section fits every stage; plan them one by one with --stage"
    written = dict.fromkeys(override for plan in plans for override in overrides(plan))
    return "\n".join(["all stages together, the fastest that fits:", f"  {' '.join(written)}"])


def header(job: Job, cluster: Cluster, rates: Rates, source: str) -> str:
    shape = job.members[0].shape
    hosts = f"{cluster.hosts} host{'s' * (cluster.hosts > 1)}"
    memory = f" with {_gb(cluster.host_memory)} GB" if cluster.host_memory else ""
    return (
        f"{shape.name}: {shape.parameters():,} parameters, {shape.active:,} active a token\n"
        f"{cluster.gpus} GPU{'s' * (cluster.gpus > 1)} of {_gb(cluster.gpu_memory)} GB in {hosts}{memory}; times from "
        f"{rates.tflops:.0f} TFLOP/s, {rates.link:.0f} GB/s in a host, {rates.network:.0f} GB/s between ({source})"
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
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
