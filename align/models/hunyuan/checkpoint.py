"""Names and layout of the published checkpoint, mapped to ours on load and back on save.

Published: one matrix an expert (`mlp.experts.E.gate_proj.weight`), router `mlp.gate.wg.weight`.
Ours: experts stacked (`mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]), router
`mlp.gate.weight`.
"""

from __future__ import annotations

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from align.models.hunyuan.configuration import HunYuanConfig


def register_published_layout() -> None:
    """Teach transformers' loader and saver the published layout."""
    register_checkpoint_conversion_mapping(
        HunYuanConfig.model_type,
        [
            WeightRenaming("mlp.gate.wg.weight", "mlp.gate.weight"),
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )
