"""A LoRA adapter in PEFT's format on disk: its settings, its tensors and the parameters of the base that they change.

Only JSON and the headers of safetensors files are read, so an adapter that does not fit its base is refused before
weights are loaded.

Shapes: E experts, r rank, I inputs, O outputs, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.errors import UserError
from align.models.experts import Experts
from align.models.family import LoraTargets, family_of
from align.models.weight_files import StoredTensor, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
UNSUPPORTED = (
    ("bias", "none"),
    ("lora_bias", False),
    ("fan_in_fan_out", False),
    ("alora_invocation_tokens", None),
    ("layer_replication", None),
    ("trainable_token_indices", None),
    ("use_qalora", False),
    ("use_bdlora", None),
    ("kasa_config", None),
    ("arrow_config", None),
    ("monteclora_config", None),
)
"""Settings of PEFT's LoRA, each with the only value that can be merged."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of PEFT's initialisations that change the base model's weights whenever the adapter is loaded."""


@dataclass(frozen=True)
class LowRank:
    """Low-rank update s B A of one parameter.

    a: A [r, I], or for a stack of experts [E r, I], ordered by expert.
    b: B [O, r], or [O, r E], ordered by rank. For an embedding A is [r, V] and B is [D, r].
    scaling: s.
    experts: E, or None for a matrix.
    transposed: The parameter is stored as [I, O].
    magnitude: DoRA's norm of each row [O], if any.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    experts: int | None = None
    transposed: bool = False
    magnitude: StoredTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // (self.experts or 1)


@dataclass(frozen=True)
class Whole:
    """A parameter that the adapter replaces (`modules_to_save`)."""

    tensor: StoredTensor


Change = LowRank | Whole


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, its adapter_config.json and its tensors by name, without PEFT's prefix."""

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def scaling(self, key: str, rank: int) -> float:
        """Factor of B A for the module or parameter `key`."""
        alpha = self._patterned("alpha_pattern", key, self.settings.get("lora_alpha", 8))
        return float(alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank)

    def rank(self, key: str) -> int:
        """The rank that the settings give to the module or parameter `key`."""
        return int(self._patterned("rank_pattern", key, self.settings.get("r", 8)))

    def _patterned(self, name: str, key: str, default: float) -> float:
        patterns: dict[str, float] = self.settings.get(name) or {}
        found = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", key)), None)
        return default if found is None else patterns[found]


@dataclass(frozen=True)
class Skeleton:
    """The parameters of a base model, found without its weights.

    shapes: Shape of every parameter and buffer, by name, and of every published tensor, by its published name.
    published: Names of the published tensors that are not also names of parameters or buffers.
    experts: Number of experts in each stacked parameter.
    transposed: Names of stacks that are stored as [E, I, O].
    tied: The head is the embedding.
    embedding, head: Names of the modules that embed tokens and compute logits.
    serves_expert_adapters: As in `Family`.
    """

    shapes: dict[str, tuple[int, ...]]
    published: frozenset[str]
    experts: dict[str, int]
    transposed: frozenset[str]
    targets: LoraTargets
    tied: bool
    embedding: str
    head: str | None
    serves_expert_adapters: bool = False

    def group(self, name: str) -> str:
        """The group of a parameter: attention, shared_expert, routed_experts, router, embeddings, lm_head, score or
        other."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        leaf = module.rpartition(".")[2]
        if name in self.experts or re.search(r"\.experts\.\d+\.", name):
            return "routed_experts"
        if any(part.endswith(tuple(f".{router}" for router in self.targets.router)) for part in (name, module)) or any(
            f".{router}." in name for router in self.targets.router
        ):
            return "router"
        special = {self.embedding: "embeddings", self.head: "lm_head", "score": "score"}
        if module in special:
            return special[module]
        if leaf in self.targets.attention and leaf not in self.targets.mlp:
            return "attention"
        return "shared_expert" if leaf in self.targets.mlp else "other"


def skeleton(config: Any, *, scorer: bool = False) -> Skeleton:
    """The parameters of a language model with this configuration, and with `scorer` also those of a score head."""
    family = family_of(config)
    with torch.device("meta"):
        model: Any = family.policy(config)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shapes = family.published_shapes(config) | own
    if scorer:
        shapes["score.weight"] = (1, config.hidden_size)
    experts: dict[str, int] = {}
    transposed = set()
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, Experts):
            stacks = [f"{name}.{key}" for key, values in module.named_parameters(recurse=False) if values.dim() == 3]
            experts |= dict.fromkeys(stacks, module.num_experts)
            transposed |= set(stacks) if module.is_transposed else set()
    head = model.get_output_embeddings()
    return Skeleton(
        shapes,
        frozenset(shapes) - frozenset(own) - {"score.weight"},
        experts,
        frozenset(transposed),
        family.lora(config),
        bool(config.tie_word_embeddings),
        names[model.get_input_embeddings()],
        names[head] if head is not None else None,
        family.serves_expert_adapters,
    )


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's settings and headers; `UserError` unless it is a LoRA adapter in safetensors."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: not an adapter ({CONFIG} does not exist); pass the folder that PEFT saved.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not valid JSON, so the adapter is damaged; copy or download it again.")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type is '{kind}', but only LORA adapters can be used; train a LoRA adapter.")
    for name, only in UNSUPPORTED:
        if settings.get(name) not in (only, None, [], {}):
            raise UserError(
                f"{path}: {name} is {settings[name]!r}, which cannot be merged into a weight; train an adapter "
                f"with {name}: {json.dumps(only)}."
            )
    init = str(settings.get("init_lora_weights")).lower()
    if init.startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights is '{init}', so PEFT changes the base model's weights when it loads the "
            "adapter; save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "save it as safetensors (pickled weights are never loaded)" if pickled else "copy the missing file"
        raise UserError(f"{folder}: {WEIGHTS} does not exist; {fix}.")
    tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in stored_tensors([folder / WEIGHTS])}
    if not tensors:
        raise UserError(f"{folder}: {WEIGHTS} has no tensors; save the adapter again.")
    return Adapter(folder, settings, tensors)


def changes(adapter: Adapter, base: Skeleton) -> dict[str, Change]:
    """Changes by the adapter, by the name of the parameter or published tensor; `UserError` if it does not fit the
    base."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    found: dict[str, Change] = {}
    for name, tensor in adapter.tensors.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[match["kind"].replace("embedding_", "")] = tensor
        else:
            parameter = name.replace(".base_layer", "")
            _require_shape(adapter, parameter, tensor, base)
            found[parameter] = Whole(tensor)
    for key, parts in factors.items():
        name, change = _low_rank(adapter, key, parts, base)
        if name in found:
            raise UserError(f"{adapter.folder}: it changes '{name}' twice; train the adapter again.")
        found[name] = change
    _require_all_layers(adapter, found, base)
    _require_tied(adapter, found, base)
    return found


def _require_shape(adapter: Adapter, name: str, tensor: StoredTensor, base: Skeleton) -> None:
    shape = base.shapes.get(name)
    if shape is None:
        raise UserError(f"{adapter.folder}: the base has no parameter '{name}'; pass the model it was trained on.")
    if tensor.shape != shape:
        raise UserError(
            f"{adapter.folder}: '{name}' has the shape {list(tensor.shape)}, but the base model's has {list(shape)}; "
            "pass the model it was trained on."
        )


def _low_rank(adapter: Adapter, key: str, parts: dict[str, StoredTensor], base: Skeleton) -> tuple[str, LowRank]:
    """The update by the factors of the module `key`, and the name of the parameter."""
    where = adapter.folder
    for kind in ("lora_A", "lora_B"):
        if kind not in parts:
            raise UserError(f"{where}: '{key}' has no {kind}; copy the whole file, or save the adapter again.")
    a, b = parts["lora_A"], parts["lora_B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UserError(
            f"{where}: the factors of '{key}' have {max(len(a.shape), len(b.shape))} dimensions, but PEFT saves "
            "matrices; save the adapter again with PEFT's save_pretrained."
        )
    module = key.replace(".base_layer", "")
    stacks = [name for name in base.experts if name.rpartition(".")[0] == module]
    if stacks:
        return _of_stack(adapter, module, stacks, a, b, base)
    name = f"{module}.weight"
    shape = base.shapes.get(name)
    if shape is None:
        raise UserError(f"{where}: the base model has no layer '{module}'; pass the model it was trained on.")
    rank, is_embedding = a.shape[0], module == base.embedding
    fits = (b.shape[0], a.shape[1]) == (shape[::-1] if is_embedding else shape) and b.shape[1] == rank
    if not fits:
        raise UserError(
            f"{where}: the factors of '{module}' have the shapes {list(a.shape)} and {list(b.shape)}, but the base "
            f"model's weight has {list(shape)}; pass the model it was trained on."
        )
    _require_rank(adapter, module, rank)
    magnitude = parts.get("lora_magnitude_vector")
    if adapter.settings.get("use_dora") and magnitude is None:
        raise UserError(f"{where}: '{module}' has no magnitudes, but use_dora is true; save the adapter again.")
    return name, LowRank(a, b, adapter.scaling(module, rank), transposed=is_embedding, magnitude=magnitude)


def _of_stack(
    adapter: Adapter, module: str, stacks: list[str], a: StoredTensor, b: StoredTensor, base: Skeleton
) -> tuple[str, LowRank]:
    """The update of one of a module's stacks. PEFT's names do not tell which one, but the sizes differ."""
    for name in stacks:
        transposed, experts = name in base.transposed, base.experts[name]
        outputs, inputs = base.shapes[name][1:][::-1] if transposed else base.shapes[name][1:]
        if (b.shape[0], a.shape[1]) != (outputs, inputs):
            continue
        if a.shape[0] != b.shape[1] or a.shape[0] != adapter.rank(name) * experts:
            raise UserError(
                f"{adapter.folder}: the factors of '{name}' have {a.shape[0]} and {b.shape[1]} rows of rank "
                f"{adapter.rank(name)}, but the base model has {experts} experts; pass the model it was trained on."
            )
        rank = a.shape[0] // experts
        return name, LowRank(a, b, adapter.scaling(name, rank), experts, transposed)
    sizes = ", ".join(str(list(base.shapes[name])) for name in stacks)
    raise UserError(
        f"{adapter.folder}: the factors of '{module}' have the shapes {list(a.shape)} and {list(b.shape)}, but the "
        f"base model's experts have {sizes}; pass the model it was trained on."
    )


def _require_rank(adapter: Adapter, module: str, rank: int) -> None:
    if rank != adapter.rank(module):
        raise UserError(
            f"{adapter.folder / CONFIG}: the rank of '{module}' is {adapter.rank(module)}, but its factors have "
            f"{rank}, so the scaling is not known; restore the file that was saved with the weights."
        )


def _require_all_layers(adapter: Adapter, found: dict[str, Change], base: Skeleton) -> None:
    """Raise `UserError` if PEFT would have put an adapter on a layer that has none, as on a base with more layers."""
    settings = adapter.settings
    targets = settings.get("target_modules")
    limited = settings.get("layers_to_transform") is not None or settings.get("exclude_modules")
    modules = tuple(f".{name}" for name in targets) if isinstance(targets, list) else ()
    stacks = tuple(f".{name}" for name in settings.get("target_parameters") or ())
    for name in () if limited else base.shapes:
        module, _, leaf = name.rpartition(".")
        targeted = name in base.experts and name.endswith(stacks) if stacks else False
        if leaf == "weight" and modules and f".{module}".endswith(modules):
            targeted = name not in base.experts and ".experts." not in name
        if targeted and name not in found:
            raise UserError(
                f"{adapter.folder}: it has no factors for '{name}', although its settings target it; pass the model "
                "it was trained on."
            )


def _require_tied(adapter: Adapter, found: dict[str, Change], base: Skeleton) -> None:
    embedding, head = f"{base.embedding}.weight", f"{base.head}.weight"
    if not base.tied or adapter.settings.get("task_type") == "SEQ_CLS":
        return
    one = [name for name in (embedding, head) if name in found]
    both_whole = len(one) == 2 and all(isinstance(found[name], Whole) for name in one)
    if one and not both_whole:
        raise UserError(
            f"{adapter.folder}: it changes '{one[0]}', but the base model uses one matrix for embedding and head; "
            "train both in full, or neither."
        )


def read(tensor: StoredTensor) -> Tensor:
    """A stored tensor in float32; `UserError` for values that are not finite."""
    values = torch.empty(tensor.shape, dtype=torch.float32)
    tensor.read_into(values)
    return values


def require_finite_adapter(adapter: Adapter) -> None:
    """Read every value; raise `UserError` if one is not finite."""
    for tensor in adapter.tensors.values():
        read(tensor)


def require_fitting(folder: Path, config: Any) -> None:
    """Raise `UserError` unless the adapter is complete, finite and fits a base model with this configuration."""
    adapter = read_adapter(folder)
    changes(adapter, skeleton(config))
    require_finite_adapter(adapter)


def serving_problems(found: dict[str, Change], adapter: Adapter, base: Skeleton) -> Iterator[str]:
    """Reasons why the adapter cannot be served beside its base (`align serve`). Merged into it, it can be served."""
    kept = {base.group(name) for name, change in found.items() if isinstance(change, Whole)}
    if kept:
        yield f"it trains in full: {', '.join(sorted(kept))}"
    adapted = {base.group(name) for name, change in found.items() if isinstance(change, LowRank)}
    served = {"attention", "shared_expert"} | ({"routed_experts"} if base.serves_expert_adapters else set())
    if adapted - served:
        yield f"it has factors on: {', '.join(sorted(adapted - served))}"
    if adapter.settings.get("use_dora"):
        yield "it is a DoRA adapter"
