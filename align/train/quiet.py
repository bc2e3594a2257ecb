"""Keep the libraries' progress bars and warnings out of a run's log; `--verbose`, or ALIGN_VERBOSE=1, shows them."""

from __future__ import annotations

import logging
import os
import warnings

LOGGERS = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "DeepSpeed",
    "vllm",
    "torch._library",  # warns where Triton is not installed
)


def quieten() -> None:
    """Silence the libraries' warnings and progress bars.

    Errors and align's own output are still shown.
    """
    if os.environ.get("ALIGN_VERBOSE"):
        return
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bar
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_datasets_bar()
