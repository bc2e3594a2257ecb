"""Plugin of align for vLLM. vLLM calls `register`, the entry point `vllm.general_plugins`, in each of its processes.

Heavy imports are inside the function, so that finding the plugin costs nothing.
"""

from __future__ import annotations

from contextlib import suppress

TRANSFERS = {"align_host": "HostTransfer", "align_nccl": "NcclTransfer", "align_ipc": "IpcTransfer"}
"""Weight-transfer engines: {name in vLLM: class in `align.rollout.sync.vllm_side`}."""


def register() -> None:
    """Register the families' model classes and the weight transfers, and correct vLLM's own classes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    import align.models  # noqa: F401 (registers the families)
    from align.models.family import FAMILIES
    from align.rollout import vllm_fixes, vllm_lora

    for family in FAMILIES.values():
        family.prepare_vllm()
    for name, engine in TRANSFERS.items():
        with suppress(ValueError):  # already registered in this process
            WeightTransferEngineFactory.register_engine(name, "align.rollout.sync.vllm_side", engine)
    vllm_fixes.apply()
    vllm_lora.correct_products()
