"""A step's numbers under the names that other trainers log, beside ours: dashboards made for theirs show ours."""

from collections.abc import Iterable
from typing import Any


class TrackerNames:
    """Adds up what has been trained on since the run's start: `lines` are the steps before, of metrics.jsonl."""

    def __init__(self, lines: Iterable[dict[str, Any]], devices: int) -> None:
        self.devices, self.tokens, self.padding = devices, 0, 0
        for line in lines:
            self._count(line)

    def numbers(self, line: dict[str, Any]) -> dict[str, float | None]:
        """What is to be logged of the next step; None for what is not known of it."""
        self._count(line)
        rate = line.get("tokens_per_second")
        share = 1 + (line.get("padding_tokens") or 0) / line["tokens"] if line["tokens"] else None
        each = None if rate is None else rate / self.devices
        return {
            "train_loss": line.get("loss"),
            "learning_rate": line.get("lr"),
            "total_tokens": self.tokens,
            "total_tokens_including_padding": self.tokens + self.padding,
            "per_device_tps": each,
            "per_device_tps_including_padding": None if each is None or share is None else each * share,
        }

    def _count(self, line: dict[str, Any]) -> None:
        self.tokens += line.get("tokens") or 0
        self.padding += line.get("padding_tokens") or 0
