"""Losses that jump: each is held against the median of those before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 50  # losses whose median counts
ENOUGH = 20  # before so many are known nothing is a spike


class Spikes:
    """Tells which losses lie far above the recent ones; a median, because a spike itself hardly moves it."""

    def __init__(self, factor: float, losses: Iterable[float | None] = ()):
        """factor: of the median, above which a loss is a spike, 0 for never; losses: those of the steps before."""
        self.factor = factor
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=WINDOW)

    def times_median(self, loss: float | None) -> float | None:
        """Takes the next loss; how many times the median it is where that makes it a spike, else None.

        None as a loss, of a step without one, says nothing and is forgotten. The next losses are held against a
        spike like any other, so that a loss that stays high is a spike only until the median has followed.
        """
        if loss is None:
            return None
        usual = median(self._recent) if self.factor and len(self._recent) >= ENOUGH else 0.0
        self._recent.append(loss)
        return loss / usual if usual > 0 and loss > self.factor * usual else None
