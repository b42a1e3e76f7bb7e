"""Keeps messages of the libraries below from drowning what a run says itself; import it before them."""

from __future__ import annotations

import logging
import os
import warnings

_PATTERNS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r".*is deprecated.* Please use",
    r"When using sequence parallelism it is recommended",
    r"TypedStorage is deprecated",
)


def silence_libraries() -> None:
    """Silences known warnings, progress bars and logs; our own and unknown ones stay."""
    for pattern in _PATTERNS:
        warnings.filterwarnings("ignore", message=pattern)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("megatron", "torch.distributed.checkpoint", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
