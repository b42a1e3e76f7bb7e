"""Learning-rate schedules: a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import OptimConfig


# From how far the decay has come, 0 to 1, to the share of the way from `min_lr` to `lr` that is left.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1 - progress,
}


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of `step` (from 1): the schedule's value after step - 1 updates, as Megatron and transformers.

    Warmup runs linearly from `warmup_init`; "cosine" and "linear" then decay to `min_lr` at `total_steps`;
    "wsd" stays at `lr` and decays linearly over the last `decay_steps`.
    """
    done = step - 1
    if done < optim.warmup_steps:
        return optim.warmup_init + (optim.lr - optim.warmup_init) * done / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    start = total_steps - optim.decay_steps if optim.schedule == "wsd" else optim.warmup_steps
    progress = min(max((done - start) / max(1, total_steps - start), 0.0), 1.0)
    return optim.min_lr + (optim.lr - optim.min_lr) * DECAYS[optim.schedule](progress)
