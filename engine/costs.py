"""What a step costs beside its loss: waiting for data, saving, and memory at its peak."""

from __future__ import annotations

import resource
import time
from typing import Any, Self

import torch

TICKS = 10_000  # in a second: costs travel with other whole numbers of 32 bits, which end at 59 hours
_MIB = 2**20


class Stopwatch:
    """Ticks that its `with` blocks have taken since they were last asked for."""

    def __init__(self) -> None:
        self._seconds = self._since = 0.0

    def __enter__(self) -> Self:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._since

    def take(self) -> int:
        ticks, self._seconds = round(self._seconds * TICKS), 0.0
        return ticks


def peak_memory(device: torch.device) -> tuple[int, int]:
    """MiB at their peak: of tensors on a CUDA device since the last call, and of this process since it began.

    The first is 0 without CUDA. Neither waits for the device. The second is the resident set, which the kernel keeps
    and nobody resets: it holds what of a save lies in the host's memory, too.
    """
    on_device = 0
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device) // _MIB
        torch.cuda.reset_peak_memory_stats(device)
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # which Linux gives in KiB


def cost_fields(seconds: float, data: int, save: int, on_device: int, on_host: int) -> dict[str, Any]:
    """These costs as a line of metrics.jsonl has them; ticks and MiB, of each the largest of all ranks.

    seconds: the step's. A step begins on all ranks at once and ends where the last one is done, so what is left of it
    after the longest wait for data was spent on computing and on collectives.
    """
    waited = min(data / TICKS, seconds)
    return {
        "data_seconds": waited,
        "compute_seconds": seconds - waited,
        "save_seconds": save / TICKS,
        "peak_device_mib": on_device or None,
        "peak_host_mib": on_host,
    }
