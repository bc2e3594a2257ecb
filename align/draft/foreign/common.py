"""Parts of the recipe that both importers share: batch, optimizer, LoRA, precision and processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.draft.foreign.keys import Keys
from align.errors import UserError

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")
LINEAR_SWITCHES = ["all-linear"]


@dataclass(frozen=True)
class Importing:
    """Flags of the command.

    devices: number of processes of the original run; its file does not contain it.
    batch_size: rows per optimizer step, for a file that packs rows before batching.
    """

    devices: int = 1
    batch_size: int | None = None


@dataclass
class Parts:
    """Parts of a recipe; an importer fills them."""

    name: str
    seed: int
    model: dict[str, Any]
    kind: str
    stage: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    parallel: dict[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        parallel = {"parallel": self.parallel} if self.parallel else {}
        head = {"name": self.name, "seed": self.seed, "dtype": self.dtype, **parallel, "model": self.model}
        return {**head, "stages": {self.kind: {"kind": self.kind, **self.stage}}}


def batch(keys: Keys, how: Importing, *, micro: str, default: int, packs: str | None, length: int) -> dict[str, Any]:
    """`batch_size` and `micro_batch_size`. packs: key, if any, that packs rows to `length` tokens before batching."""
    rows = keys.whole(micro, "micro_batch_size", default) or default
    steps = keys.whole("gradient_accumulation_steps", "batch_size", 1) or 1
    total = rows * steps * how.devices
    if packs is not None:
        if how.batch_size is None:
            raise UserError(
                f"{keys.path}: {packs}: a row of its batch is a pack of up to {length:,} tokens, so a step has up to "
                f"{total * length:,} tokens; align packs too, but counts rows before packing. Pass --batch-size: "
                f"{total * length:,} divided by the mean tokens of a row, which `align data stats` prints."
            )
        keys.mapped[packs] = "nothing: align always packs, without attention between rows"
        keys.differ(packs, f"batch_size {how.batch_size} is that of --batch-size; {total} packs there")
        keys.differ(micro, f"{rows} packs of {length} tokens per forward pass there, {rows} rows of that length here")
    else:
        keys.defaults["devices"] = f"batch_size is {total} = {rows} rows x {steps} steps x {how.devices} (--devices)"
        if how.batch_size is not None and how.batch_size != total:
            raise UserError(
                f"--batch-size {how.batch_size}: the file has {total} rows per step ({rows} x {steps} x {how.devices} "
                "devices). Leave it out, or pass the right --devices."
            )
    return {"batch_size": how.batch_size or total, "micro_batch_size": rows}


def optimizer(keys: Keys, *, rate: float | None, schedule: str, default: str, optim: str) -> dict[str, Any]:
    """The section `optimizer`. rate: default learning rate. schedule, optim: names of the keys."""
    found: dict[str, Any] = {"learning_rate": keys.number("learning_rate", "optimizer.learning_rate", rate)}
    found["weight_decay"] = keys.number("weight_decay", "optimizer.weight_decay") or 0.0
    found["betas"] = [
        keys.number("adam_beta1", "optimizer.betas", 0.9),
        keys.number("adam_beta2", "optimizer.betas", 0.999),
    ]
    found["eps"] = keys.number("adam_epsilon", "optimizer.eps") or 1e-8
    clip = keys.number("max_grad_norm", "optimizer.max_grad_norm")
    if clip is not None and clip <= 0:
        keys.reject("max_grad_norm", "align always clips gradients; the recipe clips at a norm of 1")
    found["max_grad_norm"] = clip or 1.0
    name = str(keys.take(schedule, "optimizer.schedule", default))
    if name in SCHEDULES:
        found["schedule"] = SCHEDULES[name]
    else:
        keys.reject(schedule, f"align has {', '.join(dict.fromkeys(SCHEDULES.values()))}; the recipe has its default")
    if optim in keys:
        keys.take(optim, "optimizer")
        if keys.values[optim] not in ADAMW:
            keys.reject(optim, "align trains with AdamW in float32")
    if (ratio := keys.number("loraplus_lr_ratio", "optimizer.lora_b_learning_rate_scale")) is not None:
        found["lora_b_learning_rate_scale"] = ratio
    return found


def warmup(keys: Keys, found: dict[str, Any], *, schedule: str, max_steps: int | None) -> None:
    """Set `warmup_fraction`. HF's `constant` has no warm-up."""
    steps, ratio = keys.whole("warmup_steps", "optimizer.warmup_fraction"), None
    if keys.values.get(schedule) == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            if key in keys:
                keys.mapped.pop(key, None)
                keys.ignored[key] = "the constant schedule has no warm-up there"
        found["warmup_fraction"] = 0.0
        return
    ratio = keys.number("warmup_ratio", "optimizer.warmup_fraction")
    if steps and max_steps:
        found["warmup_fraction"] = round(steps / max_steps, 6)
        if "warmup_ratio" in keys:
            keys.mapped.pop("warmup_ratio", None)
            keys.ignored["warmup_ratio"] = "warmup_steps takes precedence there"
    elif steps:
        keys.reject(
            "warmup_steps",
            f"the number of steps is not known here. Set optimizer.warmup_fraction to {steps} / steps (`align data "
            "stats` prints them); the recipe has 0.05",
        )
        if ratio is not None:
            keys.reject("warmup_ratio", "warmup_steps takes precedence there")
    else:
        found["warmup_fraction"] = ratio or 0.0


def lora(targets: list[str], *, rank: int, alpha: float, dropout: float, dora: bool, rslora: bool) -> dict[str, Any]:
    """The section `lora`. Adapters on routed experts allow neither dropout nor DoRA."""
    if targets == LINEAR_SWITCHES and (dropout or dora):
        targets = ["attention", "shared_expert"]
    found: dict[str, Any] = {"targets": targets, "rank": rank, "alpha": alpha}
    found |= {"dropout": dropout} if dropout else {}
    return found | ({"rslora": True} if rslora else {}) | ({"dora": True} if dora else {})


def quantize(keys: Keys, key: str, section: dict[str, Any], how: Importing) -> None:
    """Set `lora.quantize` from a key that quantises the frozen weights to 4 bits (NF4 of bitsandbytes)."""
    if how.devices > 1 or section.get("dora"):
        keys.reject(
            key, "align supports 4-bit weights in one process without DoRA only; the recipe trains on unquantized ones"
        )
        return
    keys.mapped[key] = "lora.quantize"
    section["quantize"] = "nf4"
    keys.differ(key, "the scales of the 4-bit values stay float32 here, and are quantized again by default there")


def linear_difference(section: dict[str, Any]) -> str:
    """Difference between adapters on all linear layers here and there. Dense models have none."""
    dense = section["targets"] != LINEAR_SWITCHES
    experts = "; routed experts have no adapters here, which need dropout 0 and no DoRA" if dense else ""
    return f"on a mixture of experts only: adapters on the router there, none on it here{experts}"


def full_modules(keys: Keys, key: str, section: dict[str, Any]) -> None:
    """Add fully trained modules to the section `lora`."""
    names = keys.words(key, "lora.modules_to_save")
    embeddings = [name for name in names if name == "embed_tokens"]
    head = [name for name in names if name == "lm_head"]
    section["targets"] = [*section["targets"], *(["embeddings"] if embeddings else ["lm_head"] if head else [])]
    if embeddings and not head:
        keys.differ(key, "align trains the input and output embeddings together")
    if others := [name for name in names if name not in ("embed_tokens", "lm_head")]:
        section["modules_to_save"] = others


def processes(keys: Keys, how: Importing) -> dict[str, Any] | None:
    """The section `parallel`, with the ZeRO stage of the file's DeepSpeed configuration."""
    if how.devices == 1:
        return None
    stage = 3
    settings = keys.values.get("deepspeed")
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = None
    if isinstance(settings, dict) and isinstance(settings.get("zero_optimization"), dict):
        stage = int(settings["zero_optimization"].get("stage", 0))
    return {"processes": how.devices, "zero_stage": stage}


def precision(keys: Keys) -> str:
    """`dtype` of the recipe."""
    half = keys.take("bf16", "dtype")
    if keys.values.get("fp16"):
        keys.reject("fp16", "align computes in float32 or bfloat16; the recipe has float32")
    if half == "auto":
        keys.differ("bf16", "bfloat16 on every device here; on GPUs that have it there")
    if half is None and "fp16" not in keys:
        keys.defaults["bf16"] = "dtype is float32"
    return "bfloat16" if half in (True, "auto") else "float32"


def held_out(keys: Keys, key: str, data: dict[str, Any]) -> None:
    """Set `held_out_fraction` from a key with a fraction or a number of rows."""
    value = keys.number(key, "data.held_out_fraction")
    if not value:
        return
    if value >= 1:
        keys.reject(key, "align holds out a fraction of the rows, not a number; set data.held_out_fraction")
        return
    data["held_out_fraction"] = value
    keys.differ(key, "other rows are held out: by a hash of the prompt, so that equal prompts stay together")


def steps_of(keys: Keys, epochs_key: str, default: float) -> dict[str, Any]:
    """`epochs` or `max_steps`."""
    most = keys.whole("max_steps", "max_steps")
    if most is not None and most > 0:
        if epochs_key in keys:
            keys.ignored[epochs_key] = "max_steps takes precedence"
        return {"max_steps": most}
    return {"epochs": keys.number(epochs_key, "epochs", default)}
