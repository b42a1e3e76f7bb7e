"""Python's garbage collector, run at the same step on all ranks: else each stops at its own, and all wait for it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY = 200  # steps; what is collected are the few cycles of logs and saves, no step leaves any with tensors


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """Switches the automatic collector off, and puts what is there, which stays, out of the sight of later ones."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect(step: int, *, pause: bool) -> bool:
    """Collects where it is due, and says whether it was; pause: the ranks stop at this step anyway, as for a save."""
    due = pause or step % EVERY == 0
    if due:
        gc.collect()
    return due
