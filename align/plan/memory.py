"""Memory of one rank by component: on its GPU in each phase of a step that may be the peak, on the host, on NVMe.

Mixed-precision AdamW takes 16 bytes per parameter: 2 weight + 2 gradient + 4 fp32 weight + 8 moments (Rajbhandari et
al., "ZeRO", arXiv 1910.02054, section 3.1). Sharding and buffers of each ZeRO stage follow the code of DeepSpeed
0.19.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.parallel.deepspeed_config import BUCKET
from align.plan import activations
from align.plan.activations import Pass
from align.plan.job import Job, Member
from align.plan.setting import Setting
from align.plan.sizes import LayerShape, by_groups

Bytes = dict[str, float]
FORWARD, LOSS, GENERATE, STEP = "forward", "loss", "generation", "optimizer step"
FROZEN = "frozen forward"
LAST_LAYER, FIRST_LAYER = "backward, last layer", "backward, first layer"
CHUNK_BYTES = 96 * 2**20
"""Bytes of fp32 logits that a loss computes at a time. Equals the constant of `align.losses.linear_head`, which is not
imported because that loads torch."""


@dataclass(frozen=True)
class Buffers:
    """Sizes of DeepSpeed's buffers in elements, and the number of swap buffers.

    Sizes that `align.parallel.deepspeed_config` does not set are DeepSpeed's defaults.
    """

    reduce_bucket: int = BUCKET
    prefetch: int = BUCKET
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    all_reduce: int = 500_000_000
    swap_buffers: int = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by component.

    phases: GPU memory in each phase of a step.
    host, nvme: host memory and NVMe, constant over the step.
    """

    phases: dict[str, Bytes]
    host: Bytes
    nvme: Bytes

    @property
    def peak(self) -> str:
        """The phase that takes the most GPU memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def gpu(self) -> Bytes:
        return self.phases[self.peak]

    @property
    def gpu_bytes(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def nvme_bytes(self) -> float:
        return sum(self.nvme.values())


def memory(job: Job, setting: Setting, buffers: Buffers | None = None, *, on_cpu: bool = False) -> Memory:
    """Memory of one rank for `job` under `setting`. on_cpu: count the operations that torch runs on a CPU."""
    rank = _Rank(job, setting, buffers or Buffers(), on_cpu)
    states = [rank.states(member) for member in job.members]
    resident, host, nvme = (_sum(*places) for places in zip(*states, strict=True))
    resident = _sum(resident, rank.always())
    phases: dict[str, Bytes] = {}
    several, passes = len(job.learners) > 1, setting.accumulation(job)
    for position, member in enumerate(job.learners):
        # The trained models of a stage process each micro-batch one after another; their optimizer steps come last.
        others = job.learners if passes > 1 else job.learners[:position]
        waiting = {f"{m.role} gradients": rank.kept_gradients(m) for m in others if m is not member}
        for name, there in rank.phases(member).items():
            phases[f"{member.role}: {name}" if several else name] = _sum(resident, waiting, there)
    for member in job.members:
        if member.frozen:
            phases[f"{member.role}: {FROZEN}"] = _sum(resident, rank.frozen_forward(member))
    if job.rollouts is not None:
        phases[GENERATE] = _sum({**resident, **rank.rollout()})
    return Memory(phases, host, nvme)


def _sum(*parts: Bytes) -> Bytes:
    """Add up component by component; components of size zero are dropped."""
    total: Bytes = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return {name: size for name, size in total.items() if size > 0}


def weight_width(job: Job, setting: Setting, member: Member) -> int:
    """Bytes per weight of a model. Without DeepSpeed, fully trained models have fp32 weights."""
    if job.dtype == "float32":
        return 4
    return 4 if member.trained == "all" and not setting.deepspeed else 2


def value_width(job: Job) -> int:
    """Bytes per activation value. Activations have the recipe's dtype, to which autocast casts fp32 weights."""
    return 4 if job.dtype == "float32" else 2


def engine_bytes(job: Job, gpus: int, *, idle: bool = False) -> Bytes:
    """Bytes on one GPU of a rollout engine that shards the policy over `gpus` GPUs. idle: between rollouts."""
    assert job.rollouts is not None
    weights = (4 if job.dtype == "float32" else 2) * job.members[0].parameters / gpus
    grows = job.rollouts.engine == "huggingface"
    return {"rollout weights": weights, "key/value cache": 0 if idle and grows else job.rollouts.cache_bytes}


def adapter_width(job: Job, setting: Setting, member: Member) -> int:
    """Bytes per trained weight: adapters are fp32, except under DeepSpeed, where all weights have the same dtype."""
    return weight_width(job, setting, member) if setting.deepspeed else 4


@dataclass(frozen=True)
class _Rank:
    """Memory of one rank of a stage, computed from the settings."""

    job: Job
    setting: Setting
    buffers: Buffers
    on_cpu: bool

    @property
    def wide(self) -> bool:
        return self.job.dtype == "float32"

    def weight_bytes(self, member: Member) -> int:
        return weight_width(self.job, self.setting, member)

    @property
    def value_bytes(self) -> int:
        return value_width(self.job)

    def adapter_bytes(self, member: Member) -> int:
        return adapter_width(self.job, self.setting, member)

    # --- throughout the step ----------------------------------------------------------------------------------

    def shard(self, counts: tuple[float, float], stage: int) -> float:
        """Parameters that a rank stores of the (expert, other) `counts`. ZeRO shards them from stage `stage` on."""
        experts, rest = counts
        sharded = self.setting.deepspeed and self.setting.zero_stage >= stage
        gpus, ep = self.setting.gpus, self.setting.expert_parallel_size
        return (experts + rest) / gpus if sharded else experts / ep + rest

    def states(self, member: Member) -> tuple[Bytes, Bytes, Bytes]:
        """(GPU, host, NVMe) bytes of weights and optimizer states."""
        setting, role, width = self.setting, member.role, self.weight_bytes(member)
        gpu: Bytes = {}
        host: Bytes = {}
        nvme: Bytes = {}
        shape = member.shape
        weights = width * self.shard((shape.experts, member.parameters - shape.experts), 3)
        if not setting.deepspeed:
            weights -= width * self.job.shared(member)
        if member.trained == "adapters":
            weights += self.adapter_bytes(member) * self.shard(member.trained_counts, 3)
            if member.lora is not None and member.lora.train_router:
                weights += width * self.shard((0, sum(layer.router for layer in shape.layers)), 3)
            if member.lora is not None and member.lora.train_embeddings:
                weights += width * self.shard((0, shape.embeddings(scorer=member.scorer)), 3)
            if member.lora is not None and member.lora.train_head:
                weights += width * self.shard((0, shape.head), 3)
        place = {None: gpu, "cpu": host, "nvme": nvme}[setting.offload_parameters]
        place[f"{role} weights"] = weights
        if member.trained == "nothing":
            return gpu, host, nvme
        mine = self.shard(member.trained_counts, 1)
        master = 4 * mine if self.has_master() else 0
        offload = setting.offload_optimizer
        place = {None: gpu, "cpu": host, "nvme": nvme}[offload]
        place[f"{role} fp32 weights"] = master
        place[f"{role} optimizer moments"] = 8 * mine
        if self.job.ema and role == "policy":
            (host if offload else gpu)[f"{role} EMA weights"] = 4 * mine
        if offload:
            place[f"{role} fp32 gradients"] = 4 * mine
            host[f"{role} gradients"] = width * mine
        if offload == "nvme":
            host[f"{role} swap buffers"] = self.buffers.swap_buffers * 4 * min(self.buffers.sub_group, mine)
        if setting.deepspeed and setting.zero_stage == 3:
            gpu[f"{role} gradients"] = 0 if offload else width * mine
            gpu["reduce bucket"] = width * self.buffers.reduce_bucket
        return gpu, host, nvme

    def has_master(self) -> bool:
        """True if the optimizer keeps an fp32 copy of the weights. ZeRO-1 to 3 do so even for fp32 weights."""
        return self.setting.deepspeed and (self.setting.zero_stage >= 1 or not self.wide)

    def always(self) -> Bytes:
        """PPO's state besides its models: an engine without sleep mode, and features of the critic's frozen trunk."""
        rollouts = self.job.rollouts
        if rollouts is None:
            return {}
        kept = {} if self.setting.rollout_sleep else self.rollout(idle=True)
        features = [m for m in self.job.members if m.trained == "head"]
        tokens = rollouts.completions * rollouts.max_new_tokens / self.setting.gpus
        return kept | {"critic features": sum(4 * tokens * m.shape.hidden_size for m in features)}

    def rollout(self, *, idle: bool = False) -> Bytes:
        """Weights and cache of an engine in this process. idle: between rollouts, when only vLLM keeps its cache."""
        rollouts = self.job.rollouts
        if rollouts is None or rollouts.engine == "remote":
            return {}
        return engine_bytes(self.job, self.setting.rollout_gpus, idle=idle)

    # --- gradients --------------------------------------------------------------------------------------------

    def whole_gradients(self, member: Member) -> float:
        """Unsharded gradients of all trained parameters."""
        experts, rest = member.trained_counts
        return self.adapter_bytes(member) * (experts / self.setting.expert_parallel_size + rest)

    def layer_gradients(self, member: Member, layer: LayerShape) -> float:
        """Gradients of one layer's weights on this rank, before reduction."""
        if member.trained != "all":
            return 0
        return self.weight_bytes(member) * (self.local_experts(layer) + layer.parameters - layer.experts)

    def local_experts(self, layer: LayerShape) -> float:
        return layer.experts / self.setting.expert_parallel_size

    def fresh_gradients(self, member: Member, layer: LayerShape) -> float:
        """Bytes of a layer's gradients when those of its experts are complete, temporary copies included.

        The larger stack of expert matrices (gate and up) has two thirds of the expert parameters. Under autocast its
        gradient exists in both bf16 and fp32. If gradients are sharded, the gradient of a stack larger than the bucket
        stays until it is reduced; a smaller one is copied into the bucket and flattened once more for the
        reduce-scatter. Under LoRA the experts have no gradients.
        """
        local, width = self.local_experts(layer), self.value_bytes
        if member.lora is not None:
            return 0.0
        stack = 2 / 3 * local
        if not self.sharded_gradients:
            cast = width * stack if width < self.weight_bytes(member) else 0
            return self.layer_gradients(member, layer) + cast
        rest = layer.parameters - layer.experts
        bucket = self.buffers.reduce_bucket
        flat, stays = (min(bucket, rest), local) if stack > bucket else (min(bucket, local + rest), stack)
        return width * (stays + flat)

    @property
    def sharded_gradients(self) -> bool:
        """True if a backward pass keeps only this rank's shard of the gradients: ZeRO-2, ZeRO-3, and ZeRO-1 without
        accumulation."""
        setting = self.setting
        once = setting.accumulation(self.job) == 1
        return setting.deepspeed and (setting.zero_stage >= 2 or (setting.zero_stage == 1 and once))

    @property
    def bucket_per_backward(self) -> bool:
        """True for ZeRO-1 and 2, which allocate the reduce bucket for each backward pass. ZeRO-3 keeps its bucket."""
        return self.setting.deepspeed and self.setting.zero_stage in (1, 2)

    def kept_gradients(self, member: Member) -> float:
        """Bytes of gradients that a backward pass leaves on the GPU. Those of ZeRO-3 are counted in `states`."""
        if not self.sharded_gradients:
            return self.whole_gradients(member)
        if self.setting.zero_stage == 3 or self.setting.offload_optimizer:
            return 0
        return self.weight_bytes(member) * self.shard(member.trained_counts, 1)

    # --- phases of a step -------------------------------------------------------------------------------------

    def phases(self, member: Member) -> dict[str, Bytes]:
        """GPU memory of a trained model in each phase: end of the forward pass, loss, backward pass of the last layer,
        backward pass of the first layer, optimizer step."""
        gradients = f"{member.role} gradients"
        if member.trained == "head":
            return {STEP: {gradients: 4 * member.shape.hidden_size}}
        setting, run, shape = self.setting, self.run(member), member.shape
        sharded = self.sharded_gradients
        checkpointed = setting.gradient_checkpointing
        keep = activations.checkpoint_bytes if checkpointed else activations.layer_bytes
        saved = sum(count * keep(shape, layer, run) for layer, count in shape.kinds)
        accumulated = self.kept_gradients(member) if setting.accumulation(self.job) > 1 else 0.0
        loss, head_gradient = self.head(member, run)
        forward: Bytes = {
            "activations": saved + self.outside_bytes(member, run),
            "cast weights": self.cast_weights(member),
            gradients: accumulated,
        }
        at_loss = {**forward, **self.gathered(member, again=True, arriving=False), "loss head": loss}
        last, first = shape.layers[-1], shape.layers[0]
        at_last = self.backward(member, last, saved, 0 if sharded else head_gradient, accumulated)
        at_last["cast weights"] = self.cast_weights(member)
        done = self.kept_gradients(member) - (0 if sharded else self.layer_gradients(member, first))
        at_first = self.backward(member, first, keep(shape, first, run), done, accumulated)
        return {
            FORWARD: {**forward, **self.gathered(member)},
            LOSS: at_loss,
            LAST_LAYER: at_last,
            FIRST_LAYER: at_first,
            STEP: self.step(member),
        }

    def frozen_forward(self, member: Member) -> Bytes:
        """Forward pass of a frozen model. It saves nothing, so only the activations of the largest layer count."""
        run, shape = self.run(member), member.shape
        working = activations.layer_bytes(shape, shape.largest_layer, run)
        return {"activations": working, "all-to-all": self.exchanged(member, run), **self.gathered(member)}

    def backward(self, member: Member, layer: LayerShape, saved: float, done: float, accumulated: float) -> Bytes:
        """Peak of one layer's backward pass.

        The peak is either inside the widest MLP, or when the experts' gradients are complete and the saved activations
        of the MLPs are freed.

        saved: bytes of the activations of this and earlier layers.
        done: bytes of the gradients of later layers.
        accumulated: bytes of the gradients of earlier micro-batches.
        """
        run, gradients = self.run(member), f"{member.role} gradients"
        recomputed = activations.layer_bytes(member.shape, layer, run) if self.setting.gradient_checkpointing else 0
        inside: Bytes = {
            "activations": saved + recomputed,
            "activation gradients": activations.backward_bytes(member.shape, layer, run, scorer=member.scorer),
            gradients: max(done, accumulated),
        }
        freed = activations.feed_forward_bytes(member.shape, layer, run)
        complete: Bytes = {
            "activations": saved + recomputed - freed,
            "activation gradients": 3 * run.tokens * run.bytes_per_value * member.shape.hidden_size,
            "layer gradients": self.fresh_gradients(member, layer),
            gradients: max(done, accumulated),
        }
        inside |= self.gathered(member, again=True)
        complete |= self.gathered(member, again=True, arriving=False)
        fuller = max(inside, complete, key=lambda found: sum(found.values()))
        bucket = self.buffers.reduce_bucket if self.bucket_per_backward else 0
        return {
            **fuller,
            "all-to-all": self.exchanged(member, run),
            "reduce bucket": self.weight_bytes(member) * bucket,
        }

    def run(self, member: Member) -> Pass:
        rows, length = self.setting.micro_batch * self.job.sequences, self.job.length
        value, weight = self.value_bytes, self.weight_bytes(member)
        return Pass(
            rows * length,
            length,
            False,
            value,
            weight,
            by_groups(member.lora) if member.lora else None,
            self.adapter_bytes(member) if member.lora else 4,
            looped=self.on_cpu or value == 4,
            pairs=self.job.sequences > 1,
            on_cpu=self.on_cpu,
        )

    def outside_bytes(self, member: Member, run: Pass) -> float:
        """Activations saved outside the layers, with token ids and masks."""
        small = 8 + 8 + (run.length if run.padded else 0)
        return run.tokens * (member.shape.activations.outside(run) + small)

    def cast_weights(self, member: Member) -> float:
        """bf16 copies of fp32 weights, which autocast keeps until the backward pass has used them."""
        narrow = self.value_bytes < self.weight_bytes(member)
        return 2 * member.parameters if narrow else 0

    def exchanged(self, member: Member, run: Pass) -> float:
        """Send and receive buffers of the expert all-to-all."""
        if self.setting.expert_parallel_size == 1 or not member.shape.experts:
            return 0
        k = max(layer.top_k for layer in member.shape.layers)
        return 2 * run.tokens * k * member.shape.hidden_size * run.bytes_per_value

    def gathered(self, member: Member, *, again: bool = False, arriving: bool = True) -> Bytes:
        """Weights gathered under ZeRO-3: of the running module, of prefetched modules, and of modules soon used again.

        Weights that are fetched together arrive in one buffer and are copied out of it. A frozen model keeps no weights
        for a backward pass.

        again: the backward pass; a small model is then still gathered from the forward pass.
        arriving: the experts' weights are being fetched.
        """
        if not (self.setting.deepspeed and self.setting.zero_stage == 3) or self.setting.gpus == 1:
            return {}
        layer, shape, ahead = member.shape.largest_layer, member.shape, self.buffers.prefetch
        # Without data-parallel replicas, experts are not sharded further and need no gathering.
        shared = self.setting.expert_replicas > 1
        experts = self.local_experts(layer) * shared
        largest = max(experts, shape.embedding, layer.mlp / 3)
        everything = member.parameters - shape.experts + shape.experts / self.setting.expert_parallel_size * shared
        reused = 0 if member.frozen else self.buffers.max_reuse_distance / 2
        kept = min(max(largest, reused) + ahead, everything)
        buffer = min(max(experts if arriving else 0, ahead), everything)
        if again and kept == everything:
            buffer = 0
        return {"gathered weights": self.weight_bytes(member) * (kept + buffer)}

    def head(self, member: Member, run: Pass) -> tuple[float, float]:
        """Bytes of (buffers of the loss, gradient of the head's weight). Logits are computed in chunks of tokens."""
        if member.scorer:
            return 0, 4 * member.shape.hidden_size
        shape = member.shape
        trained = member.trained == "all"
        gradient = 4 * shape.logits if trained else 0
        # Hidden states of the tokens with a loss, and their gradient.
        hidden = 2 * run.tokens * shape.hidden_size * run.bytes_per_value
        rows = max(1, min(run.tokens, CHUNK_BYTES // (4 * shape.vocab_size)))
        # Logits and their exponentials in fp32; in bf16 also the gradient of the logits.
        buffers = rows * shape.vocab_size * (8 if run.bytes_per_value == 4 else 8 + run.bytes_per_value)
        return buffers + gradient + hidden, gradient

    def step(self, member: Member) -> Bytes:
        """Gradients in the optimizer step, with DeepSpeed's copies of them. AdamW is fused and has no temporaries."""
        setting = self.setting
        kept: Bytes = {f"{member.role} gradients": self.kept_gradients(member)}
        if setting.offload_optimizer or not setting.deepspeed:
            return kept
        if setting.zero_stage == 0:  # flattened per bucket for the all-reduce; then all gradients in fp32
            trained = sum(member.trained_counts)
            flat = self.weight_bytes(member) * min(self.buffers.all_reduce, trained)
            return {**kept, "fp32 gradients": flat if self.wide else max(flat, 4 * trained)}
        group = min(self.buffers.sub_group, self.shard(member.trained_counts, 1))
        # ZeRO-3 flattens a sub-group's gradients and converts them to fp32; under ZeRO-1 and 2 they are flat already.
        flat = (4 if self.wide else 6) if setting.zero_stage == 3 else (0 if self.wide else 4)
        return {**kept, "fp32 gradients": flat * group}
