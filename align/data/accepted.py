"""Shapes of rows that each stage accepts in each of its sources. Nothing here loads a heavy library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from align.config.parts import Source
from align.config.ppo import PpoStage
from align.config.stages import (
    DpoStage,
    EvaluateStage,
    KtoStage,
    PretrainStage,
    RewardModelStage,
    SamplingStage,
    SftStage,
    Stage,
)
from align.data.shapes import Shape

Kind = Literal["text", "sft", "sft_all_tokens", "reward_pairs", "dpo_pairs", "labelled", "prompts"]

ACCEPTED: dict[Kind, tuple[Shape, ...]] = {
    "text": ("text", "messages", "prompt_completion", "token_ids"),
    "sft": ("messages", "prompt_completion", "token_ids"),
    "sft_all_tokens": ("messages", "prompt_completion", "text", "token_ids"),
    "reward_pairs": ("preference",),
    "dpo_pairs": ("preference",),
    "labelled": ("unpaired", "preference"),
    "prompts": ("prompt", "prompt_completion", "preference", "messages"),
}
"""Shapes that each kind of trainer accepts."""


def sources_of(stage: Stage) -> Iterator[tuple[str, Source, Kind]]:
    """(field, source, kind of the rows) of every source of a stage, except those of an evaluation's tasks.

    Sources of a kind of stage that is not listed here are not known.
    """
    match stage:
        case SamplingStage():
            fields: dict[str, tuple[list[Source], Kind]] = {
                "train": (stage.train, "prompts"),
                "held_out": (stage.held_out, "prompts"),
            }
        case PpoStage():
            fields = {"prompts": (stage.prompts, "prompts")}
        case EvaluateStage():
            fields = {"prompts": (stage.prompts, "prompts"), "preferences": (stage.preferences, "dpo_pairs")}
        case PretrainStage() | SftStage() | RewardModelStage() | DpoStage() | KtoStage():
            kind = _kind_of(stage)
            fields = {"data.train": (stage.data.train, kind), "data.held_out": (stage.data.held_out, kind)}
        case _:
            fields = {}
    for field, (sources, kind) in fields.items():
        for source in sources:
            yield field, source, kind


def _kind_of(stage: PretrainStage | SftStage | RewardModelStage | DpoStage | KtoStage) -> Kind:
    match stage:
        case PretrainStage():
            return "text"
        case SftStage():
            return "sft" if stage.assistant_only_loss else "sft_all_tokens"
        case RewardModelStage():
            return "reward_pairs"
        case DpoStage():
            return "dpo_pairs"
        case KtoStage():
            return "labelled"
